"""Chapter *Sealed keys and values*: faults of formats, of what is sealed from what, and of who reads what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine import ops
from refengine.backend import load
from refengine.memory import SealedFormat
from refengine.ops import FloatArray, IndexArray, LayerCache, SealedLayerCache
from refengine.ops.scratch import Scratch
from refengine.quantizer.sealed_kv import ALL, STEPS, Floats, Integers
from refengine_conformance.faults.fault import Fault, made_op
from refengine_conformance.subject import KVPart, Subject, golden_kv_format

Array = NDArray[Any]


class _Overflows(Floats):
    """Keeps infinity."""

    def seal(self, x: FloatArray, out: Array, workspace: Any) -> None:
        with np.errstate(over="ignore"):
            out.view(self.name).reshape(x.shape)[...] = x.astype(np.float32)


class _PairsOfNeighbours(Integers):
    """Packs elements 2i and 2i + 1 into a byte."""

    def _pack(self, q: FloatArray, codes: Array) -> None:
        super()._pack(self._reordered(q), codes)

    def _unpack(self, codes: Array, out: FloatArray) -> None:
        halves = np.empty_like(out)
        super()._unpack(codes, halves)
        size = out.shape[-1]
        out[..., 0::2], out[..., 1::2] = halves[..., : -(-size // 2)], halves[..., -(-size // 2) :]

    def _reordered(self, q: FloatArray) -> FloatArray:
        return np.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1) if self.bits == 4 else q


class _NoUnit(Integers):
    """Counts centres in codes, whatever their width."""

    def open(self, data: Array, out: FloatArray, workspace: Any, heads: slice = ALL) -> None:
        blocks, positions, _, head_size = out.shape
        kv_heads = data.shape[1] // self.nbytes(positions, 1, head_size)
        steps, centres, codes = self._parts(data, (blocks, positions, kv_heads, head_size))
        steps, centres, codes = steps[:, :, heads], centres[:, :, heads], codes[:, :, heads]
        self._unpack(codes, out)
        for elements, scale in self._groups(out.shape[-1]):
            d = STEPS[steps[..., scale]].astype(out.dtype)
            out[..., elements] = d * (out[..., elements] + centres[..., scale])


class _HalfAwayFromZero(Integers):
    """Adds one half and truncates: ``roundf``, where ``rintf`` is meant."""

    def seal(self, x: FloatArray, out: Array, workspace: Any) -> None:
        super().seal(x, out, workspace)
        _, centres, codes = self._parts(out, x.shape)
        steps = out[:, : centres[0].size].reshape(centres.shape)
        q = np.empty(x.shape)
        for elements, scale in self._groups(x.shape[-1]):
            with np.errstate(invalid="ignore"):
                y = x[..., elements].astype(np.float32) / STEPS[steps[..., scale]]
            y = np.trunc(y + np.copysign(0.5, y))
            q[..., elements] = y - self.unit * centres[..., scale].astype(np.int64)
        half = 1 << (self.bits - 1)
        self._pack(np.clip(np.nan_to_num(q, nan=-half), -half, half - 1), codes)


class _NearestStep(Integers):
    """Takes the step below the least one, and cuts off what does not fit."""

    def _least_steps(self, low: FloatArray, high: FloatArray) -> NDArray[np.intp]:
        steps = super()._least_steps(low, high)
        return np.where((steps > 8) & (steps < 255), steps - 4, steps)


class _AroundZero(Integers):
    """Has no centre: steps reach as far below zero as above."""

    def _least_steps(self, low: FloatArray, high: FloatArray) -> NDArray[np.intp]:
        size = np.maximum(np.abs(low), np.abs(high))
        return super()._least_steps(-size, size)


class _TakesNanForZero(Integers):
    """Replaces what is not finite before it is sealed."""

    def seal(self, x: FloatArray, out: Array, workspace: Any) -> None:
        super().seal(np.nan_to_num(x, nan=0, posinf=0, neginf=0), out, workspace)


def _kv_format(make: type[Floats] | type[Integers]) -> Callable[[], Subject]:
    """A subject whose formats of a kind are those of another class."""

    def kv_format(part: KVPart, name: str) -> SealedFormat:
        golden = golden_kv_format(part, name)
        if isinstance(golden, Integers) and issubclass(make, Integers):
            return make(golden.name, golden.bits, golden.per_channel)
        if isinstance(golden, Floats) and issubclass(make, Floats):
            return make(golden.name)
        return golden

    return lambda: Subject(partial(load, "numpy"), kv_format=kv_format)


class _SealsLate:
    """Seals what a step has filled when the next step comes."""

    def __init__(self) -> None:
        self._pending: tuple[IndexArray, ...] | None = None

    def __call__(self, cache: SealedLayerCache, exact: LayerCache, *places: IndexArray) -> SealedLayerCache:
        if self._pending is not None:
            ops.kv_seal(cache, exact, *self._pending)
        self._pending = tuple(place.copy() for place in places)
        return cache


def _scales_of_the_batch(cache: SealedLayerCache, exact: LayerCache, *places: IndexArray) -> SealedLayerCache:
    """Seals all blocks that a step fills as if they were one, with the scales of one."""
    block_tables, exact_tables, query_starts, context_lens = places
    ops.kv_seal(cache, exact, *places)
    _, size, heads, head_size = exact.keys.shape
    first = context_lens - np.diff(query_starts)
    filled = [
        (exact_tables[s, i], block_tables[s, i])
        for s in range(len(context_lens))
        for i in range(first[s] // size, context_lens[s] // size)
    ]
    form = cache.formats[0]
    if len(filled) < 2 or not isinstance(form, Integers):
        return cache
    together = np.concatenate([exact.keys[copy] for copy, _ in filled])[None]
    data = np.empty((1, form.nbytes(together.shape[1], heads, head_size)), np.uint8)
    form.seal(together, data, Scratch())
    scales, codes = np.split(data[0], [2 * heads * head_size])
    for (_, block), part in zip(filled, np.split(codes, len(filled)), strict=True):
        cache.keys[block] = np.concatenate([scales, part])
    return cache


class _Reads:
    """Sealed attention, one query and head at a time: right as it stands. A fault overrides one method."""

    def __call__(
        self,
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
        out: FloatArray,
    ) -> FloatArray:
        """The op."""
        _, size, kv_heads, _ = exact.keys.shape
        for sequence, context in enumerate(context_lens):
            start, stop = query_starts[sequence : sequence + 2]
            first = int(context) - int(stop - start)
            for p in range(first, int(context)):
                j = np.arange(0 if window is None else max(0, p - window + 1), p + 1)
                is_exact = self.is_exact(j // size, p // size, first // size, int(context) // size)
                keys, values = (
                    self._gather(cache, exact, which, block_tables, exact_tables, sequence, j, is_exact)
                    for which in (0, 1)
                )
                for h in range(q.shape[1]):
                    g = self.key_head(h, q.shape[1], kv_heads)
                    row = start + p - first
                    scores = (keys[:, g] @ q[row, h]) * q.dtype.type(scale)
                    if softcap is not None:
                        scores = self.capped(scores, softcap)
                    weights = np.exp(scores - scores.max())
                    out[row, h] = weights @ values[:, g] / weights.sum()
        return out

    def is_exact(self, block: Array, own: int, first: int, full: int) -> Array:
        """Which blocks the query in block ``own`` reads from exact copies.

        In a step whose first query is in block ``first``, and after which so many blocks are ``full``.
        """
        exact: Array = (block == 0) | (block == own)
        return exact

    def key_head(self, h: int, heads: int, kv_heads: int) -> int:
        """The key head of a query head."""
        return h // (heads // kv_heads)

    def capped(self, scores: Array, cap: float) -> Array:
        """Scores under their cap."""
        capped: Array = cap * np.tanh(scores / cap)
        return capped

    def tables(self, block_tables: IndexArray, exact_tables: IndexArray) -> tuple[IndexArray, IndexArray]:
        """The tables that are read."""
        return block_tables, exact_tables

    def _gather(
        self,
        cache: SealedLayerCache,
        exact: LayerCache,
        which: int,
        block_tables: IndexArray,
        exact_tables: IndexArray,
        sequence: int,
        positions: Array,
        is_exact: Array,
    ) -> Array:
        size = exact.keys.shape[1]
        block_tables, exact_tables = self.tables(block_tables, exact_tables)
        rows = []
        for j, from_copy in zip(positions, is_exact, strict=True):
            if from_copy:
                rows.append(exact[which][exact_tables[sequence, j // size] % len(exact.keys), j % size])
            else:
                block = block_tables[sequence, j // size]
                opened = np.empty((1, *exact.keys.shape[1:]), exact.keys.dtype)
                stored = cache.values if which else cache.keys
                cache.formats[which].open(stored[block][None], opened, Scratch())
                rows.append(opened[0, j % size])
        return np.stack(rows)


class _SealedAsSoonAsFull(_Reads):
    def is_exact(self, block: Array, own: int, first: int, full: int) -> Array:
        exact: Array = (block == 0) | (block >= full)
        return exact


class _StepIsExact(_Reads):
    def is_exact(self, block: Array, own: int, first: int, full: int) -> Array:
        exact: Array = (block == 0) | (block >= first)
        return exact


class _NoSink(_Reads):
    def is_exact(self, block: Array, own: int, first: int, full: int) -> Array:
        exact: Array = block == own
        return exact


class _AllCopies(_Reads):
    def is_exact(self, block: Array, own: int, first: int, full: int) -> Array:
        return np.ones(block.shape, np.bool_)


class _HeadsInTurn(_Reads):
    def key_head(self, h: int, heads: int, kv_heads: int) -> int:
        return h % kv_heads


class _NoCap(_Reads):
    def capped(self, scores: Array, cap: float) -> Array:
        return scores


def _reads_whole_tables(*operands: Any, out: FloatArray, **attributes: Any) -> FloatArray:
    """Gathers every exact copy that the table names, and multiplies those not needed by zero."""
    exact, exact_tables, context_lens = operands[2], operands[4], operands[6]
    ops.sealed_attention(*operands, out=out, **attributes)
    size, pool = exact.keys.shape[1], len(exact.keys)
    for sequence, context in enumerate(context_lens):
        start, stop = operands[5][sequence : sequence + 2]
        for block in exact_tables[sequence, : -(-int(context) // size)]:
            out[start:stop] += 0 * exact.values[block % pool].sum()
    return out


def _truncates(cache: LayerCache, k: FloatArray, v: FloatArray, slots: IndexArray) -> LayerCache:
    """Cuts off the bits that a narrower cache has no room for."""
    narrow = cache.keys.dtype
    if narrow.itemsize < k.dtype.itemsize:
        k, v = (np.where(np.abs(x.astype(narrow)) > np.abs(x), _toward_zero(x, narrow), x) for x in (k, v))
    return ops.kv_write(cache, k, v, slots)


def _toward_zero(x: FloatArray, dtype: np.dtype[np.floating]) -> FloatArray:
    return np.nextafter(x.astype(dtype), dtype.type(0)).astype(x.dtype)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "a float16 block keeps infinity",
        "SKV-1",
        "A conversion overflows, and a key of minus infinity drops out of the softmax unseen.",
        _kv_format(_Overflows),
    ),
    Fault(
        "neighbours share a byte",
        "SKV-2",
        "Two ways to pack nibbles are in use; what one kernel writes another reads.",
        _kv_format(_PairsOfNeighbours),
    ),
    Fault(
        "a centre counts codes of any width",
        "SKV-3",
        "The kernel for 8 bits was copied from that for 4.",
        _kv_format(_NoUnit),
    ),
    Fault(
        "ties are rounded away from zero",
        "SKV-4",
        "roundf for rintf: two backends disagree in one code of thousands.",
        _kv_format(_HalfAwayFromZero),
    ),
    Fault(
        "scales are symmetric",
        "SKV-4",
        "A channel that lies to one side of zero wastes half of its codes.",
        _kv_format(_AroundZero),
    ),
    Fault(
        "large numbers are cut off",
        "SKV-5",
        "A scale is chosen for the mean error, and outliers, on which attention hangs, are clipped.",
        _kv_format(_NearestStep),
    ),
    Fault(
        "a block is sealed a step late",
        "SKV-6",
        "Quantization is queued behind the step, and the exact copy is reused before it runs.",
        made_op("kv_seal", _SealsLate),
    ),
    Fault(
        "a block is read as sealed as soon as it is full",
        "SKV-7",
        "A prompt reads its own last block otherwise than decoding would.",
        made_op("sealed_attention", _SealedAsSoonAsFull),
    ),
    Fault(
        "the first block is read as sealed",
        "SKV-7",
        "Attention sinks are quantized like anything else.",
        made_op("sealed_attention", _NoSink),
    ),
    Fault(
        "query heads take key heads in turn",
        "SKV-8",
        "KV quantization × grouped queries: the quantized path repeats heads in another order.",
        made_op("sealed_attention", _HeadsInTurn),
    ),
    Fault(
        "the cap is ignored",
        "SKV-8",
        "KV quantization × softcap: the quantized kernel has none.",
        made_op("sealed_attention", _NoCap),
    ),
    Fault(
        "blocks of a batch share their scales",
        "SKV-9",
        "KV quantization × batch: results of a sequence depend on its company (exllamav3#91).",
        made_op("kv_seal", lambda: _scales_of_the_batch),
    ),
    Fault(
        "a step reads its own tokens exactly",
        "SKV-9",
        "KV quantization × chunked prefill: tokens are quantized after the step, and the cut shows.",
        made_op("sealed_attention", _StepIsExact),
    ),
    Fault(
        "exact copies of the whole table are read",
        "SKV-10",
        "Tables are gathered at full width, and 0 · NaN is NaN.",
        made_op("sealed_attention", lambda: _reads_whole_tables),
    ),
    Fault(
        "NaN is sealed as zero",
        "SKV-11",
        "The quantizer cleans its input, and the damage spreads unseen.",
        _kv_format(_TakesNanForZero),
    ),
    Fault(
        "a float16 cache truncates",
        "SKV-12",
        "Bits are shifted out where they should be rounded.",
        made_op("kv_write", lambda: _truncates),
    ),
    Fault(
        "copies are read for all that is in the window",
        "SKV-13",
        "The exact pool is only ever tested with room for everything, and never seen to be read too much.",
        made_op("sealed_attention", _AllCopies),
    ),
)
