"""Faults of chapter *Mixed precision*: in products of codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.ops import FloatArray
from refengine.ops.linear_a8 import GROUP, GroupedMatrix
from refengine.ops.scratch import Scratch
from refengine_conformance.faults.fault import Fault, made_op
from refengine_conformance.subject import Subject

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class _Products:
    """Products of codes, fused by way of float64: right but for rare ties. A fault overrides one method."""

    def __call__(
        self, codes: Bytes, weight: GroupedMatrix, bias: Floats | None = None, *, out: FloatArray
    ) -> FloatArray:
        """The op."""
        integers, scales, offsets = weight.groups(0, weight.shape[0], Scratch())
        y = self.start(np.zeros(out.shape, np.float32), bias)
        with np.errstate(all="ignore"):
            for group in self.order(codes.shape[1], len(codes)):
                record = codes[:, group]
                s, scaled_sum = (record[:, at : at + 4].view("<f4") for at in (GROUP, GROUP + 4))
                numbers = record[:, :GROUP].view(np.int8).astype(np.float32)
                sums = self.sums(numbers, integers[:, group * GROUP : (group + 1) * GROUP])
                y = self.added(y, scales[self.scale_of(group, len(scales))], s, sums)
                if offsets is not None:
                    y = self.with_offset(y, offsets[group], scaled_sum)
            out[...] = self.end(y, bias)
        return out

    def start(self, zeros: Floats, bias: Floats | None) -> Floats:
        """What groups are added to."""
        return zeros

    def end(self, y: Floats, bias: Floats | None) -> Floats:
        """What comes after the groups."""
        return y if bias is None else y + bias

    def order(self, groups: int, rows: int) -> Iterable[int]:
        """In which groups are added."""
        return range(groups)

    def scale_of(self, group: int, groups: int) -> int:
        """The group whose scale is taken."""
        return group

    def sums(self, codes: Floats, integers: Floats) -> Floats:
        """Integer sums of a group."""
        sums: Floats = codes @ integers.T
        return sums

    def added(self, y: Floats, d: Floats, s: Floats, sums: Floats) -> Floats:
        """The sums so far with those of a group."""
        return _fused(d * s, sums, y)

    def with_offset(self, y: Floats, m: Floats, scaled_sum: Floats) -> Floats:
        """And with its offset."""
        return _fused(m, scaled_sum, y)


def _fused(a: Floats, b: Floats, c: Floats) -> Floats:
    return (a.astype(np.float64) * b + c).astype(np.float32)


class _Saturates(_Products):
    def sums(self, codes: Floats, integers: Floats) -> Floats:
        sums: Floats = np.clip(codes @ integers.T, -(2**15), 2**15 - 1)
        return sums


class _HalfSums(_Products):
    def sums(self, codes: Floats, integers: Floats) -> Floats:
        half = GROUP // 2
        sums: Floats = (codes[:, :half] @ integers[:, :half].T) * np.float32(2)
        return sums


class _RightToLeft(_Products):
    def order(self, groups: int, rows: int) -> Iterable[int]:
        return range(groups - 1, -1, -1)


class _SplitWhereRowsAreFew(_Products):
    def order(self, groups: int, rows: int) -> Iterable[int]:
        return range(groups) if rows >= 4 else [*range(1, groups), 0]


class _MultipliesThenAdds(_Products):
    def added(self, y: Floats, d: Floats, s: Floats, sums: Floats) -> Floats:
        return y + d * s * sums


class _ScalesOneByOne(_Products):
    def added(self, y: Floats, d: Floats, s: Floats, sums: Floats) -> Floats:
        return _fused(d * sums, s, y)


class _OffsetIsNotFused(_Products):
    def with_offset(self, y: Floats, m: Floats, scaled_sum: Floats) -> Floats:
        return y + m * scaled_sum


class _NoOffset(_Products):
    def with_offset(self, y: Floats, m: Floats, scaled_sum: Floats) -> Floats:
        return y


class _BiasFirst(_Products):
    def start(self, zeros: Floats, bias: Floats | None) -> Floats:
        return zeros if bias is None else zeros + bias

    def end(self, y: Floats, bias: Floats | None) -> Floats:
        return y


class _ScaleOfTheNextGroup(_Products):
    def scale_of(self, group: int, groups: int) -> int:
        return min(group + 1, groups - 1)


class _AnyOrder(_Products):
    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def order(self, groups: int, rows: int) -> Iterable[int]:
        order: list[int] = self._random.permutation(groups).tolist()
        return order


def _products(make: Callable[[], Callable[..., Any]]) -> Callable[[], Subject]:
    return made_op("linear_a8", make, policy="mixed8")


FAULTS: tuple[Fault, ...] = (
    Fault(
        "integer sums saturate",
        "MIX-5",
        "Pairs of products are added in 16 bits, as one instruction does.",
        _products(_Saturates),
    ),
    Fault(
        "one half of a group is summed twice",
        "MIX-5",
        "The second sixteen are read from where the first lie.",
        _products(_HalfSums),
    ),
    Fault(
        "groups are added from right to left",
        "MIX-6",
        "A loop counts down to zero.",
        _products(_RightToLeft),
    ),
    Fault(
        "a group is rounded before it is added",
        "MIX-6",
        "Multiplication and addition instead of a fused one: another compiler flag, other bits.",
        _products(_MultipliesThenAdds),
    ),
    Fault(
        "scales are multiplied one after the other",
        "MIX-6",
        "(d · I) · s for (d · s) · I.",
        _products(_ScalesOneByOne),
    ),
    Fault(
        "offsets are not fused",
        "MIX-6",
        "One of two sums is, as the compiler likes it.",
        _products(_OffsetIsNotFused),
    ),
    Fault(
        "sums begin with the bias",
        "MIX-6",
        "The accumulator is set to it, to save an addition.",
        _products(_BiasFirst),
    ),
    Fault(
        "few rows are summed in another order",
        "MIX-7",
        "Decoding has a kernel of its own, split over the columns.",
        _products(_SplitWhereRowsAreFew),
    ),
    Fault(
        "offsets are forgotten",
        "MIX-8",
        "Q4_1 is read as Q4_0.",
        _products(_NoOffset),
    ),
    Fault(
        "a group has the next one's scale",
        "MIX-8",
        "Scales are read ahead, and the pointer has moved already.",
        _products(_ScaleOfTheNextGroup),
    ),
    Fault(
        "groups are added as they come",
        "MIX-14",
        "Threads add their parts to one sum, whoever is first.",
        _products(_AnyOrder),
    ),
)
