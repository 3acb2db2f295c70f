"""What is done is found in the output, and an output of something else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch.jsonl import chat, completion, write

from refengine.batch import Fault, InputFile, OutputFile, Resumption, parse_row, pending, resume
from refengine.batch.answer import failure
from refengine.errors import RequestError

ROWS: list[Any] = [chat("a"), completion("b"), "{oops", chat("c"), chat("d", n=0)]


def told(document: Any, line: int = 1) -> dict[str, Any]:
    """An error in answer to a row."""
    text = document if isinstance(document, str) else json.dumps(document)
    return failure(parse_row(line, text.encode()), Fault("no", "invalid_request", 400))


def answered(document: Any, fingerprint: str) -> dict[str, Any]:
    row = told(document)
    row["response"] = {"status_code": 200, "body": {"system_fingerprint": fingerprint}}
    return row


def found_in(tmp_path: Path, *outputs: list[Any], force: bool = False) -> Resumption:
    paths = [write(tmp_path / f"out{index}.jsonl", *rows) for index, rows in enumerate(outputs)]
    source = InputFile(write(tmp_path / "in.jsonl", *ROWS))
    files = [OutputFile(path) for path in paths]
    try:
        found = resume(source, files, force=force)
        assert [row.line for row in pending(source, found)] == [n + 1 for n in range(5) if not found.done[n]]
        return found
    finally:
        for file in files:
            file.__exit__(None, None, None)


def test_answers_and_errors_count(tmp_path: Path) -> None:
    """In whatever order and file; a line without custom_id is known by its id."""
    found = found_in(tmp_path, [answered(ROWS[3], "fp_1"), told("{oops", 3)], [told(ROWS[1])])
    assert found.done.tolist() == [False, True, True, True, False]
    assert (found.failed, found.foreign, found.fingerprints) == (2, 0, {"fp_1"})


def test_nothing_done_is_nothing_found(tmp_path: Path) -> None:
    """An output that is new."""
    assert found_in(tmp_path, []).done.sum() == 0


@pytest.mark.parametrize(
    ("rows", "told_of"),
    [
        ([told(chat("z"))], r"line 1 of .*'z'\) answers no row"),
        ([told(ROWS[0]), told("{oops", 4)], "line 2 of .*answers no row"),
        ([told(ROWS[0]), told(ROWS[0])], "line 2 of .*'a' a second time"),
        ([told(chat("a", "Ho"))], r"'a', but line 1 of .*in\.jsonl asks something else"),
        ([told(chat("z")) | {"id": "batch_req_zz"}], "answers no row"),
    ],
)
def test_an_output_of_another_input_is_refused(tmp_path: Path, rows: list[Any], told_of: str) -> None:
    """With the line, and with --force as the way out; nothing has changed then."""
    with pytest.raises(RequestError, match=rf"(?s){told_of}.*--force"):
        found_in(tmp_path, rows)


def test_force_counts_what_has_the_custom_id(tmp_path: Path) -> None:
    """Whatever it answered; what answers nothing stays and is told."""
    found = found_in(tmp_path, [told(chat("z")), told(chat("a", "Ho")), told(ROWS[0])], force=True)
    assert found.done.tolist() == [True, False, False, False, False]
    assert (found.failed, found.foreign) == (1, 1)


def test_another_model_is_refused(tmp_path: Path) -> None:
    """By the fingerprint in the answers."""
    found = found_in(tmp_path, [answered(ROWS[0], "fp_1"), told(ROWS[1])])
    found.check_model("fp_1")
    with pytest.raises(RequestError, match=r"(?s)another model.*fp_1, here fp_2.*--force"):
        found.check_model("fp_2")
