"""``python -m refengine_numba``: compile every kernel now, so that no later start has to.

For images and for machines without a writable home: name the folder with ``REFENGINE_NUMBA_CACHE``. What is
compiled is for this processor, and for the instruction set that ``REFENGINE_NUMBA_ISA`` names, if any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, product
from typing import Any

from refengine_numba import isa
from refengine_numba.attention_arithmetic import tile_entry
from refengine_numba.attention_entry import attention_entry, merge_entry
from refengine_numba.attention_loading import load_entry
from refengine_numba.attention_sealed import sealed_load_entry
from refengine_numba.copy import take_rows_entry
from refengine_numba.elementwise import FORMULAS, elementwise_entry
from refengine_numba.entry import (
    float32_entry,
    mixed8_entry,
    mixed16_entry,
    pack_entry,
    quantize_entry,
    round_entry,
    rows_entry,
)
from refengine_numba.kv_pool import KINDS
from refengine_numba.kv_write import kv_write_entry
from refengine_numba.layout import LAYOUTS
from refengine_numba.norm import rms_norm_entry
from refengine_numba.rope import PAIRINGS, rope_entry, rope_table_entry
from refengine_numba.seal import kv_seal_entry
from refengine_numba.stage_table import run_stages
from refengine_numba.team import thread_count, together

SEALED = ("int8", "int4")
"""Formats of sealed keys and values that are worth having beforehand."""


def kernels(instructions: str) -> Iterator[Callable[[], Any]]:
    """What compiles each kernel of an instruction set, or loads it where that is done."""
    yield from (quantize_entry, round_entry, rms_norm_entry, rope_table_entry, take_rows_entry)
    yield from (attention_entry, merge_entry, partial(tile_entry, instructions))
    yield from (lambda: together, lambda: run_stages)  # done by the imports
    yield from (partial(rope_entry, pairing) for pairing in PAIRINGS)
    yield from (partial(elementwise_entry, name) for name in FORMULAS)
    for name, layout in LAYOUTS.items():
        plain = (pack_entry, rows_entry, float32_entry, mixed16_entry)
        yield from (partial(make, name) for make in plain)
        if layout.bits:
            yield partial(mixed8_entry, name, instructions)
    for dtype, kind in KINDS.items():
        yield from (partial(make, kind) for make in (kv_write_entry, load_entry))
        for keys, values in product(SEALED, repeat=2):
            yield partial(kv_seal_entry, keys, values, dtype.name)
            yield partial(sealed_load_entry, kind, keys, values)


def compile_share(part: int, parts: int) -> int:
    """Every ``parts``-th kernel from this one on; how many that are."""
    return sum(make() is not None for make in islice(kernels(isa.choose()), part, None, parts))


def compile_all() -> None:
    """Compile, with a process per core, and say how long it took."""
    chosen, start, parts = isa.choose(), time.perf_counter(), thread_count()
    with ProcessPoolExecutor(parts) as pool:
        count = sum(pool.map(compile_share, range(parts), [parts] * parts))
    print(f"{count} kernels for {chosen}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    compile_all()
