"""Sequences in a paged cache, and the smallest program that attends over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.memory import KVGroupLayout, KVLayout
from refengine.ops import FloatArray
from refengine.program import StepBatch, Tracer, symbolic_inputs
from refengine_conformance.subject import Subject, Weight, activation, sealed_formats

Tables = Sequence[Sequence[int]]
"""The blocks of each sequence, in order of position."""

SPARE_BLOCKS = 3
"""Blocks of a pool that no sequence holds."""


@dataclass(frozen=True)
class Piece:
    """Positions ``start … stop - 1`` of a sequence: what it computes in one step."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Sequences:
    """Every token's query, key and value, and how they attend.

    Attributes:
        lengths: tokens of each sequence.
        q, k, v: float32 ``[N, H, D]``, ``[N, G, D]``, ``[N, G, D]``: sequence after sequence. A token's id is
            its row.
        block_size: positions per block.
        scale, window, softcap: of the attention.
        sealed: names of the formats of keys and of values, where the cache is sealed.
        dtype: of the keys and values of a plain cache, ``None`` for the policy's.
        damaged: rows whose keys and values are not finite, all of each.
        damage: what they are then: NaN or infinity.
    """

    lengths: tuple[int, ...]
    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    block_size: int = 4
    scale: float = 0.5
    window: int | None = None
    softcap: float | None = None
    sealed: tuple[str, str] | None = None
    dtype: np.dtype[np.floating] | None = None
    damaged: tuple[int, ...] = ()
    damage: float = math.nan

    @property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Queries, keys and values."""
        return self.q, self.k, self.v

    @property
    def starts(self) -> list[int]:
        """The row at which each sequence begins, and the end."""
        return [0, *np.cumsum(self.lengths).tolist()]

    @property
    def blocks(self) -> list[int]:
        """Blocks that each sequence needs."""
        return [-(-length // self.block_size) for length in self.lengths]

    @property
    def num_blocks(self) -> int:
        """Blocks of a pool that holds all of them and some more."""
        return sum(self.blocks) + SPARE_BLOCKS

    @property
    def whole(self) -> list[Piece]:
        """Each sequence in one piece."""
        return [Piece(s, 0, length) for s, length in enumerate(self.lengths)]

    def rows(self, sequence: int) -> slice:
        """The rows of a sequence."""
        return slice(self.starts[sequence], self.starts[sequence + 1])

    def first_seen(self, position: int) -> int:
        """The first position that a query sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def tables(self, order: Sequence[int] | None = None) -> list[list[int]]:
        """Block tables that take the pool's blocks in this order."""
        order = list(range(self.num_blocks) if order is None else order)
        ends = np.cumsum(self.blocks).tolist()
        return [order[end - count : end] for count, end in zip(self.blocks, ends, strict=True)]


