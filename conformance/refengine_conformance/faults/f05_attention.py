"""Chapter *Attention*: faults of masks, of addresses, of precision, of order and of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine import ops
from refengine.ops import FloatArray, IndexArray, LayerCache
from refengine_conformance.faults.fault import Fault, made_op

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class _Loop:
    """Attention, one query and one head at a time: right as it stands. A fault overrides one method."""

    def __call__(
        self,
        q: FloatArray,
        cache: LayerCache,
        block_tables: IndexArray,
        query_starts: IndexArray,
        context_lens: IndexArray,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        out: FloatArray,
    ) -> FloatArray:
        """The op."""
        heads, (_, size, kv_heads, _) = q.shape[1], cache.keys.shape
        keys, values = (blocks.reshape(-1, *blocks.shape[2:]) for blocks in cache)
        for sequence, context in enumerate(self.contexts(context_lens)):
            table, start = self.table(block_tables, sequence), int(query_starts[sequence])
            first = int(context) - (int(query_starts[sequence + 1]) - start)
            for p in range(first, int(context)):
                j = self.reads(p, int(context), len(table) * size, size, window)
                seen = self.sees(j, p, window, first) & (j < context)
                j, seen = (j, seen) if self.multiplies_by_zero else (j[seen], seen[seen])
                slots = self.slots(table, j, size, len(keys))
                for h in range(heads):
                    g = self.key_head(h, heads, kv_heads)
                    row = start + p - first
                    scores = self.scores(keys[slots, g] @ q[row, h], q.dtype.type(scale), softcap, seen)
                    weights = self.weights(scores)
                    out[row, h] = self.mean(weights, values[slots, g], seen, j >= first)
        return out

    multiplies_by_zero = False
    """Whether what is read and not seen is multiplied by its weight, zero, instead of left out."""

    def contexts(self, context_lens: Array) -> Array:
        """Positions of each sequence."""
        return context_lens

    def table(self, block_tables: Array, sequence: int) -> Any:
        """The block table of a sequence."""
        return block_tables[sequence]

    def reads(self, p: int, context: int, room: int, size: int, window: int | None) -> Array:
        """The positions that the query at ``p`` reads."""
        return np.arange(context)

    def sees(self, j: Array, p: int, window: int | None, first: int) -> Mask:
        """Which of them have a weight, in a step whose first query is at ``first``."""
        return (j <= p) & (window is None or j > p - window)

    def slots(self, table: IndexArray, j: Array, size: int, pool: int) -> Array:
        """Where positions lie, in a pool of so many slots; never outside."""
        slots: Array = (table[j // size].astype(np.int64) * size + j % size) % pool
        return slots

    def key_head(self, h: int, heads: int, kv_heads: int) -> int:
        """The key head of a query head."""
        return h // (heads // kv_heads)

    def scores(self, products: Array, scale: Any, cap: float | None, seen: Mask) -> Array:
        """Scores, minus infinity where hidden."""
        return np.where(seen, self.capped(products * scale, cap), -np.inf)

    def capped(self, scores: Array, cap: float | None) -> Array:
        """Scores under their cap."""
        return scores if cap is None else cap * np.tanh(scores / cap)

    def weights(self, scores: Array) -> Array:
        """Weights that need not sum to one."""
        weights: Array = np.exp(scores - scores.max())
        return weights

    def mean(self, weights: Array, values: Array, seen: Mask, own: Mask) -> Array:
        """The weighted mean; ``own`` tells the positions of this step."""
        mean: Array = weights @ values / weights.sum()
        return mean


class _SeesTheNext(_Loop):
    def sees(self, j: Array, p: int, window: int | None, first: int) -> Mask:
        return (j <= p + 1) & (window is None or j > p - window)


class _BlindToItself(_Loop):
    def sees(self, j: Array, p: int, window: int | None, first: int) -> Mask:
        return super().sees(j, p, window, first) & ((j < p) | (p == 0) | (window == 1))


class _MasksTheWeights(_Loop):
    multiplies_by_zero = True

    def scores(self, products: Array, scale: Any, cap: float | None, seen: Mask) -> Array:
        return self.capped(products * scale, cap)

    def mean(self, weights: Array, values: Array, seen: Mask, own: Mask) -> Array:
        mean: Array = (weights * seen) @ values / weights.sum()
        return mean


class _WindowAndOne(_Loop):
    def sees(self, j: Array, p: int, window: int | None, first: int) -> Mask:
        return (j <= p) & (window is None or j >= p - window)


class _NoWindow(_Loop):
    def sees(self, j: Array, p: int, window: int | None, first: int) -> Mask:
        return j <= p


class _WindowOfTheStep(_Loop):
    def sees(self, j: Array, p: int, window: int | None, first: int) -> Mask:
        return (j <= p) & (window is None or j > first - window)


class _HeadsInTurn(_Loop):
    def key_head(self, h: int, heads: int, kv_heads: int) -> int:
        return h % kv_heads


class _Unscaled(_Loop):
    def scores(self, products: Array, scale: Any, cap: float | None, seen: Mask) -> Array:
        return super().scores(products, products.dtype.type(1), cap, seen)


class _HalfPrecisionWeights(_Loop):
    def weights(self, scores: Array) -> Array:
        return super().weights(scores).astype(np.float16).astype(scores.dtype)


class _CapsTheMask(_Loop):
    multiplies_by_zero = True

    def scores(self, products: Array, scale: Any, cap: float | None, seen: Mask) -> Array:
        return self.capped(np.where(seen, products * scale, -np.inf), cap)


class _NoCap(_Loop):
    def capped(self, scores: Array, cap: float | None) -> Array:
        return scores


class _CapsBeforeScaling(_Loop):
    def scores(self, products: Array, scale: Any, cap: float | None, seen: Mask) -> Array:
        return np.where(seen, self.capped(products, cap) * scale, -np.inf)


class _BlocksOfSixteen(_Loop):
    def slots(self, table: IndexArray, j: Array, size: int, pool: int) -> Array:
        return super().slots(table[np.minimum(j // 16, len(table) - 1)], j % 16, 16, pool)


class _FirstTables(_Loop):
    def __init__(self) -> None:
        self._first: dict[tuple[int, ...], Array] = {}

    def table(self, block_tables: Array, sequence: int) -> Any:
        return self._first.setdefault(block_tables.shape, block_tables.copy())[sequence]


class _TablesBackwards(_Loop):
    def table(self, block_tables: Array, sequence: int) -> Any:
        return block_tables[len(block_tables) - 1 - sequence]


class _CachedAndOwnApart(_Loop):
    def mean(self, weights: Array, values: Array, seen: Mask, own: Mask) -> Array:
        cached, new = (weights[part] @ values[part] for part in (~own, own))
        mean: Array = (cached + new) / weights.sum()
        return mean


class _WholeBlocks(_Loop):
    multiplies_by_zero = True

    def reads(self, p: int, context: int, room: int, size: int, window: int | None) -> Array:
        first = 0 if window is None else max(0, p - window + 1)
        return np.arange(first // size * size, -(-(p + 1) // size) * size)


class _WholeTables(_Loop):
    multiplies_by_zero = True

    def reads(self, p: int, context: int, room: int, size: int, window: int | None) -> Array:
        return np.arange(room)


class _WholeContexts(_Loop):
    multiplies_by_zero = True


class _NoMaximum(_Loop):
    def weights(self, scores: Array) -> Array:
        return np.exp(scores)


class _LongestContext(_Loop):
    def contexts(self, context_lens: Array) -> Array:
        return np.full_like(context_lens, context_lens.max())


def _swaps_when_alone(cache: LayerCache, k: FloatArray, v: FloatArray, slots: IndexArray) -> LayerCache:
    return ops.kv_write(cache, *((v, k) if len(k) == 1 else (k, v)), slots)


def _stores_half(cache: LayerCache, k: FloatArray, v: FloatArray, slots: IndexArray) -> LayerCache:
    return ops.kv_write(cache, k.astype(np.float16), v.astype(np.float16), slots)


class _WritesLate:
    """Writes a step's keys and values when the next step comes."""

    def __init__(self) -> None:
        self._pending: tuple[FloatArray, FloatArray, IndexArray] | None = None

    def __call__(self, cache: LayerCache, k: FloatArray, v: FloatArray, slots: IndexArray) -> LayerCache:
        if self._pending is not None:
            ops.kv_write(cache, *self._pending)
        self._pending = k.copy(), v.copy(), slots.copy()
        return cache


