"""Formats of sealed keys and values: a full block of the KV cache, quantized once and read many times.

A few channels of keys (elements of a head) are large at every position; values have no such channels. So keys
share a scale along a channel of a block, and values along elements of a position (KIVI: Liu et al., 2024,
arXiv:2402.02750). Channels of keys, moreover, often lie to one side of zero. So beside each scale stands a
centre, and the two take the 16 bits that one float16 scale would take alone:

    number = d · (q + u · c)

with a code ``q`` of 8 or 4 bits, a centre ``c`` of 8 bits that counts ``u = 16`` or ``u = 1`` codes, and a
step ``d`` that one byte names (``STEPS``). Numbers err by half a step, and zero not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

VALUE_GROUP = 32
"""Elements of a value that share a step and a centre; the last ones of a head may be fewer."""

STEPS: NDArray[np.float64] = np.array([(8 + s % 8) * 2.0 ** (s // 8 - 23) for s in range(255)] + [np.nan])
"""The step that each byte names: four significant bits, from 2⁻²⁰ up to 3584; 255 names NaN."""
STEPS.flags.writeable = False

ALL = slice(None)
"""All heads."""

Numbers = NDArray[np.floating]
Bytes = NDArray[np.uint8]


class Workspace(Protocol):
    """Where working memory comes from."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array with any contents."""
        ...

    def frame(self) -> AbstractContextManager[None]:
        """What is taken inside is given back at its end."""
        ...


@dataclass(frozen=True)
class Floats:
    """Floating-point numbers, each rounded to the nearest; what has none is NaN.

    Clauses: SKV-1.
    """

    name: str

    def nbytes(self, positions: int, kv_heads: int, head_size: int) -> int:
        """Position by position, head by head."""
        return positions * kv_heads * head_size * np.dtype(self.name).itemsize

    def seal(self, x: Numbers, out: Bytes, workspace: Workspace) -> None:
        """Round blocks ``x`` ``[n, P, G, D]``, first to float32, into bytes ``out`` ``[n, nbytes]``."""
        stored = out.view(self.name).reshape(x.shape)
        with workspace.frame(), np.errstate(over="ignore"):
            rounded = workspace.empty(x.shape, np.float32)
            rounded[...] = x
            stored[...] = rounded
            lost = workspace.empty(x.shape, np.bool_)
            stored[np.isinf(stored, out=lost)] = np.nan

    def open(self, data: Bytes, out: Numbers, workspace: Workspace, heads: slice = ALL) -> None:
        """The numbers ``out[n, P, g, D]``, float32 or float64, of some heads of blocks ``[n, nbytes]``."""
        blocks, positions, _, head_size = out.shape
        out[...] = data.view(self.name).reshape(blocks, positions, -1, head_size)[:, :, heads]


