"""Faults of backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import numpy as np

from refengine.backend import Backend, Device, MemoryUse, load
from refengine.backend.interpreter import DecodedWeights, InterpretedProgram, OpFunction
from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import BackendError, RequestError, UnsupportedError
from refengine.ops import OPS, FloatArray, LayerCache
from refengine.program import MemoryPlan, Policy, Program, StepBatch, plan_memory
from refengine.quantizer import LazyTensor
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject

Run = Callable[[StepBatch], FloatArray]


def _running(wrong: Callable[[Run, StepBatch], FloatArray]) -> Callable[[], Subject]:
    """A subject whose steps are run by ``wrong(run, batch)``."""

    class Suspect(NumpyBackend):
        name = "suspect"

        def compile(self, *arguments: Any, **options: Any) -> InterpretedProgram:
            executable = super().compile(*arguments, **options)
            vars(executable)["run"] = partial(wrong, executable.run)
            return executable

    return partial(Subject, Suspect)


def _one_result(run: Run, batch: StepBatch, kept: dict[Run, FloatArray]) -> FloatArray:
    logits = run(batch)
    if run not in kept:
        kept[run] = np.empty((256, logits.shape[1]), logits.dtype)
    kept[run][: len(logits)] = logits
    logits = kept[run][: len(logits)]
    return logits


def _doubles(run: Run, batch: StepBatch) -> FloatArray:
    logits: FloatArray = run(batch).astype(np.float64)
    return logits


def _all_rows(run: Run, batch: StepBatch) -> FloatArray:
    return run(replace(batch, logit_rows=np.arange(len(batch.token_ids), dtype=np.int32)))


def _scratch_ids(run: Run, batch: StepBatch) -> FloatArray:
    logits = run(batch)
    batch.token_ids[...] = 0
    return logits


def _noisy(run: Run, batch: StepBatch, calls: count[int]) -> FloatArray:
    logits = run(batch)
    noisy: FloatArray = logits * logits.dtype.type(1 + next(calls) * 2.0**-20)
    return noisy


def _bare_error(run: Run, batch: StepBatch) -> FloatArray:
    try:
        return run(batch)
    except RequestError as error:
        raise IndexError(str(error)) from None


def _clamps_tables(run: Run, batch: StepBatch) -> FloatArray:
    return run(replace(batch, block_tables=tuple(table.clip(0) for table in batch.block_tables)))


def _strict_tables(run: Run, batch: StepBatch) -> FloatArray:
    if any((table < 0).any() for table in batch.block_tables):
        raise RequestError("block_tables hold a negative entry")
    return run(batch)


class _ClearsFirst(NumpyBackend):
    """Clears the slots that a step will write, before it looks at the step."""

    name = "suspect"

    def compile(self, *arguments: Any, **options: Any) -> Any:
        executable = super().compile(*arguments, **options)
        caches: dict[int, LayerCache] = arguments[5]
        run = executable.run

        def clearing(batch: StepBatch) -> FloatArray:
            slots = np.concatenate(batch.slot_mapping)
            for cache in caches.values():
                for blocks in cache:
                    rows = blocks.reshape(-1, *blocks.shape[2:])
                    rows[slots[(slots >= 0) & (slots < len(rows))]] = 0
            return run(batch)

        vars(executable)["run"] = clearing
        return executable


class _NoDevice(NumpyBackend):
    name = "suspect"

    def devices(self) -> tuple[Device, ...]:
        return ()


class _PromisesTooMuch(NumpyBackend):
    name = "suspect"
    native: ClassVar[Mapping[str, OpFunction]] = MappingProxyType(
        {name: function for name, function in NumpyBackend.native.items() if name != "gated"}
    )

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        return NumpyBackend().support(op, encoding=encoding, policy=policy)

    def compile(self, *arguments: Any, **options: Any) -> NoReturn:
        raise UnsupportedError("the op gated is not implemented")


class _FallsBackSilently(NumpyBackend):
    name = "suspect"
    native: ClassVar[Mapping[str, OpFunction]] = MappingProxyType(
        {name: function for name, function in NumpyBackend.native.items() if name != "gated"}
    )

    def compile(self, *arguments: Any, fallback: bool = False) -> InterpretedProgram:
        return super().compile(*arguments, fallback=True)


class _GrowsSilently(NumpyBackend):
    name = "suspect"

    def compile(self, program: Program, policy: Policy, plan: MemoryPlan, *rest: Any, **options: Any) -> Any:
        twice = {symbol: 2 * size for symbol, size in plan.sizes.items()}
        return super().compile(program, policy, plan_memory(program, policy, twice), *rest, **options)


class _DoubleBuffered(NumpyBackend):
    name = "suspect"

    def memory(self) -> MemoryUse:
        use = super().memory()
        return replace(use, arena=2 * use.arena)


class _ForgetsKeys(NumpyBackend):
    name = "suspect"

    def memory(self) -> MemoryUse:
        use = super().memory()
        return replace(use, kv_cache=use.kv_cache // 2)


class _TrustsWeights(NumpyBackend):
    name = "suspect"

    def upload(self, weights: Mapping[str, LazyTensor], policy: Policy) -> DecodedWeights:
        class Trusting(DecodedWeights):
            def decoded(self, role: str) -> FloatArray:
                array: FloatArray = weights[role].decode().astype(policy.activations)
                return array

            def table(self, role: str) -> Any:
                return weights[role]

        return Trusting(weights, policy)


def _one_row_backwards(x: FloatArray, weight: FloatArray, *rest: Any, **options: Any) -> FloatArray:
    """A kernel of its own for one token, which sums in another order."""
    if len(x) == 1:
        x, weight = np.ascontiguousarray(x[:, ::-1]), np.ascontiguousarray(weight[:, ::-1])
    y: FloatArray = OPS["linear"].golden(x, weight, *rest, **options)
    return y


def _accumulates(x: FloatArray, weight: FloatArray, *rest: Any, out: FloatArray | None = None) -> FloatArray:
    """Adds its product to what lies in the result's memory, taking it for zero."""
    y: FloatArray = OPS["linear"].golden(x, weight, *rest)
    if out is None:
        return y
    out += y
    return out


