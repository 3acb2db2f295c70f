"""The standard streams: answers and results go to stdout, all that is said about them to stderr."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from typing import TextIO

from refengine.errors import RequestError

BOLD_RED, DIM = "1;31", "2"

_HARMLESS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


def say(text: str = "") -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def aside(text: str) -> None:
    """A line on stderr, dim where that shows."""
    say(styled(text, DIM, sys.stderr))


def write_answer(text: str) -> None:
    """Generated text on stdout, at once; a terminal gets no control characters of the model's choosing."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: object) -> None:
    """One JSON value on a line of stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def piped_text() -> str | None:
    """What is piped in on stdin, without a final newline; ``None`` on a terminal or where nothing comes.

    Raises:
        RequestError: it is not UTF-8.
    """
    if sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: byte {error.start} is wrong") from None
    return text.removesuffix("\n").removesuffix("\r") or None


def is_interactive() -> bool:
    """Whether a person types on stdin."""
    return sys.stdin.isatty()


def harmless(text: str) -> str:
    """The text with control characters made visible, for they could move the cursor or set the title."""
    return text.translate(_HARMLESS)


def wrapped(text: str, stream: TextIO) -> str:
    """A line broken between words, where the stream is a terminal and the line is wider."""
    if not stream.isatty():
        return text
    width = os.get_terminal_size(stream.fileno()).columns or 80  # 0 where a terminal has no size
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def styled(text: str, style: str, stream: TextIO) -> str:
    """The text in an SGR style, where the stream is a terminal with colours and ``NO_COLOR`` is not set."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"