@dataclass(frozen=True)
class Integers:
    """Codes of ``bits`` bits (8 or 4), with a step and a centre per channel, or per group of elements.

    Clauses: SKV-2, SKV-3, SKV-4, SKV-5, SKV-11.
    """

    name: str
    bits: int
    per_channel: bool

    @property
    def unit(self) -> int:
        """Codes that a centre counts by."""
        return 1 << (self.bits - 4)

    def nbytes(self, positions: int, kv_heads: int, head_size: int) -> int:
        """Steps, centres and codes; the codes of each head of each position begin with a byte."""
        row = -(-head_size * self.bits // 8)
        return 2 * math.prod(self._scales(positions, kv_heads, head_size)) + positions * kv_heads * row

    def seal(self, x: Numbers, out: Bytes, workspace: Workspace) -> None:
        """Quantize blocks ``x`` ``[n, P, G, D]``, rounded to float32, into ``out`` ``[n, nbytes]``."""
        steps, centres, codes = self._parts(out, x.shape)
        groups, half = self._groups(x.shape[-1]), 1 << (self.bits - 1)
        with workspace.frame(), np.errstate(invalid="ignore", over="ignore"):
            rounded, q = workspace.empty(x.shape, np.float32), workspace.empty(x.shape, np.float64)
            low, high = (workspace.empty(steps.shape, np.float32) for _ in range(2))
            d, c = (workspace.empty(steps.shape, np.float64) for _ in range(2))
            rounded[...] = x
            axis = 1 if self.per_channel else -1
            for elements, scale in groups:
                np.min(rounded[..., elements], axis, keepdims=True, out=low[..., scale])
                np.max(rounded[..., elements], axis, keepdims=True, out=high[..., scale])
            steps[...] = self._least_steps(low, high)
            np.take(STEPS, steps, out=d, mode="clip")

            np.rint(np.divide(low, d, out=c), out=c)
            np.floor_divide(np.add(c, half, out=c), self.unit, out=c)
            _clip(c, -128, 127)
            centres[...] = c
            c *= self.unit
            for elements, scale in groups:
                np.divide(rounded[..., elements], d[..., scale], out=q[..., elements])
                np.rint(q[..., elements], out=q[..., elements])
                q[..., elements] -= c[..., scale]
            _clip(q, -half, half - 1)
            self._pack(q, codes)

    def open(self, data: Bytes, out: Numbers, workspace: Workspace, heads: slice = ALL) -> None:
        """The numbers ``out[n, P, g, D]``, float32 or float64, of some heads of blocks ``[n, nbytes]``."""
        blocks, positions, _, head_size = out.shape
        kv_heads = data.shape[1] // self.nbytes(positions, 1, head_size)
        steps, centres, codes = self._parts(data, (blocks, positions, kv_heads, head_size))
        steps, centres, codes = steps[:, :, heads], centres[:, :, heads], codes[:, :, heads]
        groups = self._groups(out.shape[-1])
        self._unpack(codes, out)
        with workspace.frame():
            factor = workspace.empty(steps.shape, out.dtype)
            np.multiply(centres, self.unit, out=factor, dtype=out.dtype)
            for elements, scale in groups:
                out[..., elements] += factor[..., scale]
            np.take(STEPS.astype(out.dtype), steps, out=factor, mode="clip")
            for elements, scale in groups:
                out[..., elements] *= factor[..., scale]

    def _scales(self, positions: int, kv_heads: int, head_size: int) -> tuple[int, int, int]:
        """Shape of a block's steps, and of its centres."""
        if self.per_channel:
            return (1, kv_heads, head_size)
        return (positions, kv_heads, -(-head_size // VALUE_GROUP))

    def _groups(self, head_size: int) -> list[tuple[slice, slice]]:
        """Elements of a head, and the scales that belong to them."""
        if self.per_channel:
            return [(slice(0, head_size), slice(0, head_size))]
        starts = range(0, head_size, VALUE_GROUP)
        return [(slice(a, min(a + VALUE_GROUP, head_size)), slice(g, g + 1)) for g, a in enumerate(starts)]

    def _parts(self, data: Bytes, shape: tuple[int, ...]) -> tuple[Bytes, NDArray[np.int8], Bytes]:
        """Views of blocks' steps, centres and codes ``[n, P, G, row]``."""
        blocks, positions, kv_heads, head_size = shape
        scales = self._scales(positions, kv_heads, head_size)
        count = math.prod(scales)
        return (
            data[:, :count].reshape(blocks, *scales),
            data[:, count : 2 * count].view(np.int8).reshape(blocks, *scales),
            data[:, 2 * count :].reshape(blocks, positions, kv_heads, -1),
        )

    def _least_steps(self, low: Numbers, high: Numbers) -> NDArray[np.intp]:
        """The least step with which codes reach from ``low`` to ``high``, and the centre reaches both."""
        codes = (1 << self.bits) - self.unit
        reach = 127 * self.unit + (1 << (self.bits - 1)) - 1
        spread = np.searchsorted(codes * STEPS[:255], high - low)
        size = np.searchsorted(reach * STEPS[:255], np.maximum(np.abs(low), np.abs(high)))
        return np.maximum(spread, size)

    def _pack(self, q: Numbers, codes: Bytes) -> None:
        """Store codes; of 4 bits, those of a head's second half above those of the first. Spoils ``q``."""
        if self.bits == 8:
            codes.view(np.int8)[...] = q
            return
        row = codes.shape[-1]
        q += 8
        second = q[..., row:]
        second *= 16
        codes[...] = q[..., :row]
        shared = codes[..., : second.shape[-1]]
        np.add(shared, second, out=shared, casting="unsafe")

    def _unpack(self, codes: Bytes, out: Numbers) -> None:
        if self.bits == 8:
            out[...] = codes.view(np.int8)
            return
        row = codes.shape[-1]
        np.bitwise_and(codes, 15, out=out[..., :row])
        np.right_shift(codes[..., : out.shape[-1] - row], 4, out=out[..., row:])
        out -= 8


def _clip(x: Numbers, least: int, most: int) -> None:
    """Into the range; NaN, which has no place in it, becomes the least."""
    np.fmin(np.fmax(x, least, out=x), most, out=x)


SEALED_KEYS: Mapping[str, Floats | Integers] = MappingProxyType(
    {
        "float32": Floats("float32"),
        "float16": Floats("float16"),
        "int8": Integers("int8", 8, per_channel=True),
        "int4": Integers("int4", 4, per_channel=True),
    }
)
"""Formats of keys, by name."""

SEALED_VALUES: Mapping[str, Floats | Integers] = MappingProxyType(
    {
        "float32": Floats("float32"),
        "float16": Floats("float16"),
        "int8": Integers("int8", 8, per_channel=False),
        "int4": Integers("int4", 4, per_channel=False),
    }
)
"""Formats of values, by name."""
