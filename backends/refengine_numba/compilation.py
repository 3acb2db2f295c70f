"""Compiling kernels once: where machine code is cached, and what makes it stale.

Numba's own cache forgets a kernel when the kernel's file changes, but not when a function that was inlined
into it does. So this backend's code lives in a folder named by the text of all its modules, and by whether
bounds are checked; a change anywhere starts an empty one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import Any

import numba
from numba.core import config
from numba.extending import overload

VARIABLE = "REFENGINE_NUMBA_CACHE"
"""The environment variable that names the folder for compiled code; empty: compile in every process."""


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; ``None`` where they are not, or the folder cannot be written."""
    root = os.environ.get(VARIABLE)
    if root == "":
        return None
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME") or (
            os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
        )
        root = str(Path(base or Path.home() / ".cache") / "refengine" / "numba")
    text = hashlib.sha256(numba.__version__.encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        text.update(module.read_bytes())
    folder = Path(root) / f"{text.hexdigest()[:16]}{'-checked' if config.BOUNDSCHECK else ''}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def _own_cache() -> Iterator[bool]:
    """While it lasts, functions that are decorated get this backend's folder; others keep theirs."""
    folder, before = cache_folder(), config.CACHE_DIR
    if folder is not None:
        config.CACHE_DIR = str(folder)
    try:
        yield folder is not None
    finally:
        config.CACHE_DIR = before


def entry(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile at once, to an address that C calls."""

    def decorate(function: Callable[..., Any]) -> Any:
        with _own_cache() as cached:
            compiled = numba.cfunc(signature, nopython=True, cache=cached, error_model="numpy")(function)
        if not compiled.cache_hits:
            _announce()
        return compiled

    return decorate


@cache
def _announce() -> None:
    """Say, once a process, why it takes so long."""
    folder = cache_folder()
    logging.getLogger("refengine").warning(
        "compiling kernels for this processor%s",
        f": once, they are kept in {folder}" if folder else f"; {VARIABLE} names no folder to keep them in",
    )


def inlined(target: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Say how compiled code computes ``target``: a function of the arguments' types gives its Python text.

    Literal strings and integers are seen as such; the code goes into its caller.
    """

    def decorate(choose: Callable[..., Any]) -> Any:
        @wraps(choose)
        def chosen(*args: Any, **kws: Any) -> Any:
            try:
                return choose(*args, **kws)
            except AttributeError:  # Numba tries without literals, too: nothing to choose by
                return None

        options = {"forceinline": True, "error_model": "numpy"}
        return overload(target, prefer_literal=True, strict=False, jit_options=options)(chosen)

    return decorate


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of compiled code that goes into its caller, whatever the types."""
    options = {"forceinline": True, "error_model": "numpy"}
    overload(function, prefer_literal=True, strict=False, jit_options=options)(lambda *args, **kws: function)
    return function
