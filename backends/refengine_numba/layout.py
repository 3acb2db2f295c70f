"""How weight matrices lie for the kernels: tiles of sixteen rows, whose bytes change places.

A matrix [N, K] is cut into tiles of 16 rows and those into *cells*: the 16 rows' blocks of one block
column. A cell holds exactly the bytes of its 16 stored blocks, bit by bit, in another order: rows are the
lanes of vectors. So nothing is lost, and a repacked matrix has the bytes of the stored one, with N rounded
up to 16 (rows of zero bytes). Cells follow each other along a row, tiles from the top down: a kernel reads
one stream.

Below, a *word* of a row is four bytes, one each for four consecutive weights, and a *vector* is 64 bytes, a
word for each of 16 rows. *Quarter vectors* of 16 float16 have 32 bytes.

Per 32 weights of a row, one of:

- ``bytes``: 8 vectors; byte j of word i is weight 4i + j, unsigned (of Q8_0, 128 more than the stored int8).
- ``nibbles``: 4 vectors; byte j of word i holds weight 4i + j in its low half, weight 16 + 4i + j in its high
  half (for K-quants, too, whose stored order is another).
- ``fifth``: 1 vector after ``nibbles``; bit 8j + i of a row's word is the fifth bit of weight 4i + j.
- ``high``: 2 vectors after ``nibbles``; bits 8j + 2i and 8j + 2i + 1 of a row's word h are the fifth and
  sixth bit of weight 16h + 4i + j.

In front of them the cell's scales:

- one per 32 weights, ``d``, perhaps ``m``: 16 float16 each.
- int4_g32 and its kin: ``d`` (16 float16), then ``z`` (16 unsigned bytes), of all the cell's weights.
- Q4_K, Q5_K: ``d``, ``dmin`` (16 float16 each), then 3 vectors. Of a row's three words, bits 4g..4g + 3 of
  the first are the low half of s[g], of the second that of m[g]; in the third, bits 2g and 2g + 1 are the
  high bits of s[g], bits 16 + 2g and 17 + 2g those of m[g].
- Q6_K: ``d`` (16 float16), then for each 32 weights 16 pairs (s[2g], s[2g + 1]) of int8.

Encodings without blocks have a cell per column: 16 weights as stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from refengine.quantizer import encoding

TILE_ROWS = 16
"""Rows of a tile."""

GROUP = 32
"""Weights of a row that kernels take at a time; activations are quantized by as many."""


@dataclass(frozen=True)
class Layout:
    """Of an encoding: what a cell holds.

    Attributes:
        encoding: its name.
        bits: of a weight's integer; 0 for encodings without blocks.
        zero: what is taken from the integer, weight = scale · (integer - zero); 0 where cells hold their own.
        scales: ``half`` (d), ``pair`` (d, m), ``zero_point`` (d, z), ``six_bit`` (Q4_K, Q5_K), ``eight_bit``
            (Q6_K) or ``none``.
        scale_bytes: in front of a cell.
        group_bytes: of 32 weights of 16 rows, beside the scales; of one column for encodings without blocks.
    """

    encoding: str
    bits: int
    zero: int
    scales: str
    scale_bytes: int
    group_bytes: int

    @property
    def block_size(self) -> int:
        """Weights of a row in a cell."""
        return encoding(self.encoding).block_size

    @property
    def cell_bytes(self) -> int:
        """Bytes of a cell: those of 16 stored blocks."""
        return TILE_ROWS * encoding(self.encoding).block_bytes

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a repacked matrix; ValueError unless its rows are whole blocks."""
        return tiles(rows) * TILE_ROWS * encoding(self.encoding).row_bytes(columns)


def tiles(rows: int) -> int:
    """Tiles of so many rows."""
    return -(-rows // TILE_ROWS)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.encoding: layout
        for layout in (
            Layout("q4_0", 4, 8, "half", 32, 256),
            Layout("q4_1", 4, 0, "pair", 64, 256),
            Layout("q5_0", 5, 16, "half", 32, 320),
            Layout("q5_1", 5, 0, "pair", 64, 320),
            Layout("q8_0", 8, 128, "half", 32, 512),
            Layout("q4_k", 4, 0, "six_bit", 256, 256),
            Layout("q5_k", 5, 0, "six_bit", 256, 320),
            Layout("q6_k", 6, 32, "eight_bit", 288, 384),
            Layout("int4_g32", 4, 0, "zero_point", 48, 256),
            Layout("int4_g64", 4, 0, "zero_point", 48, 256),
            Layout("int4_g128", 4, 0, "zero_point", 48, 256),
            Layout("int8_g32", 8, 0, "zero_point", 48, 512),
            Layout("int8_g64", 8, 0, "zero_point", 48, 512),
            Layout("int8_g128", 8, 0, "zero_point", 48, 512),
            Layout("f16", 0, 0, "none", 0, 32),
            Layout("bf16", 0, 0, "none", 0, 32),
            Layout("f32", 0, 0, "none", 0, 64),
        )
    }
)
"""Every encoding that has kernels; immutable."""
