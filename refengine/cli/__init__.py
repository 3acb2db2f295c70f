"""The command line. Commands are imported when they are called, and the engine when one needs it."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """The console script ``refengine``: runs one command and leaves with its exit code."""
    # Input that is not UTF-8 is for the tokenizer to refuse; a narrow terminal shows what it can.
    for name, errors in {"stdin": "surrogateescape", "stdout": "replace", "stderr": "replace"}.items():
        stream = getattr(sys, name) or open(os.devnull, "r+")  # noqa: SIM115 the caller closed it: `<&-`
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
        setattr(sys, name, stream)
    from refengine.cli.commands import refengine

    refengine.main()
