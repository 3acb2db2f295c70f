"""A download is seen on a terminal, and leaves a line elsewhere."""

from __future__ import annotations

import os
import pty
import threading

import pytest

from refengine.cli.progress import DownloadProgress
from refengine.loader import Progress


def transfer(progress: Progress, *chunks: int) -> None:
    progress.notice("Licence: [MIT]")
    progress.start("a [model]", 3_000_000)
    for chunk in chunks:
        progress.advance(chunk)
    progress.finish()


def test_a_pipe_gets_the_notice_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is drawn where stderr is no terminal; stdout gets nothing."""
    transfer(DownloadProgress(), 2_000_000, -1_000_000, 2_000_000)
    output, told = capsys.readouterr()
    notice, done = told.splitlines()
    assert (output, notice) == ("", "Licence: [MIT]")
    assert done.startswith("Downloaded a [model]: 3.0 MB in ")


def test_a_broken_transfer_does_not_say_that_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Its error will say what happened."""
    transfer(DownloadProgress(), 2_000_000)
    assert capsys.readouterr().err == "Licence: [MIT]\n"


def test_a_terminal_gets_a_bar_and_its_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar names the model and its size; at the end the cursor shows again."""
    controller, device = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while b"Downloaded" not in shown:
            shown.extend(os.read(controller, 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    with open(device, "w", encoding="utf-8") as writer:
        monkeypatch.setattr("sys.stderr", writer)
        transfer(DownloadProgress(), 3_000_000)
        reader.join(30)
    os.close(controller)
    drawn = shown.partition(b"Downloaded")[0]
    assert b"a [model]" in drawn
    assert b"3.0/3.0 MB" in drawn
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