def _interleaved_groups(q: FloatArray, cache: LayerCache, *rest: Any, **options: Any) -> FloatArray:
    """Query head h reads key head h mod G."""
    heads, kv_heads = q.shape[1], cache.keys.shape[2]
    order = np.arange(heads).reshape(-1, kv_heads).T.ravel()
    out: FloatArray = np.empty_like(q) if options.get("out") is None else options["out"]
    options.pop("out", None)
    out[...] = OPS["attention"].golden(q[:, order], cache, *rest, **options)[:, np.argsort(order)]
    return out


def _loads_without_advice(name: str) -> Backend:
    try:
        return load(name)
    except BackendError as error:
        raise type(error)(state=error.state, available=error.available, why=error.why, mend="") from None


FAULTS: tuple[Fault, ...] = (
    Fault(
        "no device is found",
        "BCK-1",
        "A driver that answers, and has nothing to offer.",
        partial(Subject, _NoDevice),
    ),
    Fault(
        "an op is promised and then refused",
        "BCK-2",
        "A table of support that is typed by hand and contradicts the code.",
        partial(Subject, _PromisesTooMuch),
    ),
    Fault(
        "what is missing runs on the golden op, and nobody is told",
        "BCK-2",
        "The GPU seems slow, and is idle.",
        partial(Subject, _FallsBackSilently),
    ),
    Fault(
        "logits are float64",
        "BCK-3",
        "One Python float too many, and the result is promoted.",
        _running(_doubles),
    ),
    Fault(
        "logits of every token are given",
        "BCK-3",
        "Row selection is an optimisation, until somebody counts rows.",
        _running(_all_rows),
    ),
    Fault(
        "the result is a view of a buffer that the next step fills",
        "BCK-4",
        "Pinned staging buffers are too dear to make twice.",
        _running(partial(_one_result, kept={})),
    ),
    Fault(
        "token ids serve as scratch",
        "BCK-5",
        "The array is there, has the right size, and nobody needs it any more.",
        _running(_scratch_ids),
    ),
    Fault(
        "the slots of a step are cleared before it is checked",
        "BCK-6",
        "Checks and clearing are two kernels, launched in the wrong order.",
        partial(Subject, _ClearsFirst),
    ),
    Fault(
        "what is out of range raises what the array library raises",
        "BCK-6",
        "Nobody checks, because indexing does.",
        _running(_bare_error),
    ),
    Fault(
        "a negative block is taken for block 0",
        "BCK-6",
        "Clamped indices are the graphics world's way of not crashing.",
        _running(_clamps_tables),
    ),
    Fault(
        "every entry of a block table must name a block",
        "BCK-7",
        "A check that is written before windows release their blocks.",
        _running(_strict_tables),
    ),
    Fault(
        "the arena grows for a step that is too large",
        "BCK-8",
        "Convenient, until the memory was promised to somebody else.",
        partial(Subject, _GrowsSilently),
    ),
    Fault(
        "no two results are equal",
        "BCK-9",
        "Atomic additions arrive in any order.",
        _running(partial(_noisy, calls=count())),
    ),
    Fault(
        "a product is added to memory that is taken for zero",
        "BCK-9",
        "Fresh memory happens to be zero, reused memory is not.",
        faulty_op("linear", _accumulates),
    ),
    Fault(
        "query heads are dealt out to key heads in turn",
        "BCK-10",
        "repeat and tile differ by one word; every op test with one key head passes.",
        faulty_op("attention", _interleaved_groups),
    ),
    Fault(
        "one token takes another path than many",
        "BCK-11",
        "Decoding has a matrix-vector kernel, prefill a matrix-matrix kernel (vLLM, llama.cpp).",
        faulty_op("linear", _one_row_backwards),
    ),
    Fault(
        "the arena is double-buffered",
        "BCK-12",
        "Copies overlap with computing, for twice the planned memory.",
        partial(Subject, _DoubleBuffered),
    ),
    Fault(
        "only keys are counted",
        "BCK-12",
        "Keys and values are two pools, and one is forgotten.",
        partial(Subject, _ForgetsKeys),
    ),
    Fault(
        "an error about a backend does not say how to mend it",
        "BCK-13",
        "A template that is never formatted, because no test walks the error path.",
        partial(Subject, partial(load, "numpy"), load=_loads_without_advice),
    ),
    Fault(
        "weights are taken as they are",
        "BCK-14",
        "NaN comes out at the other end, a hundred layers later.",
        partial(Subject, _TrustsWeights),
    ),
)
