"""A process that compiles kernels for another one, so that this one stays as small as it was planned.

Numba and what it builds on the way to machine code take some 200 MB, and give little of that back. The
process starts when the first kernel is missing, and ends when nothing has been asked of it for a while, or
whoever asks is gone.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
from functools import cache
from importlib import import_module
from typing import Any

from refengine_numba import machine_code

PATIENCE = 5.0
"""Seconds without a kernel to compile, after which the process ends. It starts again in half of one."""

BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[1:]; from refengine_numba.compiler import serve; sys.exit(serve())"
)


class Compiler:
    """The process, seen from the one that needs kernels; its threads take turns."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def compile(self, name: str, *options: str) -> bool:
        """Have a kernel compiled and kept; tells whether that went well. Ctrl-C ends the process."""
        announce()
        with self._turn:
            for _ in range(2):  # it may have ended since the last kernel
                try:
                    return self._ask([name, *options])
                except OSError:
                    self._end()
            return False

    def _ask(self, kernel: list[str]) -> bool:
        if self._process is None:
            command = [sys.executable, "-c", BOOTSTRAP, *map(str, sys.path)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise BrokenPipeError
        try:
            self._process.stdin.write(f"{json.dumps(kernel)}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except KeyboardInterrupt:
            self._end()
            raise
        if not answer:
            raise BrokenPipeError
        return answer == "kept\n"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def compiler() -> Compiler:
    """The one of this process; one that is forked off has its own."""
    return _compiler_of(os.getpid())


@cache
def _compiler_of(process: int) -> Compiler:
    return Compiler()


def compile_here(name: str, *options: str) -> Any:
    """A kernel as :class:`kernels.compilation.Compiled`, by Numba in this process."""
    module, _, what = name.partition(".")
    return getattr(import_module(f"refengine_numba.kernels.{module}"), f"{what}_entry")(*options)


@cache
def announce() -> None:
    """Say, once a process, why it takes so long."""
    folder = machine_code.folder() if machine_code.can_keep() else None
    logging.getLogger("refengine").warning(
        "compiling kernels for this processor%s",
        f": once, they are kept in {folder}"
        if folder
        else f"; {machine_code.VARIABLE} names no folder where they can be kept",
    )


def serve() -> int:
    """What the process does: read names of kernels, a line each, and say of each whether it is kept now."""
    try:
        while _somebody_asks():
            line = sys.stdin.readline()
            if not line:
                break
            name, *options = json.loads(line)
            try:
                compiled = compile_here(name, *options)
                kept = machine_code.store("-".join((name, *options)), compiled.symbol, compiled.image)
            except Exception:  # the asker compiles it for itself, and sees why that fails
                kept = False
            print("kept" if kept else "not kept", flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def _somebody_asks() -> bool:
    if sys.platform == "win32":  # pipes cannot be waited for there
        return True
    return bool(select.select([sys.stdin], [], [], PATIENCE)[0])