def _overflows(cache: LayerCache, k: FloatArray, v: FloatArray, slots: IndexArray) -> LayerCache:
    place = np.divmod(slots, cache.keys.shape[1])
    for blocks, new in zip(cache, (k, v), strict=True):
        with np.errstate(over="ignore"):
            blocks[place] = new
    return cache


def _clips(cache: LayerCache, k: FloatArray, v: FloatArray, slots: IndexArray) -> LayerCache:
    place = np.divmod(slots, cache.keys.shape[1])
    for blocks, new in zip(cache, (k, v), strict=True):
        most = float(np.finfo(blocks.dtype).max)
        blocks[place] = np.clip(new, -most, most)
    return cache


def _attention(name: str, clause: str, make: Callable[[], _Loop], story: str) -> Fault:
    return _fault(name, clause, "attention", make, story)


def _fault(name: str, clause: str, op: str, make: Callable[[], Callable[..., Any]], story: str) -> Fault:
    return Fault(name, clause, story, made_op(op, make))


FAULTS: tuple[Fault, ...] = (
    _attention(
        "a query sees the next position",
        "ATT-1",
        _SeesTheNext,
        "The mask compares with <= where positions count from one.",
    ),
    _attention(
        "a query does not see itself",
        "ATT-1",
        _BlindToItself,
        "The mask compares with < where it must with <=.",
    ),
    _attention(
        "hidden positions count in the sum of the weights",
        "ATT-1",
        _MasksTheWeights,
        "The mask is multiplied into the weights after the softmax.",
    ),
    _attention(
        "a window shows one position too many",
        "ATT-2",
        _WindowAndOne,
        "Some libraries' window counts the positions before the query, others' counts the query too.",
    ),
    _attention(
        "the window is ignored",
        "ATT-2",
        _NoWindow,
        "A kernel takes no window, and nothing shows until a context is longer than it.",
    ),
    _attention(
        "the window of a step's first query serves all",
        "ATT-2",
        _WindowOfTheStep,
        "The first visible position is computed once per tile of queries, and the mask forgets it.",
    ),
    _attention(
        "query heads take key heads in turn",
        "ATT-3",
        _HeadsInTurn,
        "Keys are tiled where they must be repeated: h % G for h // (H / G).",
    ),
    _attention(
        "scores are not scaled",
        "ATT-4",
        _Unscaled,
        "Two layers each believe that the other scales the query.",
    ),
    _attention(
        "weights in half precision",
        "ATT-4",
        _HalfPrecisionWeights,
        "A kernel narrows the weights to feed a matrix unit.",
    ),
    _attention(
        "hidden scores are capped",
        "ATT-5",
        _CapsTheMask,
        "With the cap after the mask, minus infinity becomes minus the cap: so did ONNX (onnx#7865).",
    ),
    _attention(
        "the cap is ignored", "ATT-5", _NoCap, "A fused kernel has no cap, and the path around it drops it."
    ),
    _attention(
        "the cap comes before the scale",
        "ATT-5",
        _CapsBeforeScaling,
        "The scale is folded into the wrong place of a fused kernel.",
    ),
    _fault(
        "keys and values are swapped for a single token",
        "ATT-6",
        "kv_write",
        lambda: _swaps_when_alone,
        "The path for decoding is another one than for prompts, and its arguments are in another order.",
    ),
    _fault(
        "keys and values are stored in half precision",
        "ATT-6",
        "kv_write",
        lambda: _stores_half,
        "The cache's precision is hard-wired, and the policy asks for another.",
    ),
    _fault(
        "what float16 cannot hold becomes infinity",
        "ATT-6",
        "kv_write",
        lambda: _overflows,
        "A key of minus infinity has no weight: the position is gone, and every logit is finite.",
    ),
    _fault(
        "what float16 cannot hold is clipped",
        "ATT-6",
        "kv_write",
        lambda: _clips,
        "Numbers that look like numbers: nobody is told.",
    ),
    _attention(
        "a block size of sixteen is hard-wired",
        "ATT-6",
        _BlocksOfSixteen,
        "The kernel was only ever run with the default.",
    ),
    _fault(
        "a step's keys are written after it is computed",
        "ATT-7",
        "kv_write",
        _WritesLate,
        "The write is queued on another stream, and nothing orders the two.",
    ),
    _attention(
        "block tables are those of an earlier step",
        "ATT-8",
        _FirstTables,
        "A recorded graph has copied the tables instead of naming where they lie.",
    ),
    _attention(
        "sequences read through each other's tables",
        "ATT-9",
        _TablesBackwards,
        "The batch is sorted by length, and the tables are not.",
    ),
    _attention(
        "every context is as long as the longest",
        "ATT-9",
        _LongestContext,
        "A batch is padded to one length, and the padding is taken for tokens.",
    ),
    _attention(
        "cached and new positions are summed apart",
        "ATT-10",
        _CachedAndOwnApart,
        "A prompt's kernel merges two partial results, so that the cut decides the order of the sum.",
    ),
    _attention(
        "whole blocks are multiplied by zero weights",
        "ATT-11",
        _WholeBlocks,
        "0 · NaN is NaN: what is left in the tail of the last block comes through the mask.",
    ),
    _attention(
        "whole tables are read",
        "ATT-12",
        _WholeTables,
        "Tables are gathered at their full width, and the padding reads some other block.",
    ),
    _attention(
        "hidden values are multiplied by zero weights",
        "ATT-13",
        _WholeContexts,
        "0 · NaN is NaN: one bad token spoils the earlier ones of its step.",
    ),
    _attention(
        "the maximum is not subtracted",
        "ATT-14",
        _NoMaximum,
        "The textbook's softmax: exp overflows beyond 88.",
    ),
)
