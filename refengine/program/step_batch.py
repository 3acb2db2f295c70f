"""The inputs of one step: which tokens, at which positions, of which sequences, reading which blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from refengine.errors import RequestError, TokenIdError
from refengine.memory import KVGroupLayout, KVLayout

A = TypeVar("A")
IndexArray = NDArray[np.int32]


@dataclass(frozen=True)
class StepInputs(Generic[A]):
    """The arrays of a step, under the field's names; ``A`` is an array, or its symbol while tracing.

    Shapes: T tokens, S sequences, R rows whose logits are wanted, one entry per pool of the KV cache (layers
    with the same attention window share their block tables).
    """

    token_ids: A  # [T]
    positions: A  # [T], position of each token in its sequence
    query_starts: A  # [S + 1], first row of each sequence, then T
    context_lens: A  # [S], positions in the cache once this step is written
    logit_rows: A  # [R], rows of T
    slot_mapping: tuple[A, ...]  # per pool [T]: block · block_size + offset
    block_tables: tuple[A, ...]  # per pool [S, M]; M covers the longest context


StepBatch = StepInputs[IndexArray]
"""A step's real arrays, all int32."""


def check_step_batch(
    batch: StepBatch,
    layout: KVLayout,
    *,
    vocabulary_size: int,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Refuse a batch that would make an op read or write outside its arrays.

    Every backend calls this (or proves the same) before any address is formed. Entries of
    ``block_tables`` are checked where some query of the sequence reads them: blocks that a window has
    passed may be named by anything, and so may exact copies of blocks that are read as sealed.

    Args:
        batch: the step.
        layout: the KV cache's pools.
        vocabulary_size: rows of the embedding.
        sizes: the most there may be of T, S and R: the plan's.

    Raises:
        TokenIdError: a token id outside the vocabulary.
        RequestError: anything else out of range or of the wrong shape.

    Clauses: BCK-6, BCK-7, BCK-8.
    """
    tokens, sequences = len(batch.token_ids), len(batch.context_lens)
    if tokens == 0 or sequences == 0:
        raise RequestError("a step needs at least one token and one sequence")
    for symbol, size in (("T", tokens), ("S", sequences), ("R", len(batch.logit_rows))):
        if size > sizes.get(symbol, size):
            raise RequestError(f"the step has {symbol} = {size}, and the plan is for {sizes[symbol]} at most")
    if not _within(batch.token_ids, vocabulary_size):
        raise TokenIdError(
            f"token ids lie between {batch.token_ids.min()} and {batch.token_ids.max()}, "
            f"but the vocabulary has {vocabulary_size} entries"
        )
    starts, stops = batch.query_starts, batch.context_lens
    lengths = starts[1:] - starts[:-1]
    cut = starts.shape == (sequences + 1,) and starts[0] == 0 and starts[-1] == tokens
    if not (cut and min(few := lengths.tolist()) >= 1 and max(few) <= tokens):
        raise RequestError(
            f"query_starts {starts.tolist()} does not cut {tokens} tokens into {sequences} parts"
        )
    if np.count_nonzero(stops < lengths):
        raise RequestError("a sequence has more tokens in the step than positions in its context")
    firsts = last = stops - lengths
    if tokens > sequences:
        last = np.repeat(firsts - starts[:-1], lengths) + np.arange(tokens, dtype=np.int32)
    if batch.positions.shape != last.shape or np.count_nonzero(batch.positions != last):
        raise RequestError("positions are not the last ones of each context")
    if not _within(batch.logit_rows, tokens):
        raise RequestError(f"logit_rows {batch.logit_rows.tolist()} lie outside the step's {tokens} tokens")
    pools, size = layout.groups, layout.block_size
    if not len(batch.slot_mapping) == len(batch.block_tables) == len(pools):
        raise RequestError(f"the KV cache has {len(pools)} pools, the step names another number")
    columns = -(-max(stops.tolist()) // size)
    for slots, tables, pool in zip(batch.slot_mapping, batch.block_tables, pools, strict=True):
        blocks = pool.num_blocks
        if slots.shape != (tokens,) or not _within(slots, blocks * size):
            raise RequestError(f"slot_mapping leaves the pool of {blocks} blocks of {size}")
        if tables.shape[0] != sequences or tables.shape[1] < columns:
            raise RequestError(f"block_tables {list(tables.shape)} are too small for {sequences} sequences")
        if not _within(tables, blocks):
            rows, entries = (_unsigned(tables) >= blocks).nonzero()
            if _are_read(entries, firsts[rows], stops[rows], pool, size).any():
                raise RequestError(f"block_tables name a block outside the pool of {blocks}")


def _are_read(
    entries: NDArray[np.intp], firsts: IndexArray, stops: IndexArray, pool: KVGroupLayout, block_size: int
) -> NDArray[np.bool_]:
    """Of entries of block tables, whether queries at positions from ``firsts`` to ``stops`` - 1 read them."""
    read: NDArray[np.bool_] = entries * block_size < stops
    if pool.window is not None:
        read &= entries >= (firsts - pool.window + 1) // block_size
    if pool.recent:  # of what is seen, the first block and those of the step's own tokens
        read &= (entries == 0) | (entries >= firsts // block_size)
    return read


def _within(values: NDArray[np.integer], end: int) -> bool:
    """Whether all lie from 0 to ``end`` - 1; where the largest is, NumPy tells sooner than how large."""
    if not len(values):
        return True
    numbers = _unsigned(values)
    return bool(numbers.item(numbers.argmax()) < end)


def _unsigned(values: NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
    """As unsigned integers, of which those below zero are the largest."""
    return values.view(f"u{values.itemsize}")
