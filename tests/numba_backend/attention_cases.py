"""Sequences for the tests of attention: steps of them through the kernels, and what each query should get."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from refengine.ops import LayerCache
from refengine_numba import entries, isa
from refengine_numba.attention_arguments import attention_arguments
from refengine_numba.attention_sizes import workspace_bytes

U = 2.0**-24
"""Unit roundoff of float32."""

Run = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """Sequences: keys and values of all their positions, as stored, and a query for each.

    Attributes:
        q: float32, for each sequence [n, H, D].
        k: of the cache's dtype, for each [n, G, D].
        v: the same.
        block_size: of the cache.
        window: of attention.
        softcap: of attention.
    """

    q: list[np.ndarray]
    k: list[np.ndarray]
    v: list[np.ndarray]
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return float(np.float32(self.q[0].shape[2] ** -0.5))


def case(
    lengths: list[int], heads: int, kv_heads: int, size: int, dtype: type = np.float16, **kws: object
) -> Case:
    rng = np.random.default_rng([*lengths, heads, size])
    q = [rng.standard_normal((n, heads, size)).astype(np.float32) for n in lengths]
    k, v = ([rng.standard_normal((n, kv_heads, size)).astype(dtype) for n in lengths] for _ in range(2))
    return Case(q, k, v, **kws)


def attend(
    case: Case,
    pieces: list[tuple[int, int, int]],
    call: Run,
    *,
    threads: int = 1,
    at_once: bool = False,
    seed: int = 0,
    fill: float = np.nan,
    path: str | None = None,
) -> list[np.ndarray]:
    """One step: of each piece (sequence, start, stop) the queries, in a cache whose other memory is ``fill``.

    Blocks lie at random, in a pool in which other bytes lie between them.
    """
    rng, size = np.random.default_rng(seed), case.block_size
    columns = max(-(-stop // size) for _, _, stop in pieces) + 1
    first = case.k[0]
    pool = np.full((len(pieces) * columns + 3, 3, size, *first.shape[1:]), fill, first.dtype)
    cache = LayerCache(pool[:, 0], pool[:, 2])
    free = iter(rng.permutation(len(pool)))
    tables = rng.integers(-(2**31), 2**31, (len(pieces), columns)).astype(np.int32)
    for row, (sequence, start, stop) in zip(tables, pieces, strict=True):
        seen = 0 if case.window is None else max(0, start - case.window + 1)
        for column in range(seen // size, -(-stop // size)):
            row[column] = next(free)
        for position in range(seen, stop):
            block = row[position // size]
            for blocks, new in ((cache.keys, case.k), (cache.values, case.v)):
                blocks[block, position % size] = new[sequence][position]
    starts = np.cumsum([0] + [stop - start for _, start, stop in pieces]).astype(np.int32)
    contexts = np.array([stop for _, _, stop in pieces], np.int32)
    q = np.concatenate([case.q[sequence][start:stop] for sequence, start, stop in pieces])
    y = np.full_like(q, np.nan)
    words = workspace_bytes(len(q), q.shape[1], first.shape[1], q.shape[2], threads) // 4
    arguments = attention_arguments(
        q, cache, tables, starts, contexts, y, np.full(words, np.nan, np.float32).view(np.uint8),
        isa=path or isa.choose(), threads=threads, scale=case.scale, window=case.window, softcap=case.softcap,
    )  # fmt: skip
    call(entries.entry("attention_entry.attention"), arguments, threads, at_once=at_once)
    call(entries.entry("attention_entry.merge"), arguments, threads, at_once=at_once)
    return [y[a:b] for a, b in pairwise(starts)]


def whole(case: Case) -> list[tuple[int, int, int]]:
    return [(sequence, 0, len(q)) for sequence, q in enumerate(case.q)]


def expected(case: Case, sequence: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """One query in float64, [H, D], and the bound of clauses ATT-4 and ATT-5."""
    q = case.q[sequence][position].astype(np.float64)
    seen = slice(0 if case.window is None else max(0, position - case.window + 1), position + 1)
    y, bound = np.zeros(q.shape), np.zeros(q.shape)
    for head in range(len(q)):
        group = len(q) // case.k[0].shape[1]
        k, v = (x[sequence][seen, head // group].astype(np.float64) for x in (case.k, case.v))
        score = case.scale * (k @ q[head])
        slip = (q.shape[1] + 2) * U * case.scale * (np.abs(k) @ np.abs(q[head]))
        if case.softcap is not None:
            score = case.softcap * np.tanh(score / case.softcap)
            slip += 12 * U * np.abs(score)
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        y[head] = weight @ v
        relative = 2 * slip.max() + (8 * np.ptp(score) + 20 * len(score) + 10) * U
        bound[head] = math.expm1(relative) * (weight @ np.abs(v))
    return y, bound
