"""Faults of the mixed policies (chapter *Mixed precision*)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine import ops
from refengine.backend.interpreter import InterpretedProgram
from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import NumericalError
from refengine.ops import FloatArray
from refengine.ops.linear_a8 import GROUP, GroupedMatrix
from refengine.ops.scratch import Scratch
from refengine.program import (
    POLICIES,
    Instruction,
    MemoryPlan,
    Policy,
    Program,
    Value,
    apply_policy,
    plan_memory,
)
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HALF_RANGE = 2.0**15


def _op(policy: str, op: str, make: Callable[[], Callable[..., Any]]) -> Callable[[], Subject]:
    """A subject with one wrong op, under a policy."""
    return lambda: replace(faulty_op(op, make())(), policy=POLICIES[policy])


# -- Codes -------------------------------------------------------------------------------------------------


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


# -- Products of codes -------------------------------------------------------------------------------------


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


# -- Products of float16 -----------------------------------------------------------------------------------


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


# -- Programs ----------------------------------------------------------------------------------------------


def _pass(change: Callable[..., Program], policy: str = "mixed8") -> Callable[[], Subject]:
    """A subject whose precision pass is another."""
    return lambda: Subject(NumpyBackend, policy=POLICIES[policy], apply_policy=change)


def _codes_for_each(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    """Codes an activation anew for every product."""
    instructions: list[Instruction] = []
    made: dict[int, Instruction] = {}
    used: set[int] = set()
    number = 10_000
    for instruction in apply_policy(program, policy, encodings):
        codes = instruction.operands[0] if instruction.op.name == "linear_a8" else None
        if instruction.op.name == "quantize_a8":
            made[instruction.result.index] = instruction
        if codes is not None and codes.index in used:
            number += 1
            again = replace(codes, index=number)
            instructions.append(replace(made[codes.index], result=again))
            instruction = replace(instruction, operands=(again, *instruction.operands[1:]))
        elif codes is not None:
            used.add(codes.index)
        instructions.append(instruction)
    return Program(tuple(instructions), instructions[-1].result)


def _no_biases(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    found = apply_policy(program, policy, encodings)
    kept = tuple(
        replace(i, operands=i.operands[:2]) if i.op.name in ("linear_a8", "linear_a16") else i for i in found
    )
    return Program(kept, found.output)


def _all_but_the_logits(program: Program, policy: Policy, encodings: Mapping[str, str]) -> Program:
    """Leaves the last product alone, as some engines do."""
    last = [i for i in program if i.op.name == "linear"][-1]
    weight = last.operands[1]
    spared = {} if weight is None else {weight.name: "f32"}
    return apply_policy(program, policy, {**encodings, **spared})


class _StaleCodes(NumpyBackend):
    """Reads the first codes of their shape for every product."""

    name = "suspect"

    def compile(self, program: Program, *rest: Any, **options: Any) -> InterpretedProgram:
        first: dict[tuple[Any, ...], Value] = {}
        for i in program:
            if i.op.name == "quantize_a8":
                first.setdefault(i.result.shape, i.result)
        changed = tuple(
            replace(i, operands=(first[i.operands[0].shape], *i.operands[1:]))
            if i.op.name == "linear_a8" and i.operands[0] is not None
            else i
            for i in program
        )
        policy, plan, *others = rest
        changed_program = Program(changed, program.output)
        plan = plan_memory(changed_program, policy, plan.sizes, lambda i, s: self.workspace(i, s, policy))
        return super().compile(changed_program, policy, plan, *others, **options)


class _HalfNorm(NumpyBackend):
    """Computes norms in float16 too, under policies that are mixed."""

    name = "suspect"

    def compile(self, program: Program, policy: Policy, *rest: Any, **options: Any) -> InterpretedProgram:
        executable = super().compile(program, policy, *rest, **options)
        if policy.products != "plain":
            functions = vars(executable)["_functions"]
            functions["rms_norm"] = _half_norm
        return executable


def _half_norm(
    x: FloatArray, weight: FloatArray, *, eps: float, out: FloatArray, scratch: Any = None
) -> FloatArray:
    ops.rms_norm(x, weight, eps=eps, out=out)
    out[...] = out.astype(np.float16)
    return out


def _plan(change: Callable[..., MemoryPlan]) -> Callable[[], Subject]:
    return lambda: Subject(NumpyBackend, policy=POLICIES["mixed8"], plan=change)


def _codes_as_activations(program: Program, policy: Policy, *rest: Any) -> MemoryPlan:
    """Counts every element of a value four bytes."""
    plain = tuple(replace(i, result=replace(i.result, dtype=None)) for i in program)
    output = plain[-1].result if program.output is program.instructions[-1].result else program.output
    return plan_memory(Program(plain, output), policy, *rest)


def _codes_die_young(program: Program, policy: Policy, *rest: Any) -> MemoryPlan:
    """Lets codes live to the first product that reads them."""
    seen: set[int] = set()
    shortened = []
    for i in program:
        codes = i.operands[0] if i.op.name == "linear_a8" else None
        if codes is not None and codes.index in seen:
            i = replace(i, operands=(None, *i.operands[1:]))
        elif codes is not None:
            seen.add(codes.index)
        shortened.append(i)
    return plan_memory(Program(tuple(shortened), program.output), policy, rest[0])


FAULTS: tuple[Fault, ...] = (
    Fault(
        "codes are made for each product",
        "MIX-1",
        "Query, key and value each quantize the same activations: three times the work.",
        _pass(_codes_for_each),
    ),
    Fault(
        "biases are lost",
        "MIX-1",
        "Models without biases are tested, and one family has some.",
        _pass(_no_biases),
    ),
    Fault(
        "logits are computed plainly",
        "MIX-1",
        "The last product is left in full precision, as other engines do: not what is specified.",
        _pass(_all_but_the_logits),
    ),
    Fault(
        "ties of codes are rounded away from zero",
        "MIX-2",
        "roundf for rintf.",
        _op("mixed8", "quantize_a8", _AwayFromZero),
    ),
    Fault(
        "activations are multiplied by the inverse of their scale",
        "MIX-2",
        "A division is saved, and here and there a code is another.",
        _op("mixed8", "quantize_a8", _ByTheInverse),
    ),
    Fault(
        "the largest activation is sought with its sign",
        "MIX-2",
        "max for absmax: groups whose largest is negative are cut off.",
        _op("mixed8", "quantize_a8", _LargestOfTheSigned),
    ),
    Fault(
        "a row has one scale",
        "MIX-2",
        "Activations are quantized per token, and one outlier takes the bits of all channels.",
        _op("mixed8", "quantize_a8", _OneScalePerRow),
    ),
    Fault(
        "codes are not cut",
        "MIX-3",
        "The largest over its scale is 127, they say; below the normal numbers it may be 254, which wraps.",
        _op("mixed8", "quantize_a8", _NotCut),
    ),
    Fault(
        "subnormal scales are flushed to zero",
        "MIX-3",
        "A compiler's fast mode.",
        _op("mixed8", "quantize_a8", _FlushesToZero),
    ),
    Fault(
        "the search for the largest skips NaN",
        "MIX-4",
        "fmax for max, and a NaN becomes a code of zero.",
        _op("mixed8", "quantize_a8", _SkipsNan),
    ),
    Fault(
        "a group that is not finite is zero",
        "MIX-4",
        "Scales are cleaned, and the damage spreads unseen.",
        _op("mixed8", "quantize_a8", _CodesOfZero),
    ),
    Fault(
        "integer sums saturate",
        "MIX-5",
        "Pairs of products are added in 16 bits, as one instruction does.",
        _op("mixed8", "linear_a8", _Saturates),
    ),
    Fault(
        "one half of a group is summed twice",
        "MIX-5",
        "The second sixteen are read from where the first lie.",
        _op("mixed8", "linear_a8", _HalfSums),
    ),
    Fault(
        "groups are added from right to left",
        "MIX-6",
        "A loop counts down to zero.",
        _op("mixed8", "linear_a8", _RightToLeft),
    ),
    Fault(
        "a group is rounded before it is added",
        "MIX-6",
        "Multiplication and addition instead of a fused one: another compiler flag, other bits.",
        _op("mixed8", "linear_a8", _MultipliesThenAdds),
    ),
    Fault(
        "scales are multiplied one after the other",
        "MIX-6",
        "(d · I) · s for (d · s) · I.",
        _op("mixed8", "linear_a8", _ScalesOneByOne),
    ),
    Fault(
        "offsets are not fused",
        "MIX-6",
        "One of two sums is, as the compiler likes it.",
        _op("mixed8", "linear_a8", _OffsetIsNotFused),
    ),
    Fault(
        "sums begin with the bias",
        "MIX-6",
        "The accumulator is set to it, to save an addition.",
        _op("mixed8", "linear_a8", _BiasFirst),
    ),
    Fault(
        "offsets are multiplied with half the sum",
        "MIX-6",
        "The record has two sums, and the wrong one is scaled.",
        _op("mixed8", "quantize_a8", _HalfTheSum),
    ),
    Fault(
        "few rows are summed in another order",
        "MIX-7",
        "Decoding has a kernel of its own, split over the columns.",
        _op("mixed8", "linear_a8", _SplitWhereRowsAreFew),
    ),
    Fault(
        "a step's rows share a power of two",
        "MIX-7",
        "Overflow is avoided for the whole matrix at once: small rows beside a large one lose their digits.",
        _op("mixed16", "linear_a16", _ScalesTheStep),
    ),
    Fault(
        "offsets are forgotten",
        "MIX-8",
        "Q4_1 is read as Q4_0.",
        _op("mixed8", "linear_a8", _NoOffset),
    ),
    Fault(
        "a group has the next one's scale",
        "MIX-8",
        "Scales are read ahead, and the pointer has moved already.",
        _op("mixed8", "linear_a8", _ScaleOfTheNextGroup),
    ),
    Fault(
        "activations are not rounded",
        "MIX-9",
        "A fallback for small sizes computes in float32.",
        _op("mixed16", "linear_a16", _ActivationsAsTheyAre),
    ),
    Fault(
        "activations are truncated",
        "MIX-9",
        "Bits are shifted out where they should be rounded.",
        _op("mixed16", "linear_a16", _Truncates),
    ),
    Fault(
        "sums are held in float16",
        "MIX-9",
        "The matrix unit's accumulator has a mode for that, and it is twice as fast.",
        _op("mixed16", "linear_a16", _SumsInHalves),
    ),
    Fault(
        "subnormal halves are flushed to zero",
        "MIX-9",
        "Small activations vanish.",
        _op("mixed16", "linear_a16", _FlushesHalves),
    ),
    Fault(
        "large activations become infinite",
        "MIX-10",
        "Gemma's activations exceed float16, and logits are NaN.",
        _op("mixed16", "linear_a16", _NeverScales),
    ),
    Fault(
        "large activations are clamped",
        "MIX-10",
        "A known remedy against the NaN, which gives plausible wrong results.",
        _op("mixed16", "linear_a16", _Clamps),
    ),
    Fault(
        "rows are divided by their largest",
        "MIX-10",
        "Not by a power of two: every number of the row is rounded once more.",
        _op("mixed16", "linear_a16", _ScalesByTheLargest),
    ),
    Fault(
        "large weights are clamped",
        "MIX-11",
        "A file in bfloat16 has one weight beyond float16, and nobody hears of it.",
        _op("mixed16", "linear_a16", _ClampsWeights),
    ),
    Fault(
        "norms are rounded to float16 too",
        "MIX-12",
        "A policy for products is taken for one for everything.",
        lambda: Subject(_HalfNorm, policy=POLICIES["mixed16"]),
    ),
    Fault(
        "codes of the first norm are read again",
        "MIX-13",
        "Codes are kept by their size, and another activation has the same.",
        lambda: Subject(_StaleCodes, policy=POLICIES["mixed8"]),
    ),
    Fault(
        "groups of a step share scales",
        "MIX-14",
        "Scales per channel are taken over all tokens of a step: a prompt's results depend on its company.",
        _op("mixed8", "quantize_a8", _OneScalePerStep),
    ),
    Fault(
        "groups are added as they come",
        "MIX-14",
        "Threads add their parts to one sum, whoever is first.",
        _op("mixed8", "linear_a8", _AnyOrder),
    ),
    Fault(
        "codes take four times their place",
        "MIX-15",
        "Every value is counted in the policy's dtype.",
        _plan(_codes_as_activations),
    ),
    Fault(
        "codes give way after their first product",
        "MIX-15",
        "Their life is that of an operand read once: keys are computed from what was written over them.",
        _plan(_codes_die_young),
    ),
)
