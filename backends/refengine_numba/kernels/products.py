"""Entries of matrix products, one for each kind of activations."""

from __future__ import annotations

from typing import Any

from refengine_numba.kernels.compilation import Compiled, entry, part
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at
from refengine_numba.kernels.product import multiply_codes, multiply_floats
from refengine_numba.layout import GROUP, LAYOUTS
from refengine_numba.records import RECORD_BYTES


def mixed8_entry(encoding: str, isa: str) -> Compiled:
    """The product with quantized activations; ``.address`` is what :func:`call` takes.

    Arguments: tiles, bytes of tiles, records, bias (0: none), y, rows N, columns K, rows of activations T.
    """
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        rows, groups, count = a[5], a[6] // GROUP, a[7]
        multiply_codes(
            isa,
            encoding,
            thread,
            threads,
            bytes_at(a[0], a[1]),
            bytes_at(a[2], count * groups * RECORD_BYTES),
            floats_at(a[3], rows if a[3] != 0 else 0),
            floats_at(a[4], count * rows),
            rows,
            groups,
            count,
        )

    return run


def float32_entry(encoding: str) -> Compiled:
    """The product with float32 activations.

    Arguments: tiles, bytes of tiles, x, bias (0: none), y, rows N, columns K, rows of activations T.
    """
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        floats(encoding, "float32", thread, threads, a, floats_at(0, 0))

    return run


def mixed16_entry(encoding: str) -> Compiled:
    """The product with rows rounded to float16.

    Arguments: tiles, bytes of tiles, rounded rows, bias (0: none), y, rows N, columns K, rows of activations
    T, their powers of two.
    """
    LAYOUTS[encoding]

    @entry(SIGNATURE)
    def run(thread: int, threads: int, a: Any) -> None:
        floats(encoding, "float16", thread, threads, a, floats_at(a[8], a[7]))

    return run


@part
def floats(encoding: str, precision: str, thread: int, threads: int, a: Any, powers: Any) -> None:
    """The product with floats, of the arguments that both kinds have."""
    rows, size, count = a[5], a[6], a[7]
    multiply_floats(
        encoding,
        precision,
        thread,
        threads,
        bytes_at(a[0], a[1]),
        floats_at(a[2], count * size),
        powers,
        floats_at(a[3], rows if a[3] != 0 else 0),
        floats_at(a[4], count * rows),
        rows,
        size,
        count,
    )
