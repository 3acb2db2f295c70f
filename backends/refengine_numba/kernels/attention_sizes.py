"""The sizes of attention, which are ``refengine_numba.attention_sizes``, as parts of compiled code."""

from __future__ import annotations

from refengine_numba.attention_sizes import (
    BLOCK,
    OWN,
    PAIRS,
    SLOTS,
    TILE,
    TILE_WORDS,
    TOP,
    Sizes,
    blocks_of,
    parts_of,
    scratch_size,
    slot_rows,
    sums_size,
)
from refengine_numba.kernels.compilation import part

__all__ = [
    "BLOCK",
    "OWN",
    "PAIRS",
    "SLOTS",
    "TILE",
    "TILE_WORDS",
    "TOP",
    "Sizes",
    "blocks_of",
    "parts_of",
    "scratch_size",
    "slot_rows",
    "sums_size",
]

for size in (blocks_of, parts_of, scratch_size, slot_rows, sums_size):
    part(size)
