"""What the user of a conversation enters, typed or piped in."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import NamedTuple

from refengine.cli.terminal import is_interactive, say

QUOTES = '"""'


class Entry(NamedTuple):
    """A line, or several between quotes, which are never a command."""

    text: str
    quoted: bool


class Lines:
    """Reads entries from stdin, with line editing and history where the system has readline."""

    def __init__(self) -> None:
        self.interactive = is_interactive()
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 its import gives `input` line editing

    def read(self) -> Entry | None:
        """The next entry; ``None`` after the last.

        Raises:
            KeyboardInterrupt: the user left with Ctrl-C.
        """
        try:
            line = self._line(">>> ")
        except EOFError:
            if self.interactive:
                say()  # the shell's prompt does not follow ours on its line
            return None
        if not line.lstrip().startswith(QUOTES):
            return Entry(line, quoted=False)
        text = line.lstrip().removeprefix(QUOTES)
        with suppress(EOFError):
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + self._line("... ")
        return Entry(text.rstrip().removesuffix(QUOTES).strip("\n"), quoted=True)

    def _line(self, prompt: str) -> str:
        if self.interactive and sys.stdout.isatty():
            return input(prompt)
        if self.interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")
