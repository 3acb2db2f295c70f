"""Every error becomes a few lines on stderr and an exit code."""

from __future__ import annotations

import pty
import re
from contextlib import suppress

import click
import pytest

from refengine import errors
from refengine.cli.errors import exit_code_of

MESSAGE = "the first line\nthe second"
TREE = [kind for name, kind in vars(errors).items() if name.endswith("Error")]


def raising(error: BaseException) -> int:
    def act() -> None:
        raise error

    return exit_code_of(act)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REFENGINE_TRACEBACK", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def told_on_a_terminal(error: BaseException) -> str:
    """What a terminal of 80 columns shows when a command raises an error."""
    controller, device = pty.openpty()
    with pytest.MonkeyPatch.context() as patch, open(device, "w", encoding="utf-8") as writer:
        patch.setattr("sys.stderr", writer)
        raising(error)
    told = b""
    with open(controller, "rb", buffering=0) as reader, suppress(OSError):  # which Linux raises at the end
        while chunk := reader.read(4096):
            told += chunk
    return told.decode()


@pytest.mark.parametrize("kind", TREE)
def test_the_exit_code_is_the_class_s(
    kind: type[errors.RefengineError], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each class of the tree has the exit code that its docstring draws, and its text on stderr."""
    if issubclass(kind, errors.BackendError):
        error: errors.RefengineError = kind(state="a", available="b", why="c", mend="d")
    elif issubclass(kind, errors.MemoryLimitError):
        error = kind(MESSAGE, needed=1)
    else:
        error = kind(MESSAGE)
    drawn = re.search(rf"\b{kind.__name__} +(?:exit code|(\d+))", errors.__doc__ or "")
    assert drawn
    assert raising(error) == int(drawn[1] or 1) == kind.exit_code
    assert capsys.readouterr() == ("", f"refengine: error: {error}\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (click.UsageError("Wrong."), 2, "refengine: error: wrong.\n"),
        (KeyboardInterrupt(), 130, ""),
        (click.exceptions.Exit(0), 0, ""),
        (BrokenPipeError(), 141, ""),
        (MemoryError("cannot hold it"), 11, "refengine: error: out of memory: cannot hold it\n"),
        (MemoryError(), 11, "refengine: error: out of memory\n"),
        (PermissionError(13, "Permission denied", "a.gguf"), 1, "refengine: error: a.gguf: Permission denied\n"),
        (OSError("unreadable"), 1, "refengine: error: unreadable\n"),
        (ZeroDivisionError("by zero"), 1, "refengine: error: ZeroDivisionError: by zero\n"),
    ],
    ids=repr,
)  # fmt: skip
def test_other_errors(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Usage, interrupts, closed pipes, memory, files and bugs have their codes, and no traceback."""
    assert raising(error) == code
    output, told = capsys.readouterr()
    assert output == ""
    assert told.startswith(text)
    assert "Traceback" not in told
    assert bool(told) == bool(text)


def test_a_bug_says_how_to_get_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """REFENGINE_TRACEBACK=1, which then shows it."""
    raising(ZeroDivisionError("by zero"))
    assert "REFENGINE_TRACEBACK=1" in capsys.readouterr().err
    monkeypatch.setenv("REFENGINE_TRACEBACK", "1")
    raising(ZeroDivisionError("by zero"))
    assert "Traceback" in (told := capsys.readouterr().err)
    assert __file__ in told


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that quotes a file cannot move the cursor."""
    raising(errors.FormatError("named \x1b]0;title\x07\x9b1m\r"))
    assert capsys.readouterr().err == "refengine: error: named ␛]0;title␇\ufffd1m␍\n"


def test_the_first_line_is_red_on_a_terminal() -> None:
    """Bold and red, and the lines after it plain."""
    told = told_on_a_terminal(errors.RequestError(MESSAGE))
    assert told == "\x1b[1;31mrefengine: error: the first line\x1b[0m\r\nthe second\r\n"


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR, a terminal gets plain text (https://no-color.org)."""
    monkeypatch.setenv("NO_COLOR", "1")
    told = told_on_a_terminal(errors.RequestError(MESSAGE))
    assert told == "refengine: error: the first line\r\nthe second\r\n"


def test_an_interrupt_ends_the_line_of_a_terminal() -> None:
    """The shell's prompt does not follow ^C on its line."""
    assert told_on_a_terminal(KeyboardInterrupt()) == "\r\n"


def test_lines_break_between_words_on_a_terminal() -> None:
    """A long text fits the terminal's width, and no word is cut."""
    told = told_on_a_terminal(errors.RequestError("word " * 40))
    lines = re.sub(r"\x1b\[[\d;]*m", "", told).splitlines()
    assert " ".join(lines).split() == ["refengine:", "error:", *["word"] * 40]
    assert 75 < max(map(len, lines)) <= 80
