"""Faults of chapter *Mixed precision*: in products of float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import NumericalError
from refengine.ops import FloatArray
from refengine.ops.scratch import Scratch
from refengine_conformance.faults.fault import Fault, made_op
from refengine_conformance.subject import Subject

Floats = NDArray[np.float32]

HALF_RANGE = 2.0**15


class _Halves:
    """Products of float16: right as it stands. A fault overrides one method."""

    def __call__(self, x: Floats, weight: Any, bias: Floats | None = None, *, out: FloatArray) -> FloatArray:
        """The op."""
        with np.errstate(all="ignore"):
            powers = self.powers(x)
            left, right = self.activations(x / powers), self.weights(_numbers(weight))
            y = np.stack([self.product(row, right) for row in left]) * powers
            out[...] = y if bias is None else y + bias
        return out

    def powers(self, x: Floats) -> Floats:
        """What rows are divided by."""
        largest = np.abs(x).max(axis=1, keepdims=True)
        fraction, exponent = np.frexp(largest)
        large = (largest > HALF_RANGE) & np.isfinite(largest)
        return np.ldexp(np.float32(1), np.where(large, exponent - 15 - (fraction == 0.5), 0))

    def activations(self, x: Floats) -> Floats:
        """Rounded."""
        return x.astype(np.float16).astype(np.float32)

    def weights(self, weights: Floats) -> Floats:
        """Rounded."""
        halves = weights.astype(np.float16)
        if not np.isfinite(halves).all():
            raise NumericalError("a weight overflows: choose the policy float32")
        return halves.astype(np.float32)

    def product(self, x: Floats, weights: Floats) -> Floats:
        """Of one row."""
        y: Floats = weights @ x
        return y


def _numbers(weight: Any) -> Floats:
    return weight if isinstance(weight, np.ndarray) else weight.tile(0, weight.shape[0], Scratch())


class _ActivationsAsTheyAre(_Halves):
    def activations(self, x: Floats) -> Floats:
        return x


class _Truncates(_Halves):
    def activations(self, x: Floats) -> Floats:
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


class _SumsInHalves(_Halves):
    def product(self, x: Floats, weights: Floats) -> Floats:
        total = np.zeros(len(weights), np.float16)
        for column in range(len(x)):
            total = (total + weights[:, column] * x[column]).astype(np.float16)
        return total.astype(np.float32)


class _FlushesHalves(_Halves):
    def activations(self, x: Floats) -> Floats:
        halves = super().activations(x)
        return np.where(np.abs(halves) < 2.0**-14, np.float32(0), halves)


class _NeverScales(_Halves):
    def powers(self, x: Floats) -> Floats:
        return np.ones((len(x), 1), np.float32)


class _Clamps(_NeverScales):
    def activations(self, x: Floats) -> Floats:
        return super().activations(np.clip(x, -65504, 65504))


class _ScalesByTheLargest(_Halves):
    def powers(self, x: Floats) -> Floats:
        largest = np.abs(x).max(axis=1, keepdims=True)
        large = (largest > HALF_RANGE) & np.isfinite(largest)
        return np.where(large, largest / np.float32(HALF_RANGE), np.float32(1))


class _ScalesTheStep(_Halves):
    def powers(self, x: Floats) -> Floats:
        powers = super().powers(x)
        return np.full_like(powers, powers.max())


class _ClampsWeights(_Halves):
    def weights(self, weights: Floats) -> Floats:
        return np.clip(weights, -65504, 65504).astype(np.float16).astype(np.float32)


def _halves(make: Callable[[], Callable[..., Any]]) -> Callable[[], Subject]:
    return made_op("linear_a16", make, policy="mixed16")


FAULTS: tuple[Fault, ...] = (
    Fault(
        "a step's rows share a power of two",
        "MIX-7",
        "Overflow is avoided for the whole matrix at once: small rows beside a large one lose their digits.",
        _halves(_ScalesTheStep),
    ),
    Fault(
        "activations are not rounded",
        "MIX-9",
        "A fallback for small sizes computes in float32.",
        _halves(_ActivationsAsTheyAre),
    ),
    Fault(
        "activations are truncated",
        "MIX-9",
        "Bits are shifted out where they should be rounded.",
        _halves(_Truncates),
    ),
    Fault(
        "sums are held in float16",
        "MIX-9",
        "The matrix unit's accumulator has a mode for that, and it is twice as fast.",
        _halves(_SumsInHalves),
    ),
    Fault(
        "subnormal halves are flushed to zero",
        "MIX-9",
        "Small activations vanish.",
        _halves(_FlushesHalves),
    ),
    Fault(
        "large activations become infinite",
        "MIX-10",
        "Gemma's activations exceed float16, and logits are NaN.",
        _halves(_NeverScales),
    ),
    Fault(
        "large activations are clamped",
        "MIX-10",
        "A known remedy against the NaN, which gives plausible wrong results.",
        _halves(_Clamps),
    ),
    Fault(
        "rows are divided by their largest",
        "MIX-10",
        "Not by a power of two: every number of the row is rounded once more.",
        _halves(_ScalesByTheLargest),
    ),
    Fault(
        "large weights are clamped",
        "MIX-11",
        "A file in bfloat16 has one weight beyond float16, and nobody hears of it.",
        _halves(_ClampsWeights),
    ),
)
