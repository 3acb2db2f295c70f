"""The output: whole rows only, one writer, and nobody else's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from batch.jsonl import read

from refengine.batch import OutputFile
from refengine.batch.output_file import SYNC_ROWS, SYNC_SECONDS
from refengine.errors import OutputError, RequestError


def row(number: int) -> dict[str, Any]:
    return {"id": f"batch_req_{number:032x}", "custom_id": str(number), "response": None, "error": {}}


def contents(path: Path) -> list[str]:
    with OutputFile(path) as output:
        return [written.row["custom_id"] for written in output.rows()]


def test_rows_are_appended(tmp_path: Path) -> None:
    """Each is in the file when ``append`` returns, and the next opening goes on after it."""
    path = tmp_path / "out.jsonl"
    for start in (0, 3):
        with OutputFile(path) as output:
            for number in range(start, start + 3):
                output.append(row(number))
                assert read(path)[-1] == row(number)
    assert read(path) == [row(number) for number in range(6)]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_torn_row_is_cut_off_wherever_it_tore(tmp_path: Path, kept: int) -> None:
    """Whole rows stay, to the byte; what follows the last newline goes."""
    path = tmp_path / "out.jsonl"
    whole = "".join(f"{json.dumps(row(number))}\n" for number in range(kept)).encode()
    torn = json.dumps(row(9)).encode()
    for length in range(len(torn) + 1):
        path.write_bytes(whole + torn[:length])
        with OutputFile(path) as output:
            assert [written.row for written in output.rows()] == [row(number) for number in range(kept)]
            assert output.cut_torn_row() == length
        assert path.read_bytes() == whole


def test_a_long_torn_row_is_cut_off(tmp_path: Path) -> None:
    """One longer than what is read at a time, and zeros that a file system may leave."""
    path = tmp_path / "out.jsonl"
    whole = f"{json.dumps(row(1))}\n".encode()
    for torn in (json.dumps(row(2) | {"error": {"message": "x" * 200_000}}).encode()[:-1], bytes(70_000)):
        path.write_bytes(whole + torn)
        with OutputFile(path) as output:
            assert len(list(output.rows())) == 1
            assert output.cut_torn_row() == len(torn)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "text", ["notes", "notes\n", '{"id": "x"', '{"a": 1}\n', "[]\n", '{"id": "batch_x"}\n']
)
def test_another_file_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    """What is no batch's output is refused before a byte of it changes."""
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"line 1 of .*notes\.txt"):
        contents(path)
    assert path.read_text() == text


def test_there_is_one_writer(tmp_path: Path) -> None:
    """A second one is refused while the first lives, in this process or another; a killed one blocks nobody."""
    path = tmp_path / "out.jsonl"
    with OutputFile(path), pytest.raises(RequestError, match="another process"):
        OutputFile(path)
    code = (
        "import sys, pathlib, time; from refengine.batch import OutputFile;"
        "file = OutputFile(pathlib.Path(sys.argv[1])); print('open', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(RequestError, match="another process"):
            OutputFile(path)
        process.kill()
    assert contents(path) == []


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A folder that is not there, a device, a full disk."""
    with pytest.raises(OutputError, match="cannot be opened"):
        OutputFile(tmp_path / "no" / "out.jsonl")
    with pytest.raises(RequestError, match="not a regular file"):
        OutputFile(Path(os.devnull))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that the same command goes on; what fits in part is cut off at once."""
    path = tmp_path / "out.jsonl"
    write = os.write
    room = len(json.dumps(row(0))) + 51

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        count = write(descriptor, data[:room])
        room -= count
        return count

    with OutputFile(path) as output, monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        output.append(row(0))
        with pytest.raises(OutputError, match=r"(?s)No space.*goes on"):
            output.append(row(1))
        assert room == 0
    assert path.read_text() == json.dumps(row(0)) + "\n"
    with OutputFile(path) as output:
        assert [written.row for written in output.rows()] == [row(0)]
        assert output.cut_torn_row() == 0


def test_a_disk_that_fails_at_last_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows cannot be forced to it at the end; unless something else is being raised."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space"), OutputFile(tmp_path / "out.jsonl") as output:
        output.append(row(0))
    output = OutputFile(tmp_path / "out.jsonl")
    output.append(row(1))
    output.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def odd(row: Mapping[str, Any]) -> bool:
    return int(row["custom_id"]) % 2 == 1


def test_rows_are_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others stay, byte by byte; it is locked and appended to as before; a full disk leaves all."""
    path = tmp_path / "out.jsonl"
    with OutputFile(path) as output:
        for number in range(5):
            output.append(row(number))
    path.chmod(0o640)
    whole = path.read_bytes()
    with OutputFile(path) as output:
        with monkeypatch.context() as patch:

            def full(descriptor: int, data: memoryview) -> int:
                raise OSError(28, "No space left on device")

            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match=r"(?s)No space.*It is as it was"):
                output.remove(odd)
        assert (path.read_bytes(), list(tmp_path.iterdir())) == (whole, [path])
        output.remove(odd)
        with pytest.raises(RequestError, match="another process"):
            OutputFile(path)
        output.append(row(6))
    lines = whole.splitlines(keepends=True)
    assert path.read_bytes() == b"".join([lines[0], lines[2], lines[4], f"{json.dumps(row(6))}\n".encode()])
    assert (list(tmp_path.iterdir()), path.stat().st_mode & 0o777) == ([path], 0o640)


def test_rows_are_forced_to_the_disk_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many rows, after so much time, and at the end."""
    synced: list[int] = []
    now = 0.0
    monkeypatch.setattr(os, "fsync", synced.append)
    with OutputFile(tmp_path / "out.jsonl", clock=lambda: now) as output:
        for number in range(SYNC_ROWS - 1):
            output.append(row(number))
        assert len(synced) == 0
        output.append(row(0))
        assert len(synced) == 1
        now += SYNC_SECONDS
        output.append(row(0))
        assert len(synced) == 2
        output.append(row(0))
    assert len(synced) == 3
