"""Kernels by name, as addresses: what an executor calls without knowing how it came to be.

Every kernel has an entry of one C signature, ``void (int64 thread, int64 threads, const int64 *arguments)``;
the arguments are addresses and sizes, in an order that each entry states. Nothing is checked there:
``matrix``, ``row_arguments``, ``kv_arguments`` and ``attention_arguments`` make arguments out of arrays that
they have checked. An entry raises nothing; under ``NUMBA_BOUNDSCHECK=1`` it reports an error and returns.

Entries are made in :mod:`refengine_numba.kernels`, all of whose modules need Numba; nothing outside does.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from refengine_numba import machine_code
from refengine_numba.compiler import announce, compile_here, compiler

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
"""The signature of every entry; who calls it lets others have the interpreter."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A kernel, ready to be called.

    Attributes:
        name: what :func:`entry` was asked for.
        address: of the function.
        kept: what holds the code at that address.
    """

    name: str
    address: int
    kept: Any

    @cached_property
    def function(self) -> Any:
        """To be called from Python: thread, threads, and a pointer to the arguments."""
        return FUNCTION(self.address)


@cache
def entry(name: str, *options: str) -> Entry:
    """The entry that ``module.what`` names: made by ``what_entry(*options)`` in ``kernels.module``.

    Its machine code comes from disk if it was compiled before on this machine; else it is compiled now, which
    takes a second or more: by another process, which keeps it, or by this one, where nothing can be kept.

    Raises:
        KeyError: the options are none that the kernel knows.
    """
    label = "-".join((name, *options))
    if machine_code.checks_bounds():
        compiled = compile_here(name, *options)
        return Entry(label, compiled.address, compiled)
    known = machine_code.load(label)
    if known is None and machine_code.can_keep() and compiler().compile(name, *options):
        known = machine_code.load(label)
    if known is not None:
        return Entry(label, *known)
    announce()
    compiled = compile_here(name, *options)
    return Entry(label, compiled.address, compiled)
