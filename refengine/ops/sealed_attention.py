"""Attention over a KV cache whose full blocks are sealed: quantized once, from exact copies, and then read.

Beside the sealed blocks, a sequence has exact copies of two kinds of block: its first, which every query
leans on (Xiao et al., 2023, arXiv:2309.17453, attention sinks), and the one it is writing. A query at
position ``p`` reads position ``j`` from an exact copy where ``j`` lies in the first block, or in the block of
``p``, and else as sealed. So what it reads depends on positions alone, and not on how the sequence was cut
into steps: in a prompt computed at once, too, every block but a query's own is read as sealed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.attention import (
    HEAD_TILE,
    KEY_TILE,
    KeyTile,
    LayerCache,
    Tiles,
    attend,
    attend_workspace,
    gather,
    value_width,
)
from refengine.ops.registry import op
from refengine.ops.scratch import Scratch, aligned

SEAL_POSITIONS = 64
"""Positions sealed at once, or one block, where that is longer: bounds the working memory."""

FORMAT_BYTES = 36
"""Working memory of a format at most, per number that it seals or opens."""

Bytes = NDArray[np.uint8]
Positions = NDArray[np.integer]


class BlockFormat(Protocol):
    """How keys, or values, of one layer lie in a sealed block; see ``refengine.quantizer``."""

    def seal(self, x: FloatArray, out: Bytes, workspace: Scratch) -> None:
        """Quantize blocks ``x`` ``[n, P, G, D]`` into bytes ``out`` ``[n, nbytes]``."""
        ...

    def open(self, data: Bytes, out: FloatArray, workspace: Scratch, heads: slice = ...) -> None:
        """The numbers ``out`` ``[n, P, g, D]`` of some heads of blocks ``data`` ``[n, nbytes]``."""
        ...


class SealedLayerCache(NamedTuple):
    """One layer's sealed ``keys`` and ``values``, each ``[blocks, nbytes]``, and their formats."""

    keys: Bytes
    values: Bytes
    formats: tuple[BlockFormat, BlockFormat]


def _seal_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    """The numbers, their bytes (at most as many as of float32), and what a format takes."""
    exact = shapes[1]
    if exact is None:
        return 0
    _, size, kv_heads, head_size = exact
    numbers = max(SEAL_POSITIONS, size) * kv_heads * head_size
    return aligned(itemsize * numbers) + aligned(4 * numbers) + FORMAT_BYTES * aligned(numbers)


