"""Compiling: how functions become entries, and how parts of them go into their callers.

Numba's own cache is used where bounds are checked only: it forgets a kernel when the kernel's file changes,
but not when a function that was inlined into it does, and it takes Numba to read it. See
:mod:`refengine_numba.machine_code` for the other way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
from numba.core import config
from numba.extending import overload

from refengine_numba import machine_code


@dataclass(frozen=True, eq=False)
class Compiled:
    """An entry as Numba compiled it.

    Attributes:
        code: Numba's C function.
        address: of it.
    """

    code: Any
    address: int

    @property
    def symbol(self) -> str:
        """Its name in :attr:`image`."""
        return str(self.code._wrapper_name)

    @property
    def image(self) -> bytes:
        """The object file."""
        return bytes(self.code._library._get_compiled_object())

    @cached_property
    def function(self) -> Any:
        """To be called from Python: thread, threads, and a pointer to the arguments."""
        return self.code.ctypes


@contextmanager
def _own_cache() -> Iterator[bool]:
    """While it lasts, functions that are decorated get this backend's folder; others keep theirs."""
    folder, before = machine_code.folder() if machine_code.checks_bounds() else None, config.CACHE_DIR
    if folder is not None:
        config.CACHE_DIR = str(folder)
    try:
        yield folder is not None
    finally:
        config.CACHE_DIR = before


def entry(signature: str) -> Callable[[Callable[..., Any]], Compiled]:
    """Compile at once, to an address that C calls."""

    def decorate(function: Callable[..., Any]) -> Compiled:
        with _own_cache() as cached:
            compiled = numba.cfunc(signature, nopython=True, cache=cached, error_model="numpy")(function)
        return Compiled(compiled, compiled.address)

    return decorate


def inlined(target: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Say how compiled code computes ``target``: a function of the arguments' types gives its Python text.

    The function names the arguments it chooses by, as ``target`` does; literal strings and integers are seen
    as such. The code goes into its caller.
    """
    signature = inspect.signature(target)

    def decorate(choose: Callable[..., Any]) -> Any:
        wanted = inspect.signature(choose).parameters

        def chosen(*args: Any, **kws: Any) -> Any:
            types = signature.bind(*args, **kws).arguments
            try:
                return choose(*(types[name] for name in wanted))
            except AttributeError:  # Numba tries without literals, too: nothing to choose by
                return None

        chosen.__signature__ = signature  # type: ignore[attr-defined]  # where Numba looks for it
        options = {"forceinline": True, "error_model": "numpy"}
        return overload(target, prefer_literal=True, strict=False, jit_options=options)(chosen)

    return decorate


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of compiled code that goes into its caller, whatever the types."""
    options = {"forceinline": True, "error_model": "numpy"}
    overload(function, prefer_literal=True, strict=False, jit_options=options)(lambda *args, **kws: function)
    return function
