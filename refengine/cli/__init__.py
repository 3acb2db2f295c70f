"""The command line. Commands are imported when they are called, and the engine when one needs it."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """The console script ``refengine``: runs one command and leaves with its exit code."""
    # Pipes carry UTF-8. What is not goes through to the tokenizer, which refuses it; a terminal that lacks a
    # character shows another.
    for name, errors in {"stdin": "surrogateescape", "stdout": "replace", "stderr": "replace"}.items():
        stream = getattr(sys, name) or open(os.devnull, "r+")  # noqa: SIM115 the caller closed it: `<&-`
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)
        setattr(sys, name, stream)
    from refengine.cli.commands import refengine

    refengine.main()