class Attending:
    """A subject's attention over given sequences: a cache, and a program that writes into it and reads it."""

    def __init__(self, subject: Subject, sequences: Sequences) -> None:
        self.sequences = case = sequences
        tracer = Tracer()
        inputs = symbolic_inputs(tracer, kv_groups=1 if case.sealed is None else 2)
        q, k, v = (activation(tracer, inputs, n, getattr(case, n).shape) for n in "qkv")
        weights = {n: Weight(getattr(case, n).reshape(len(case.q), -1)).tensor(n) for n in "qkv"}
        if case.damaged:
            # A weight must be finite, so the damage is computed: 4 · the largest number is infinity, and
            # 0 · infinity is NaN. To the other rows zero is added.
            flags = np.zeros(case.k.shape, np.float32)
            flags[list(case.damaged)] = 4
            weights["damage"] = Weight(flags.reshape(len(flags), -1)).tensor("damage")
            damage = activation(tracer, inputs, "damage", flags.shape)
            damage = tracer.scale(damage, factor=float(np.finfo(subject.policy.activations).max))
            if np.isnan(case.damage):
                damage = tracer.scale(damage, factor=0.0)
            k, v = tracer.add(k, damage), tracer.add(v, damage)
        tokens, kv_heads, size = case.k.shape
        state = tracer.symbol("layers.0.cache", "state", ("B", "P", kv_heads, size))
        ends = (inputs.query_starts, inputs.context_lens)
        options = {"scale": case.scale, "window": case.window, "softcap": case.softcap}
        pool = KVGroupLayout(
            case.window,
            ((0, kv_heads, size),),
            case.num_blocks,
            sealed_formats(case.sealed, subject.kv_format),
        )
        if case.sealed is None:
            pools: tuple[KVGroupLayout, ...] = (pool,)
            cache = tracer.kv_write(state, k, v, inputs.slot_mapping[0])
            y = tracer.attention(q, cache, inputs.block_tables[0], *ends, **options)
        else:
            pools = (pool, replace(pool, sealed=None, recent=True))
            exact = tracer.symbol("layers.0.exact", "state", ("B", "P", kv_heads, size))
            exact = tracer.kv_write(exact, k, v, inputs.slot_mapping[1])
            cache = tracer.kv_seal(state, exact, *inputs.block_tables, *ends)
            y = tracer.sealed_attention(q, cache, exact, *inputs.block_tables, *ends, **options)
        program = tracer.finish(tracer.take_rows(tracer.merge_heads(y), inputs.logit_rows))
        layout = KVLayout(case.block_size, case.dtype or subject.policy.kv, pools)
        self._executable = subject.compile(program, weights, tokens, layout)

    def step(
        self,
        pieces: Sequence[Piece],
        tables: Tables | None = None,
        *,
        copies: Tables | None = None,
        released: int = -1,
    ) -> list[FloatArray]:
        """Run pieces in one step, through these tables; gives the result ``[t, H, D]`` of each.

        Beside a sealed cache, ``copies`` are the tables of exact copies. Unless they are given, the copy of a
        block lies elsewhere in its pool, and ``released`` stands for those that no query needs.
        """
        case = self.sequences
        tables = case.tables() if tables is None else tables
        if copies is None and case.sealed is not None:
            copies = [
                [] if piece is None else _copies(case, piece, table, released)
                for piece, table in _by_sequence(pieces, tables)
            ]
        batch = _step_batch(case, pieces, [tables] if copies is None else [tables, copies])
        with np.errstate(all="ignore"):  # damage overflows on purpose
            y = self._executable.run(batch)
        return np.split(y.reshape(-1, *case.q.shape[1:]), batch.query_starts[1:-1])

    def steps(
        self, cut: Sequence[Sequence[Piece]], tables: Tables | None = None, *, released: int = -1
    ) -> list[FloatArray]:
        """Run sequences piece by piece, the next piece of every one in each step; gives each whole result."""
        results: dict[int, list[FloatArray]] = {}
        for step in itertools.zip_longest(*cut):
            pieces = [piece for piece in step if piece is not None]
            for piece, y in zip(pieces, self.step(pieces, tables, released=released), strict=True):
                results.setdefault(piece.sequence, []).append(y)
        return [np.concatenate(parts) for _, parts in sorted(results.items())]

    def spoil(self, sequence: int, blocks: Iterable[int]) -> None:
        """Fill blocks with the tokens of a sequence that is one block long."""
        for block in blocks:
            tables = [[block]] * (sequence + 1)
            self.step([Piece(sequence, 0, self.sequences.lengths[sequence])], tables)

    def overwrite_copies(self, sequence: int, blocks: Iterable[int]) -> None:
        """Write other numbers over the exact copies of some of a sequence's blocks."""
        case = self.sequences
        spare, longest = case.num_blocks - 1, int(np.argmax(case.lengths))
        piece = Piece(longest, 0, min(case.block_size, case.lengths[longest]))
        for block in blocks:
            copy = _copy(case, case.tables()[sequence][block])
            self.step([piece], [[spare]] * len(case.lengths), copies=[[copy]] * len(case.lengths))


def _by_sequence(pieces: Sequence[Piece], tables: Tables) -> Iterator[tuple[Piece | None, Sequence[int]]]:
    """Each sequence's piece in a step, if it has one, and its table."""
    for sequence, table in enumerate(tables):
        yield next((piece for piece in pieces if piece.sequence == sequence), None), table


