"""Paged attention against a naive loop, and what it must not see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine import ops
from refengine.ops.attention import KEY_TILE, QUERY_TILE

U = 2.0**-24


@dataclass(frozen=True)
class Sequences:
    """Random sequences in a cache of NaN, their blocks shuffled: whatever is read by mistake shows."""

    heads: int
    kv_heads: int
    size: int
    block_size: int
    contexts: tuple[int, ...]
    seed: int = 0

    def build(
        self,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], ops.LayerCache, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        needed = [-(-n // self.block_size) for n in self.contexts]
        order = rng.permutation(sum(needed) + 3)
        tables = np.full((len(needed), max(needed)), -1, np.int32)
        shape = (len(order), self.block_size, self.kv_heads, self.size)
        cache = ops.LayerCache(np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32))
        q, k, v = (
            [rng.standard_normal((n, heads, self.size)).astype(np.float32) for n in self.contexts]
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        taken = 0
        for s, blocks in enumerate(needed):
            tables[s, :blocks] = order[taken : taken + blocks]
            taken += blocks
            positions = np.arange(self.contexts[s])
            slots = tables[s, positions // self.block_size] * self.block_size + positions % self.block_size
            ops.kv_write(cache, k[s], v[s], slots)
        return q, k, v, cache, tables


def naive(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None, cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of all queries, one at a time in float64, and a bound on a float32 result's error.

    A score errs by (D + 4)·u·Σ|scale·q·k| =: e (the cap's tanh adds 4u of the score and no more); each weight
    then by a factor within 1 ± (e + 4u); the sums over n keys add (n + 2)·u. For every tile of keys, a larger
    maximum may shrink the sums: an exponential and a product, 10·u. Numerator and denominator both.
    """
    y, bound = np.zeros(q.shape), np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(q.shape[1]):
            keys, values = (a[first : t + 1, h // group].astype(np.float64) for a in (k, v))
            score = keys @ q[t, h].astype(np.float64) * scale
            error = (q.shape[2] + 4) * U * (np.abs(keys) @ np.abs(q[t, h]).astype(np.float64)).max() * scale
            if cap is not None:
                score = cap * np.tanh(score / cap)
                error += 8 * U * np.abs(score).max()
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            y[t, h] = weight @ values
            rounded = len(keys) + 4 + 10 * (t // KEY_TILE - first // KEY_TILE)
            relative = 2 * (2 * error + 8 * U * (1 + np.ptp(score)) + rounded * U)
            bound[t, h] = relative * (weight @ np.abs(values))
    return y, bound


SHAPES = st.sampled_from([(1, 1, 8), (4, 2, 24), (6, 6, 40), (9, 3, 64), (4, 1, 96)])


@given(
    SHAPES,
    st.sampled_from([1, 3, 16]),
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.sampled_from([None, 1, 5, 16, 1000]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_attention_is_softmax_over_what_each_query_sees(
    shape: tuple[int, int, int],
    block_size: int,
    contexts: list[int],
    window: int | None,
    cap: float | None,
    seed: int,
) -> None:
    """Ragged batches, grouped heads, odd sizes, any block size, windows and caps: the naive loop's result."""
    case = Sequences(*shape, block_size, tuple(contexts), seed)
    q, k, v, cache, tables = case.build()
    scale = 1 / math.sqrt(case.size)
    starts = np.cumsum([0, *contexts])
    y = ops.attention(
        np.concatenate(q), cache, tables, starts, np.array(contexts), scale=scale, window=window, softcap=cap
    )
    for s, start in enumerate(starts[:-1]):
        expected, bound = naive(q[s], k[s], v[s], scale, window, cap)
        assert (np.abs(y[start : start + contexts[s]] - expected) <= bound).all()


@pytest.mark.parametrize(("window", "cap"), [(None, None), (250, None), (None, 2.0)])
@pytest.mark.parametrize("trend", [0.0, 0.02, -0.02])
def test_sums_over_several_tiles_are_right(window: int | None, cap: float | None, trend: float) -> None:
    """Where scores rise from tile to tile, what was summed shrinks; where they fall, it stays."""
    lengths = (2 * KEY_TILE + 40, KEY_TILE)
    case = Sequences(4, 2, 24, block_size=16, contexts=lengths)
    q, k, v, cache, tables = case.build()
    for s, length in enumerate(lengths):
        q[s][..., 0] = 1
        k[s][..., 0] = trend * np.arange(length, dtype=np.float32)[:, None] / 0.2
        slots = tables[s, np.arange(length) // 16] * 16 + np.arange(length) % 16
        ops.kv_write(cache, k[s], v[s], slots)
    starts = np.cumsum([0, *lengths])
    y = ops.attention(
        np.concatenate(q), cache, tables, starts, np.array(lengths), scale=0.2, window=window, softcap=cap
    )
    for s, start in enumerate(starts[:-1]):
        expected, bound = naive(q[s], k[s], v[s], 0.2, window, cap)
        assert (np.abs(y[start : start + lengths[s]] - expected) <= bound).all()


def test_a_cache_may_lie_in_strides() -> None:
    """Blocks between which other memory lies give the bits of blocks side by side; that memory is not touched."""
    case = Sequences(4, 2, 24, block_size=4, contexts=(30,))
    q, k, v, cache, tables = case.build()
    memory = np.full((len(cache.keys), 5, *cache.keys.shape[1:]), np.nan, np.float32)
    strided = ops.LayerCache(memory[:, 1], memory[:, 3])
    slots = tables[0, np.arange(30) // 4] * 4 + np.arange(30) % 4
    assert ops.kv_write(strided, k[0], v[0], slots) is strided
    arguments = (tables, np.array([0, 30]), np.array([30]))
    expected = ops.attention(q[0], cache, *arguments, scale=0.3)
    assert np.array_equal(ops.attention(q[0], strided, *arguments, scale=0.3), expected)
    assert np.isnan(memory[:, [0, 2, 4]]).all()


def test_keys_in_half_precision_are_read_as_they_are() -> None:
    """A cache of another dtype gives what its numbers give in the queries' dtype."""
    case = Sequences(4, 2, 24, block_size=4, contexts=(30,))
    q, _, _, cache, tables = case.build()
    half = ops.LayerCache(*(np.nan_to_num(array).astype(np.float16) for array in cache))
    same = ops.LayerCache(*(array.astype(np.float32) for array in half))
    arguments = (tables, np.array([0, 30]), np.array([30]))
    y = ops.attention(q[0], half, *arguments, scale=0.3)
    assert y.dtype == np.float32
    assert np.array_equal(y, ops.attention(q[0], same, *arguments, scale=0.3))


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 1, 256), (2, 2, 24)])
def test_bits_do_not_depend_on_how_a_sequence_is_cut(shape: tuple[int, int, int], window: int | None) -> None:
    """Any piece of the queries, alone or beside another sequence, gives the bits of the whole."""
    length = max(KEY_TILE + 60, QUERY_TILE + 3)
    case = Sequences(*shape, block_size=16, contexts=(length, 37))
    q, _, _, cache, tables = case.build()
    scale = 0.125

    def attend(rows: list[slice]) -> np.ndarray:
        lengths = [r.stop - r.start for r in rows]
        return ops.attention(
            np.concatenate([q[s][r] for s, r in enumerate(rows)]),
            cache,
            tables[: len(rows)],
            np.cumsum([0, *lengths]),
            np.array([r.stop for r in rows]),
            scale=scale,
            window=window,
        )

    whole = attend([slice(0, length)])
    for first, last in [(0, 1), (length - 1, length), (3, 5), (KEY_TILE - 1, KEY_TILE + 2), (10, 140)]:
        assert np.array_equal(attend([slice(first, last)]), whole[first:last])
        both = attend([slice(first, last), slice(36, 37)])
        assert np.array_equal(both[: last - first], whole[first:last])


def test_a_value_that_is_not_finite_spoils_only_the_queries_that_see_it() -> None:
    """0 · inf is NaN, but a hidden key has no weight at all: earlier queries of the chunk stay as they were."""
    case = Sequences(2, 1, 8, block_size=4, contexts=(12,))
    q, k, v, cache, tables = case.build()
    arguments = (tables, np.array([0, 12]), np.array([12]))
    clean = ops.attention(q[0], cache, *arguments, scale=0.3)
    v[0][7] = np.inf
    ops.kv_write(cache, k[0][7:8], v[0][7:8], np.array([tables[0, 1] * 4 + 3]))
    spoiled = ops.attention(q[0], cache, *arguments, scale=0.3)
    assert np.array_equal(spoiled[:7], clean[:7])
    assert not np.isfinite(spoiled[7:]).any()


def test_huge_scores_do_not_overflow() -> None:
    """Scores beyond what exp holds give the value of the key that wins."""
    case = Sequences(1, 1, 8, block_size=4, contexts=(5,))
    q, k, v, cache, tables = case.build()
    y = ops.attention(q[0][-1:], cache, tables, np.array([0, 1]), np.array([5]), scale=1e6)
    assert np.array_equal(y[0, 0], v[0][int(np.argmax(k[0][:, 0] @ q[0][-1, 0])), 0])
