"""Faults of backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from refengine.backend import Backend, Device, MemoryUse, load
from refengine.backend.interpreter import InterpretedProgram, OpFunction
from refengine.backend.kv_storage import HostKVStorage
from refengine.backend.numpy_backend import NumpyBackend
from refengine.backend.weights import StoredMatrix, WeightPlan, Weights
from refengine.errors import BackendError, RequestError, UnsupportedError
from refengine.memory import KVLayout
from refengine.ops import OPS, FloatArray, LayerCache
from refengine.ops.scratch import Scratch
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


class _SaysNothingOfItsCode(NumpyBackend):
    name = "suspect"
    import_bytes: Any = None


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

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> Weights:
        class Trusting(Weights):
            def operand(self, role: str) -> Any:
                array: FloatArray = weights[role].decode().astype(policy.activations)
                return array

        return Trusting(weights, policy, plan)


def _reading(matrix: type[StoredMatrix]) -> Callable[[], Subject]:
    """A subject whose matrices, where they are read as they are stored, are of this class."""

    class Suspects(Weights):
        def operand(self, role: str) -> FloatArray | StoredMatrix:
            operand = super().operand(role)
            if isinstance(operand, StoredMatrix):
                operand = matrix(self._stored[role], self._policy.activations, streamed=True)
            return operand

    class Suspect(NumpyBackend):
        name = "suspect"

        def upload(
            self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
        ) -> Weights:
            self._weights.append(Suspects(weights, policy, plan))
            return self._weights[-1]

    return partial(Subject, Suspect)


class _Trusting(StoredMatrix):
    def tile(self, start: int, stop: int, scratch: Scratch) -> FloatArray:
        tile: FloatArray = self._stored[np.arange(start, stop)].astype(self.dtype)
        return tile


class _Halving(StoredMatrix):
    def tile(self, start: int, stop: int, scratch: Scratch) -> FloatArray:
        tile = super().tile(start, stop, scratch)
        tile[...] = tile.astype(np.float16)
        return tile


class _Recalling(StoredMatrix):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[int, FloatArray] = {}

    def tile(self, start: int, stop: int, scratch: Scratch) -> FloatArray:
        if stop - start not in self._kept:
            self._kept[stop - start] = super().tile(start, stop, scratch)
        return self._kept[stop - start]


class _Unlimited(NumpyBackend):
    name = "suspect"

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        return super().plan_weights(program, weights, policy, limit and None)


class _FreeOnTheHost(NumpyBackend):
    name = "suspect"

    def devices(self) -> tuple[Device, ...]:
        return tuple(replace(device, free_bytes=device.total_bytes or 2**30) for device in super().devices())


class _ForgetsTheHost(NumpyBackend):
    name = "suspect"

    def plan_weights(
        self, program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None
    ) -> WeightPlan:
        plan = super().plan_weights(program, weights, policy, limit)
        pinned = {role: replace(weight, host=weight.stored) for role, weight in plan.weights.items()}
        return replace(plan, weights=MappingProxyType(pinned))


class _HoldsBoth(NumpyBackend):
    name = "suspect"
    stored = 0

    def upload(
        self, weights: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None = None
    ) -> Weights:
        self.stored += sum(tensor.nbytes for tensor in weights.values())
        return super().upload(weights, policy, plan)

    def memory(self) -> MemoryUse:
        return replace(super().memory(), mapped=self.stored)


class _HalfTheBlock(NumpyBackend):
    def create_cache(self, layout: KVLayout) -> HostKVStorage:
        cache = super().create_cache(layout)
        write = cache.write

        def half(pool: int, block: int, content: NDArray[np.uint8]) -> None:
            kept = cache.read(pool, block)
            kept[: len(kept) // 2] = content[: len(kept) // 2]
            write(pool, block, kept)

        cache.__dict__["write"] = half
        return cache


class _MovesTheBlock(NumpyBackend):
    def create_cache(self, layout: KVLayout) -> HostKVStorage:
        cache = super().create_cache(layout)
        copy = cache.copy

        def move(pool: int, source: int, destination: int) -> None:
            copy(pool, source, destination)
            if source != destination:
                cache.poison(pool, source)

        cache.__dict__["copy"] = move
        return cache


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
        "the host's free memory is told as the device's",
        "BCK-1",
        "What the operating system says is free changes with its file cache, and plans with it.",
        partial(Subject, _FreeOnTheHost),
    ),
    Fault(
        "the bytes of its own code are not told",
        "BCK-1",
        "The backend is older than the attribute, and no plan can be made with it.",
        partial(Subject, _SaysNothingOfItsCode),
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
    Fault(
        "weights are taken as they are where they are read from the file",
        "BCK-14",
        "The check stands where weights are decoded for good, and the other path came later.",
        _reading(_Trusting),
    ),
    Fault(
        "what is decoded for one use is rounded to float16",
        "BCK-15",
        "Half the bytes to write and read back, and nobody can tell the difference in the text.",
        _reading(_Halving),
    ),
    Fault(
        "a tile that was decoded is taken for the next of its size",
        "BCK-15",
        "A cache without the row in its key, over a buffer that is used again.",
        _reading(_Recalling),
    ),
    Fault(
        "a limit is read and not kept",
        "BCK-16",
        "An option that falls through three layers and is dropped in the fourth.",
        partial(Subject, _Unlimited),
    ),
    Fault(
        "copies that stay on the host are planned and not counted",
        "BCK-16",
        "Pinned memory is in no tool's list of what the device holds.",
        partial(Subject, _ForgetsTheHost),
    ),
    Fault(
        "the file stays in memory beside what was decoded of it",
        "BCK-16",
        "Mapped pages are the system's business, until the process is killed for them.",
        partial(Subject, _HoldsBoth),
    ),
    Fault(
        "keys are swapped and values are not",
        "BCK-17",
        "A block is keys and values of all layers, and one of the loops stops early.",
        partial(Subject, _HalfTheBlock),
    ),
    Fault(
        "a copy is a move",
        "BCK-17",
        "What is forked is freed: the parent goes on with what is not its own any more.",
        partial(Subject, _MovesTheBlock),
    ),
)
