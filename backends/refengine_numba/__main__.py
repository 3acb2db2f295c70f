"""``python -m refengine_numba``: compile every kernel now, so that no later start has to.

For images and for machines without a writable home: name the folder with ``REFENGINE_NUMBA_CACHE``. What is
compiled is for this processor, and for the instruction set that ``REFENGINE_NUMBA_ISA`` names, if any.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product

from refengine_numba import isa
from refengine_numba.entries import entry
from refengine_numba.kv_pool import KINDS
from refengine_numba.layout import LAYOUTS
from refengine_numba.row_arguments import FORMULAS, PAIRINGS
from refengine_numba.team import thread_count

SEALED = ("int8", "int4")
"""Formats of sealed keys and values that are worth having beforehand."""

ALWAYS = (
    "together.together",
    "stages.run_stages",
    "activations.quantize",
    "halves.round",
    "norm.rms_norm",
    "rope.rope_table",
    "copy.take_rows",
    "attention_entry.attention",
    "attention_entry.merge",
)
"""Kernels without options."""


def kernels(instructions: str) -> Iterator[tuple[str, ...]]:
    """The name and options of every kernel of an instruction set."""
    yield from ((name,) for name in ALWAYS)
    yield "attention_arithmetic.tile", instructions
    yield from (("rope.rope", pairing) for pairing in PAIRINGS)
    yield from (("elementwise.elementwise", name) for name in FORMULAS)
    for name, layout in LAYOUTS.items():
        plain = ("packing.pack", "rows.look_up", "products.float32", "products.mixed16")
        yield from ((kernel, name) for kernel in plain)
        if layout.bits:
            yield "products.mixed8", name, instructions
    for dtype, kind in KINDS.items():
        yield from ((kernel, kind) for kernel in ("kv_write.kv_write", "attention_loading.load"))
        for keys, values in product(SEALED, repeat=2):
            yield "seal.kv_seal", keys, values, dtype.name
            yield "attention_sealed.sealed_load", kind, keys, values


def compile_share(part: int, parts: int) -> int:
    """Every ``parts``-th kernel from this one on; how many that are."""
    return sum(bool(entry(*kernel).address) for kernel in islice(kernels(isa.choose()), part, None, parts))


def compile_all() -> None:
    """Compile, with a process per core, and say how long it took."""
    chosen, start, parts = isa.choose(), time.perf_counter(), thread_count()
    with ProcessPoolExecutor(parts) as pool:
        count = sum(pool.map(compile_share, range(parts), [parts] * parts))
    print(f"{count} kernels for {chosen}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    compile_all()
