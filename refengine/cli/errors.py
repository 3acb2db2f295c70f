"""The boundary where every error becomes a few lines on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import click

from refengine.cli.terminal import BOLD_RED, harmless, say, styled, wrapped
from refengine.errors import MemoryManagerError, RefengineError

FAILED, WRONG_USAGE, FINDINGS, INTERRUPTED, CLOSED_PIPE = 1, 2, 12, 130, 141
"""Exit codes beside those of ``refengine.errors``; the last two as a shell reports SIGINT and SIGPIPE."""

TRACEBACK = "REFENGINE_TRACEBACK"


def exit_code_of(act: Callable[[], object]) -> int:
    """Run a command; tell on stderr what went wrong, and return the exit code."""
    try:
        code = _attempt(act)
    except BrokenPipeError:  # stderr is closed as well, or stdout met it only now
        code = CLOSED_PIPE
    _drop_unwritable_output()
    return code


def report(error: BaseException, text: str) -> None:
    """Tell of an error: its first line in red, and the traceback before it where that was asked for."""
    if os.environ.get(TRACEBACK):
        say("".join(traceback.format_exception(error)).rstrip())
    first, *rest = harmless(f"refengine: error: {text}").splitlines()
    say(styled(wrapped(first, sys.stderr), BOLD_RED, sys.stderr))
    for line in rest:
        say(wrapped(line, sys.stderr))


def warn(text: str) -> None:
    """Tell of something that went wrong and does not end the command."""
    for line in harmless(f"refengine: warning: {text}").splitlines():
        say(wrapped(line, sys.stderr))


def _attempt(act: Callable[[], object]) -> int:
    try:
        act()
        sys.stdout.flush()
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        report(error, _usage(error))
        return error.exit_code
    except RefengineError as error:
        report(error, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            say()  # the shell's prompt does not follow ^C on its line
        return INTERRUPTED
    except BrokenPipeError:
        return CLOSED_PIPE
    except MemoryError as error:
        what = f"out of memory: {error}" if str(error) else "out of memory"
        report(error, f"{what}\nA smaller model needs less, and so does a smaller --kv-tokens.")
        return MemoryManagerError.exit_code
    except OSError as error:
        what = error.strerror or str(error)
        report(error, f"{error.filename}: {what}" if error.filename else what)
        return FAILED
    except Exception as error:
        name = type(error).__name__
        report(error, f"{name}: {error}\nThis is a bug. {TRACEBACK}=1 shows where it comes from.")
        return FAILED
    return 0


def _usage(error: click.ClickException) -> str:
    text = error.format_message()
    text = text[:1].lower() + text[1:]
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return text
    usage = context.command.collect_usage_pieces(context)
    path = context.command_path
    return f"{text}\nusage: {' '.join([path, *usage])}\nhelp:  {path} --help"


def _drop_unwritable_output() -> None:
    """Empty the streams now, so that the interpreter does not fail to at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
