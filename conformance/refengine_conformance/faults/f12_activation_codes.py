"""Faults of chapter *Mixed precision*: in the codes of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.ops.linear_a8 import GROUP
from refengine_conformance.faults.fault import Fault, made_op
from refengine_conformance.subject import Subject

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class _Codes:
    """Codes of activations: right as it stands. A fault overrides one method."""

    def __call__(self, x: Floats, *, out: Bytes) -> Bytes:
        """The op."""
        groups = x.reshape(len(x), -1, GROUP)
        with np.errstate(all="ignore"):
            scales = self.scales(groups)
            usable = np.isfinite(scales) & (scales > 0)
            quotients = self.quotients(groups, np.where(usable, scales, np.float32(1))[..., None])
            codes = self.cut(self.nearest(quotients))
            rest = np.where(np.isfinite(scales), 0, self.not_finite)
            codes = np.where(usable[..., None], codes, rest[..., None]).astype(np.int64).astype(np.int8)
        sums = codes.sum(axis=2, dtype=np.int32)
        out[..., :GROUP].view(np.int8)[...] = codes
        numbers, integers = out[..., GROUP:].view("<f4"), out[..., GROUP:].view("<i4")
        numbers[..., 0] = scales
        with np.errstate(all="ignore"):
            numbers[..., 1] = scales * self.summed(codes.astype(np.int32)).astype(np.float32)
        integers[..., 2], integers[..., 3] = sums, codes[..., GROUP // 2 :].sum(axis=2, dtype=np.int32)
        return out

    not_finite = 1
    """The codes of a group that is not finite."""

    def scales(self, groups: Floats) -> Floats:
        """One for each group."""
        scales: Floats = np.abs(groups).max(axis=2) / np.float32(127)
        return scales

    def quotients(self, groups: Floats, scales: Floats) -> Floats:
        """Activations in units of their scale."""
        return groups / scales

    def nearest(self, quotients: Floats) -> Floats:
        """Their integers."""
        return np.rint(quotients)

    def cut(self, codes: Floats) -> Floats:
        """The codes that there are."""
        return np.clip(codes, -127, 127)

    def summed(self, codes: NDArray[np.int32]) -> NDArray[np.int32]:
        """What the offset is multiplied with."""
        sums: NDArray[np.int32] = codes.sum(axis=2, dtype=np.int32)
        return sums


class _AwayFromZero(_Codes):
    def nearest(self, quotients: Floats) -> Floats:
        return np.trunc(quotients + np.copysign(np.float32(0.5), quotients))


class _ByTheInverse(_Codes):
    def quotients(self, groups: Floats, scales: Floats) -> Floats:
        return groups * (np.float32(1) / scales)


class _LargestOfTheSigned(_Codes):
    def scales(self, groups: Floats) -> Floats:
        scales: Floats = np.abs(groups.max(axis=2)) / np.float32(127)
        return scales


class _OneScalePerRow(_Codes):
    def scales(self, groups: Floats) -> Floats:
        scales: Floats = super().scales(groups)
        return np.broadcast_to(scales.max(axis=1, keepdims=True), scales.shape).copy()


class _OneScalePerStep(_Codes):
    def scales(self, groups: Floats) -> Floats:
        scales: Floats = super().scales(groups)
        return np.broadcast_to(scales.max(axis=0), scales.shape).copy()


class _NotCut(_Codes):
    def cut(self, codes: Floats) -> Floats:
        return codes


class _FlushesToZero(_Codes):
    def scales(self, groups: Floats) -> Floats:
        scales: Floats = super().scales(groups)
        return np.where(scales < np.finfo(np.float32).tiny, np.float32(0), scales)


class _SkipsNan(_Codes):
    def scales(self, groups: Floats) -> Floats:
        scales: Floats = np.fmax.reduce(np.abs(groups), axis=2) / np.float32(127)
        return scales

    def nearest(self, quotients: Floats) -> Floats:
        return np.nan_to_num(np.rint(quotients), nan=0)


class _CodesOfZero(_Codes):
    """Infinity divided by infinity is taken for zero, and so is its scale."""

    def scales(self, groups: Floats) -> Floats:
        return np.nan_to_num(super().scales(groups), nan=0, posinf=0)


class _HalfTheSum(_Codes):
    def summed(self, codes: NDArray[np.int32]) -> NDArray[np.int32]:
        sums: NDArray[np.int32] = codes[..., GROUP // 2 :].sum(axis=2, dtype=np.int32)
        return sums


def _codes(make: Callable[[], Callable[..., Any]]) -> Callable[[], Subject]:
    return made_op("quantize_a8", make, policy="mixed8")


FAULTS: tuple[Fault, ...] = (
    Fault(
        "ties of codes are rounded away from zero",
        "MIX-2",
        "roundf for rintf.",
        _codes(_AwayFromZero),
    ),
    Fault(
        "activations are multiplied by the inverse of their scale",
        "MIX-2",
        "A division is saved, and here and there a code is another.",
        _codes(_ByTheInverse),
    ),
    Fault(
        "the largest activation is sought with its sign",
        "MIX-2",
        "max for absmax: groups whose largest is negative are cut off.",
        _codes(_LargestOfTheSigned),
    ),
    Fault(
        "a row has one scale",
        "MIX-2",
        "Activations are quantized per token, and one outlier takes the bits of all channels.",
        _codes(_OneScalePerRow),
    ),
    Fault(
        "codes are not cut",
        "MIX-3",
        "The largest over its scale is 127, they say; below the normal numbers it may be 254, which wraps.",
        _codes(_NotCut),
    ),
    Fault(
        "subnormal scales are flushed to zero",
        "MIX-3",
        "A compiler's fast mode.",
        _codes(_FlushesToZero),
    ),
    Fault(
        "the search for the largest skips NaN",
        "MIX-4",
        "fmax for max, and a NaN becomes a code of zero.",
        _codes(_SkipsNan),
    ),
    Fault(
        "a group that is not finite is zero",
        "MIX-4",
        "Scales are cleaned, and the damage spreads unseen.",
        _codes(_CodesOfZero),
    ),
    Fault(
        "offsets are multiplied with half the sum",
        "MIX-6",
        "The record has two sums, and the wrong one is scaled.",
        _codes(_HalfTheSum),
    ),
    Fault(
        "groups of a step share scales",
        "MIX-14",
        "Scales per channel are taken over all tokens of a step: a prompt's results depend on its company.",
        _codes(_OneScalePerStep),
    ),
)
