"""The command as a process: signals, pipes, terminals, and what it imports."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from refengine.cli import main; main()"]
SILENT = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
PATIENCE_S = 60.0  # before a hanging process fails a test


def environment() -> dict[str, str]:
    """Ours, but with buffered streams, as users have them."""
    ours = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TERM": "xterm"}
    for name in ("PYTHONUNBUFFERED", "REFENGINE_TRACEBACK"):
        ours.pop(name, None)
    return ours


@contextmanager
def started(models: Path, *args: str | bytes, **kwargs: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command, running in the folder of the models; killed where a test fails."""
    command = [*COMMAND, *args]
    with subprocess.Popen(command, cwd=models, env=environment(), **kwargs) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


class Terminal:
    """A terminal of 80 columns with a process in it."""

    def __init__(self, controller: int, process: subprocess.Popen[bytes]) -> None:
        self.controller, self.process = controller, process
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.controller, text.encode())

    def await_text(self, pattern: str) -> str:
        """Wait until what is shown since the last call matches; returns that much of it."""
        deadline = time.monotonic() + PATIENCE_S
        while (match := re.search(pattern, self.shown)) is None:
            ready, _, _ = select.select([self.controller], [], [], deadline - time.monotonic())
            assert ready, f"no {pattern!r} in {self.shown!r}"
            self.shown += os.read(self.controller, 4096).decode(errors="replace")
        shown, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return shown

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def interrupt_until_exit(self) -> int:
        """Press Ctrl-C until it is heard: for a moment after its prompt, readline does not listen yet."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.type("\x03")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        return self.process.wait(0)


@contextmanager
def terminal(models: Path, *args: str) -> Iterator[Terminal]:
    """The command as the foreground process of a terminal."""
    controller, device = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), device)

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with started(models, *args, **streams, start_new_session=True, preexec_fn=take_terminal) as process:
        os.close(device)
        yield Terminal(controller, process)
    os.close(controller)


def test_an_interrupt_leaves_what_was_said(models: Path) -> None:
    """SIGINT in the middle of an answer: exit code 130, the text so far, and no word more."""
    with started(models, "run", "digits.gguf", "0", "--raw", **SILENT) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, told) == (130, b"")
        said = (first + rest).decode()
        assert said == ("1234567890" * len(said))[: len(said)]


@pytest.mark.parametrize("arguments", [("run", "digits.gguf", "0", "--raw"), ("program", "digits.gguf")])
def test_a_closed_pipe_ends_it_quietly(models: Path, arguments: tuple[str, ...]) -> None:
    """As under ``| head -c 1``: no traceback, nothing on stderr, the exit code of SIGPIPE."""
    with started(models, *arguments, **SILENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if arguments[0] == "run":
            assert process.stdout.read(1) == b"1"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 141


def test_a_full_disk_is_an_error(models: Path) -> None:
    """Output that cannot be written is told once."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        open("/dev/full", "w") as full,
        started(models, "inspect", "digits.gguf", "--json", stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, told = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, told) == (1, b"refengine: error: No space left on device\n")


def test_closed_streams_are_no_error(models: Path) -> None:
    """Without stdin, stdout and stderr a command still does its work."""
    code = subprocess.call(
        ["/bin/sh", "-c", '"$@" <&- >&- 2>&-', "sh", *COMMAND, "show", "digits.gguf"],
        cwd=models,
        env=environment(),
    )
    assert code == 0


def test_text_that_is_not_utf8_is_refused(models: Path) -> None:
    """An argument or a line of a conversation with other bytes is a wrong request, not a bug."""
    for arguments, piped in (("run", "base.gguf", b"\xff"), b""), (("chat", "alphabet.gguf"), b"\xff\n"):
        with started(
            models, *arguments, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        ) as process:
            said, told = process.communicate(piped, timeout=PATIENCE_S)
        assert (process.returncode, said) == (7, b"")
        assert told.startswith(b"refengine: error: ")


def test_help_imports_nothing_heavy() -> None:
    """--help and --version of the whole and of each command need neither NumPy nor rich."""
    code = (
        "import sys\n"
        "from refengine.cli.commands import HOMES, refengine\n"
        "for args in (['--version'], ['--help'], *([name, '--help'] for name in HOMES)):\n"
        "    try: refengine.main(args)\n"
        "    except SystemExit as leaving: assert leaving.code == 0, args\n"
        "heavy = {'numpy', 'rich', 'jinja2', 'tokenizers', 'refengine.llm', 'refengine.loader'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_ctrl_c_stops_an_answer_and_no_more(models: Path) -> None:
    """In a conversation at a terminal, Ctrl-C stops the answer, the next is given, and Ctrl-D leaves."""
    with terminal(models, "chat", "digits.gguf") as screen:
        screen.await_text(">>> ")
        for _ in range(2):
            screen.type("Hi\r")
            screen.await_text("0123456789")
            screen.type("\x03")
            assert "Traceback" not in screen.await_text(r"\^C\r\n.*Stopped\..*\r\n")
            screen.await_text(">>> ")
        screen.type("\x04")
        assert screen.exit_code() == 0


def test_ctrl_c_at_the_prompt_leaves(models: Path) -> None:
    """With the exit code of an interrupt, and nothing but the end of the line."""
    with terminal(models, "chat", "digits.gguf") as screen:
        screen.await_text(">>> ")
        assert screen.interrupt_until_exit() == 130
        assert screen.await_text(r"\n").strip() in ("", "^C", "^C^C")


def test_run_without_a_prompt_converses_at_a_terminal(models: Path) -> None:
    """``refengine run MODEL`` is ``refengine chat MODEL`` there."""
    with terminal(models, "run", "alphabet.gguf") as screen:
        screen.await_text("/help")
        screen.await_text(">>> ")
        screen.type("/bye\r")
        assert screen.exit_code() == 0


def test_a_conversation_that_is_too_long_can_go_on(models: Path) -> None:
    """When the context is full the user is told of /clear, and after it there is an answer again."""
    with terminal(models, "chat", "short.gguf") as screen:
        for message, told in (
            ("Hi", "is full.*/clear"),
            ("Hi", "shorten.*/clear"),
            ("/clear", "forgotten"),
            ("Hi", "0123"),
        ):
            screen.await_text(">>> ")
            screen.type(f"{message}\r")
            screen.await_text(f"(?s){told}")
