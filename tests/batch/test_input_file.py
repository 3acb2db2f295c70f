"""The input: read twice, held never, and refused where rows could not be told apart."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from batch.jsonl import chat, completion, write

from refengine.batch import InputFile, parse_row
from refengine.batch import input_file as module
from refengine.errors import RequestError


def test_rows_are_the_lines_that_hold_something(tmp_path: Path) -> None:
    """Empty lines are no rows, malformed ones are; lines may end as on Windows, the last not at all."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\n{"custom_id": "a"}\r\n  \n{oops\n{"custom_id": "b"}')
    source = InputFile(path)
    rows = [row for _, row in source.rows()]
    assert [(row.line, row.custom_id) for row in rows] == [(2, "a"), (4, None), (5, "b")]
    assert [source.find(row.key) for row in rows] == [0, 1, 2]
    assert all(source.says(number, row.digest) for number, row in source.rows())
    assert source.find(bytes(16)) is None


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    """And finds none."""
    source = InputFile(write(tmp_path / "in.jsonl"))
    assert (len(source), list(source.rows()), source.find(bytes(16))) == (0, [], None)


def test_a_custom_id_given_twice_is_refused(tmp_path: Path) -> None:
    """The text names the first two lines, and how many more there are."""
    names = ["x", "a", "b", "x", "c", "b", "b"]
    path = write(tmp_path / "in.jsonl", *(chat(name, str(i)) for i, name in enumerate(names)))
    with pytest.raises(RequestError, match=r"lines 1 and 4 of .*in\.jsonl .* 'x' \(2 more"):
        InputFile(path)
    path = write(tmp_path / "in.jsonl", "", chat("é"), "{oops", "{oops", completion("é"))
    with pytest.raises(RequestError, match=r"lines 2 and 5 .* 'é':"):
        InputFile(path)


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_an_input_that_changes_is_noticed(tmp_path: Path, change: str) -> None:
    """Between the two readings no row may come, go or say something else."""
    rows = [chat("a"), chat("b"), chat("c")]
    path = write(tmp_path / "in.jsonl", *rows)
    source = InputFile(path)
    changed = {"more": [*rows, chat("d")], "less": rows[:2], "other": [rows[0], chat("b", "Ho"), rows[2]]}
    write(path, *changed[change])
    with pytest.raises(RequestError, match="changed"):
        list(source.rows())


def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a row with a fault, and what follows is read."""
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    path = write(tmp_path / "in.jsonl", '{"custom_id": "' + "a" * 1000 + '"}', '{"custom_id": "b"}')
    (_, first), (_, second) = InputFile(path).rows()
    assert first.fault is not None
    assert "longer than 100 bytes" in first.fault.message
    assert (second.line, second.custom_id) == (2, "b")


def test_of_a_row_little_is_held(tmp_path: Path) -> None:
    """Much less than the rows themselves: 40 bytes each, and as much again while they are sorted."""
    count = 20_000
    path = write(tmp_path / "in.jsonl", *(chat(f"row-{i}", "x" * 400) for i in range(count)))
    tracemalloc.start()
    source = InputFile(path)
    for _ in source.rows():
        pass
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert held < 90 * count
    assert peak < 200 * count < path.stat().st_size / 2


def test_a_pipe_cannot_be_read_twice() -> None:
    """It is refused, not emptied."""
    with pytest.raises(RequestError, match="read twice"):
        InputFile(Path(os.devnull))


def test_every_row_is_found_among_many(tmp_path: Path) -> None:
    """By its key, and no other is."""
    source = InputFile(write(tmp_path / "in.jsonl", *(chat(str(i)) for i in range(500))))
    assert [source.find(row.key) for _, row in source.rows()] == list(range(500))
    assert source.find(parse_row(1, b'{"custom_id": "500"}').key) is None
