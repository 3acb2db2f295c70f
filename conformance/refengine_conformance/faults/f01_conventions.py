"""Faults of arithmetic in general: a backend that keeps less than the conventions ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any

import numpy as np

from refengine.backend import MemoryUse
from refengine.backend.interpreter import InterpretedProgram
from refengine.backend.numpy_backend import NumpyBackend
from refengine.backend.weights import WeightPlan, Weights
from refengine.ops import FloatArray, add, embedding, linear, scale
from refengine.program import Policy, StepBatch
from refengine.quantizer import LazyTensor
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject


def _give(result: FloatArray, out: FloatArray | None) -> FloatArray:
    if out is None:
        return result
    out[...] = result
    return out


def _without_subnormals(token_ids: Any, table: Any, *, out: FloatArray | None = None) -> FloatArray:
    rows = embedding(token_ids, table)
    return _give(np.where(np.abs(rows) < np.finfo(np.float32).smallest_normal, 0, rows), out)


def _truncated_add(x: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    total = add(x, y)
    rest = np.where(
        np.abs(x) >= np.abs(y), y - (total - x), x - (total - y)
    )  # what rounding took away (Dekker)
    return _give(np.where(rest * total < 0, np.nextafter(total, 0, dtype=x.dtype), total), out)


def _scale_by_quotient(x: FloatArray, *, factor: float, out: FloatArray | None = None) -> FloatArray:
    return _give(x / (1 / x.dtype.type(factor)), out)


def _half_sums(
    x: FloatArray, weight: FloatArray, bias: FloatArray | None = None, *, out: FloatArray | None = None
) -> FloatArray:
    sums = linear(x.astype(np.float16), weight.astype(np.float16), bias)
    return _give(sums.astype(x.dtype), out)


def _short_operands(
    x: FloatArray, weight: FloatArray, bias: FloatArray | None = None, *, out: FloatArray | None = None
) -> FloatArray:
    return linear(_to_ten_bits(x), _to_ten_bits(weight), bias, out=out)


def _to_ten_bits(x: FloatArray) -> FloatArray:
    """As TF32 keeps them: ten bits behind the point."""
    fraction, exponent = np.frexp(x)
    short: FloatArray = np.ldexp(np.round(fraction * 2**11), exponent - 11)
    return short.astype(x.dtype)


def _flushing_scale(x: FloatArray, *, factor: float, out: FloatArray | None = None) -> FloatArray:
    scaled = scale(x, factor=factor)
    return _give(np.where(np.abs(scaled) < 8 * np.finfo(x.dtype).smallest_normal, 0 * scaled, scaled), out)


def _lopsided_add(x: FloatArray, y: FloatArray, *, out: FloatArray | None = None) -> FloatArray:
    return _give((x.astype(np.float16) + y).astype(x.dtype), out)


def _shuffled_linear(
    orders: Any, x: FloatArray, weight: FloatArray, *rest: Any, **options: Any
) -> FloatArray:
    order = np.random.default_rng(next(orders)).permutation(x.shape[1])
    return linear(x[:, order], np.ascontiguousarray(weight[:, order]), *rest, **options)


def _split_when_few(x: FloatArray, weight: FloatArray, *rest: Any, **options: Any) -> FloatArray:
    order = slice(None, None, -1) if len(x) <= 2 else slice(None)
    return linear(np.ascontiguousarray(x[:, order]), np.ascontiguousarray(weight[:, order]), *rest, **options)


def _doubling(run: Callable[[StepBatch], FloatArray], batch: StepBatch) -> FloatArray:
    return run(batch).astype(np.float64)


class _Promoting(NumpyBackend):
    """Whose executables give float64, under every policy."""

    def compile(self, *arguments: Any, **options: Any) -> InterpretedProgram:
        executable = super().compile(*arguments, **options)
        vars(executable)["run"] = partial(_doubling, executable.run)
        return executable


class _HalfWeights(NumpyBackend):
    """That repacks every weight as float16."""

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> Weights:
        repacked = {
            name: LazyTensor(t.name, t.shape, "f16", t.decode().astype("<f2").view(np.uint8))
            for name, t in weights.items()
        }
        return super().upload(repacked, policy, plan)


class _Boasting(NumpyBackend):
    """That supports whatever it is asked about."""

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        return None


class _Refusing(NumpyBackend):
    """That says it supports every op, and lacks one."""

    native = MappingProxyType({op: f for op, f in NumpyBackend.native.items() if op != "rms_norm"})

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        asked_from_outside = encoding is not None
        return None if asked_from_outside else super().support(op, encoding=encoding, policy=policy)


class _Scratching(NumpyBackend):
    """That keeps a scratch buffer beside its arena."""

    def memory(self) -> MemoryUse:
        use = super().memory()
        return replace(use, arena=use.arena + 4096)


def _shuffling() -> Subject:
    return faulty_op("linear", partial(_shuffled_linear, count()))()


FAULTS: tuple[Fault, ...] = (
    Fault(
        "embedding flushes subnormals",
        "CNV-1",
        "A kernel compiled with fast-math flushes what it only had to copy.",
        faulty_op("embedding", _without_subnormals),
    ),
    Fault(
        "add rounds towards zero",
        "CNV-2",
        "A device whose adder truncates, as early GPUs and some DSPs do.",
        faulty_op("add", _truncated_add),
    ),
    Fault(
        "scale divides by the reciprocal",
        "CNV-3",
        "An algebraic simplification that real numbers allow, and rounding does not.",
        faulty_op("scale", _scale_by_quotient),
    ),
    Fault(
        "linear shortens its operands",
        "CNV-4",
        "TF32 tensor cores, which libraries switch on without being asked.",
        faulty_op("linear", _short_operands),
    ),
    Fault(
        "scale flushes normal numbers",
        "CNV-5",
        "A hand-written flush to zero, with a threshold that is a little too large.",
        faulty_op("scale", _flushing_scale),
    ),
    Fault(
        "add holds its first operand in 16 bits",
        "CNV-6",
        "A residual that is kept in the narrower of two dtypes.",
        faulty_op("add", _lopsided_add),
    ),
    Fault(
        "add rounds towards zero, seen at one",
        "CNV-7",
        "With truncation, u is twice what it is believed to be.",
        faulty_op("add", _truncated_add),
    ),
    Fault(
        "results silently become float64",
        "CNV-8",
        "One Python float among NumPy arrays did this to a textbook implementation of Llama.",
        partial(Subject, _Promoting),
    ),
    Fault(
        "linear accumulates in float16",
        "CNV-9",
        "A BLAS call whose compute type is left at the type of its operands.",
        faulty_op("linear", _half_sums),
    ),
    Fault(
        "weights are repacked as float16",
        "CNV-10",
        "A loader that converts everything to the dtype its kernels like.",
        partial(Subject, _HalfWeights),
    ),
    Fault(
        "every op is said to be supported",
        "CNV-11",
        "A backend's support function that nobody kept up with its kernels.",
        partial(Subject, _Boasting),
    ),
    Fault(
        "a supported op is refused",
        "CNV-11",
        "A table of support, and a table of kernels, each typed by hand.",
        partial(Subject, _Refusing),
    ),
    Fault(
        "linear adds in another order each time",
        "CNV-12",
        "Partial sums joined by atomic addition, in the order in which thread blocks finish.",
        _shuffling,
    ),
    Fault(
        "linear has another kernel for few rows",
        "CNV-13",
        "Every BLAS has one, and so decoding differs from prefill.",
        faulty_op("linear", _split_when_few),
    ),
    Fault(
        "a scratch buffer beside the arena",
        "CNV-14",
        "A library's workspace, which nobody had counted.",
        partial(Subject, _Scratching),
    ),
)