def _step_batch(case: Sequences, pieces: Sequence[Piece], tables: Sequence[Tables]) -> StepBatch:
    pools = [_pool_arrays(case, pieces, [pool[piece.sequence] for piece in pieces]) for pool in tables]
    rows = [np.arange(p.start, p.stop) + case.starts[p.sequence] for p in pieces]
    ends = np.cumsum([0, *(p.stop - p.start for p in pieces)])
    return StepBatch(
        token_ids=np.concatenate(rows).astype(np.int32),
        positions=np.concatenate([np.arange(p.start, p.stop) for p in pieces]).astype(np.int32),
        query_starts=ends.astype(np.int32),
        context_lens=np.array([p.stop for p in pieces], np.int32),
        logit_rows=np.arange(ends[-1], dtype=np.int32),
        slot_mapping=tuple(slots for slots, _ in pools),
        block_tables=tuple(padded for _, padded in pools),
    )


def _pool_arrays(
    case: Sequences, pieces: Sequence[Piece], tables: Tables
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Slots and block tables of a step in one pool."""
    padded = np.full((len(pieces), max(map(len, tables))), -1, np.int32)
    slots = []
    for row, piece, blocks in zip(padded, pieces, tables, strict=True):
        table = np.array(blocks, np.int32)
        row[: len(table)] = table
        positions = np.arange(piece.start, piece.stop)
        slots.append(table[positions // case.block_size] * case.block_size + positions % case.block_size)
    return np.concatenate(slots).astype(np.int32), padded


def _copies(case: Sequences, piece: Piece, table: Sequence[int], released: int) -> list[int]:
    """Where the exact copies of a sequence's blocks lie, those that the queries of a piece need."""
    own = range(piece.start // case.block_size, -(-piece.stop // case.block_size))
    first = 0 if case.first_seen(piece.start) < case.block_size else None
    return [
        _copy(case, block) if index in own or index == first else released
        for index, block in enumerate(table)
    ]


def _copy(case: Sequences, block: int) -> int:
    """Where the exact copy of a block lies."""
    return case.num_blocks - 1 - block


HEADS = st.sampled_from([(1, 1, 8), (4, 2, 24), (6, 3, 5), (3, 3, 16), (4, 1, 32)])
"""Query heads, key heads and head size."""

LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=3)
"""Up to three sequences, of one token and of several blocks."""

WINDOWS = st.sampled_from([None, 1, 2, 5, 1000])

CAPS = st.sampled_from([None, 2.0])


@st.composite
def sequences(
    draw: st.DrawFn,
    lengths: st.SearchStrategy[list[int]] = LENGTHS,
    heads: st.SearchStrategy[tuple[int, int, int]] = HEADS,
    window: st.SearchStrategy[int | None] = WINDOWS,
    softcap: st.SearchStrategy[float | None] = CAPS,
) -> Sequences:
    """Random sequences that attend in any way."""
    drawn = draw(lengths)
    query_heads, kv_heads, size = draw(heads)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, k, v = (
        rng.standard_normal((sum(drawn), count, size)).astype(np.float32)
        for count in (query_heads, kv_heads, kv_heads)
    )
    return Sequences(
        lengths=tuple(drawn),
        q=q,
        k=k,
        v=v,
        block_size=draw(st.sampled_from([1, 3, 4, 16])),
        scale=draw(st.sampled_from([0.5, 0.125, 1.0])),
        window=draw(window),
        softcap=draw(softcap),
    )


@st.composite
def cuts(draw: st.DrawFn, lengths: Sequence[int]) -> list[list[Piece]]:
    """Each sequence in pieces, in order."""
    inner = [draw(st.sets(st.integers(1, n - 1), max_size=4)) if n > 1 else set() for n in lengths]
    return [
        [Piece(s, start, stop) for start, stop in itertools.pairwise([0, *sorted(edges), length])]
        for s, (edges, length) in enumerate(zip(inner, lengths, strict=True))
    ]