@op(
    "cache[B, P, G, D], exact[C, P, G, D], block_tables[S, M], exact_tables[S, N], query_starts[S1], "
    "context_lens[S] -> [B, P, G, D]",
    sharing="state",
    workspace=_seal_workspace,
)
def kv_seal(
    cache: SealedLayerCache,
    exact: LayerCache,
    block_tables: IndexArray,
    exact_tables: IndexArray,
    query_starts: IndexArray,
    context_lens: IndexArray,
    *,
    scratch: Scratch | None = None,
) -> SealedLayerCache:
    """Quantize every block that the step completes, from its exact copy; gives the changed cache.

    Of each sequence, these are the blocks whose last position is one of the step's.

    Clauses: SKV-6, SKV-9.
    """
    scratch = scratch or Scratch()
    _, size, kv_heads, head_size = exact.keys.shape
    first = context_lens - np.diff(query_starts)
    completed = [
        (int(exact_tables[s, block]), int(block_tables[s, block]))
        for s in range(len(context_lens))
        for block in range(first[s] // size, context_lens[s] // size)
    ]
    at_once = max(1, SEAL_POSITIONS // size)
    for top in range(0, len(completed), at_once):
        part = completed[top : top + at_once]
        for copies, sealed, form in zip(exact, cache[:2], cache.formats, strict=True):
            with scratch.frame():
                x = scratch.empty((len(part), size, kv_heads, head_size), copies.dtype)
                data = scratch.empty((len(part), sealed.shape[1]), np.uint8)
                for row, (source, _) in zip(x, part, strict=True):
                    row[...] = copies[source]
                form.seal(x, data, scratch)
                for row, (_, target) in zip(data, part, strict=True):
                    sealed[target] = row
    return cache


def _attention_workspace(
    shapes: Sequence[tuple[int, ...] | None], attributes: Mapping[str, Any], itemsize: int
) -> int:
    """That of ``attend``; and the blocks that meet a tile: their bytes, the numbers of some heads, scales."""
    q, _, exact = shapes[:3]
    if q is None or exact is None:
        return 0
    _, size, kv_heads, head_size = exact
    numbers = (KEY_TILE + 2 * (size - 1)) * head_size
    opened = aligned(numbers * min(kv_heads, HEAD_TILE) * itemsize)
    return attend_workspace((q, exact), attributes, itemsize) + aligned(4 * numbers * kv_heads) + 2 * opened


@op(
    "q[T, H, D], cache[B, P, G, D], exact[C, P, G, D], block_tables[S, M], exact_tables[S, N], "
    "query_starts[S1], context_lens[S] -> [T, H, D]",
    workspace=_attention_workspace,
)
def sealed_attention(
    q: FloatArray,
    cache: SealedLayerCache,
    exact: LayerCache,
    block_tables: IndexArray,
    exact_tables: IndexArray,
    query_starts: IndexArray,
    context_lens: IndexArray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: FloatArray | None = None,
    scratch: Scratch | None = None,
) -> FloatArray:
    """``attention`` that reads the first block and a query's own from exact copies, others as sealed.

    Of a sequence's row of ``exact_tables``, the entries of the blocks that hold the step's own positions are
    read, and the first one where some query sees it. The others may be anything.

    Clauses: SKV-7, SKV-8, SKV-9, SKV-10, SKV-11.
    """
    if out is None:
        out = np.empty_like(q)
    scratch = scratch or Scratch()
    for sequence, context in enumerate(context_lens):
        start, stop = int(query_starts[sequence]), int(query_starts[sequence + 1])
        attend(
            q[start:stop],
            int(context) - (stop - start),
            sealed_tiles(cache, exact, block_tables[sequence], exact_tables[sequence], q.dtype, scratch),
            out[start:stop],
            kv_heads=exact.keys.shape[2],
            scale=scale,
            window=window,
            softcap=softcap,
            scratch=scratch,
        )
    out += 0  # where a tile shows a query nothing, zeros are added: so that zero has one sign
    return out


def sealed_tiles(
    cache: SealedLayerCache,
    exact: LayerCache,
    block_table: IndexArray,
    exact_table: IndexArray,
    dtype: np.dtype[np.floating],
    scratch: Scratch,
) -> Tiles:
    """The tiles of one sequence, two for each stretch of ``KEY_TILE`` positions.

    First what queries read alike, the first block exactly and others as sealed; then exact copies, of which
    each query sees its own block.
    """
    _, block_size, _, size = exact.keys.shape

    def others(keys: Positions, queries: Positions, out: NDArray[np.bool_]) -> None:
        np.less(keys, queries // block_size * block_size, out=out)

    def own(keys: Positions, queries: Positions, out: NDArray[np.bool_]) -> None:
        np.greater_equal(keys, queries // block_size * block_size, out=out)

    def tiles(first: int, position: int, last: int, heads: slice) -> Iterator[KeyTile]:
        keys = scratch.empty((KEY_TILE, heads.stop - heads.start, size), dtype)
        values = scratch.empty((KEY_TILE, heads.stop - heads.start, value_width(size)), dtype)
        first_own, last_own = (p // block_size * block_size for p in (position, last - 1))
        for start in range(first // KEY_TILE * KEY_TILE, last, KEY_TILE):

            def within(a: int, b: int, start: int = start) -> range:
                return range(max(a, first, start), min(b, last, start + KEY_TILE))

            def copy(positions: range, start: int = start) -> None:
                rows = slice(positions.start - start, positions.stop - start)
                gather(exact.keys[:, :, heads], exact_table, positions, keys[rows])
                gather(exact.values[:, :, heads], exact_table, positions, values[rows, :, :size])

            sink, sealed = within(0, min(block_size, last_own)), within(block_size, last_own)
            if sink or sealed:
                _clear(keys, values)
                if sink:
                    copy(sink)
                if sealed:
                    rows = slice(sealed.start - start, sealed.stop - start)
                    stored, forms = (cache.keys, cache.values), cache.formats
                    for blocks, form, out in zip(stored, forms, (keys, values[:, :, :size]), strict=True):
                        _open(blocks, form, block_table, sealed, block_size, heads, out[rows], scratch)
                yield KeyTile(start, keys, values, own)
            if copies := within(first_own, last):
                _clear(keys, values)
                copy(copies)
                yield KeyTile(start, keys, values, others)

    return tiles


def _clear(keys: FloatArray, values: FloatArray) -> None:
    """Zeros, and ones to sum the weights."""
    keys.fill(0)
    values.fill(0)
    values[:, :, keys.shape[2]] = 1


def _open(
    stored: Bytes,
    form: BlockFormat,
    table: IndexArray,
    positions: range,
    block_size: int,
    heads: slice,
    out: FloatArray,
    scratch: Scratch,
) -> None:
    """Some heads of sealed positions, ``out`` ``[len(positions), g, D]``."""
    blocks = range(positions.start // block_size, -(-positions.stop // block_size))
    with scratch.frame():
        data = scratch.empty((len(blocks), stored.shape[1]), np.uint8)
        for row, block in zip(data, table[blocks.start : blocks.stop], strict=True):
            row[...] = stored[block]
        opened = scratch.empty((len(blocks), block_size, *out.shape[1:]), out.dtype)
        form.open(data, opened, scratch, heads)
        start = positions.start - blocks.start * block_size
        out[...] = opened.reshape(-1, *out.shape[1:])[start : start + len(positions)]
