"""A compiled Program: launches by a step's shape, replayed as a graph where a shape comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.candidates import Candidates
from refengine.errors import RequestError, UnsupportedError
from refengine.memory import KVLayout
from refengine.ops import FloatArray
from refengine.program import MemoryPlan, Program, StepBatch, check_step_batch, concrete
from refengine_cupy.attention import MOST_PARTIALS
from refengine_cupy.binding import Binding
from refengine_cupy.candidates import MOST_LOGITS, CandidateSearch
from refengine_cupy.kv import DeviceKVStorage
from refengine_cupy.lowering import Lowering
from refengine_cupy.runtime import Copy, Memory, Pinned, Runtime, Work
from refengine_cupy.step_arrays import StepArrays, offsets_of, shape_of
from refengine_cupy.step_shape import Places, StepShape
from refengine_cupy.weights import DeviceWeights

GRAPH_TOKENS = 256
"""Steps with more tokens are launched kernel by kernel: they take long enough to hide that."""

MOST_GRAPHS = 64
"""Graphs that are kept; the one that was not used for longest goes."""

INPUT_BYTES = 2**16
"""For a step's arrays, to begin with."""

STAGING_BYTES = 2**22
"""Results up to this size come back through memory that copies are fast with."""


class CupyExecutable:
    """A Program bound to weights, a KV cache and an arena on the device.

    A shape's launches are made when it first comes, and recorded as a graph when it comes again.

    Raises:
        MemoryLimitError: the device has no room for the arena.
        UnsupportedError: a kernel cannot do what the program needs.
    """

    def __init__(
        self,
        runtime: Runtime,
        program: Program,
        plan: MemoryPlan,
        weights: DeviceWeights,
        layout: KVLayout,
        cache: DeviceKVStorage,
    ) -> None:
        self._runtime, self._program, self._plan, self._layout = runtime, program, plan, layout
        self._weights, self._cache = weights, cache  # they live as long as this does
        binding = Binding(
            program, plan, weights.__getitem__, cache.states, layout,
            matrix_units=runtime.matrix_units, warpgroups=runtime.warpgroups,
            multiprocessors=runtime.multiprocessors, shared_bytes=runtime.shared_bytes,
            passing=weights.passing(program),
        )  # fmt: skip
        self._lowering = Lowering(binding)
        output = program.output
        self._dtype = np.dtype(output.dtype or np.float32)
        most = {"S1": plan.sizes.get("S", 1) + 1, **plan.sizes}
        self._output_bytes = prod(concrete(output.shape, most)) * self._dtype.itemsize
        self._arena: Memory = runtime.allocate(max(1, plan.arena_bytes), "activations")
        self._own: Memory = runtime.allocate(max(1, self._output_bytes), "results")
        self._staging = runtime.staging(min(max(16, self._output_bytes), STAGING_BYTES))
        heads = max((i.kv_heads for i in cache.states.values()), default=1)
        self._counters: Memory = runtime.allocate(4 * MOST_PARTIALS * heads, "counters")
        runtime.fill(self._counters.address, 0, 4 * MOST_PARTIALS * heads)
        self._frequencies = self._upload_frequencies()
        self._take_inputs(INPUT_BYTES)
        self._steps: OrderedDict[tuple[StepShape, bool], _Step] = OrderedDict()
        self._ran = 0
        self._search: CandidateSearch | None = None
        rows_of_logits = len(output.shape) == 2 and output.shape[0] == "R" and self._dtype == np.float32
        if rows_of_logits and int(output.shape[1]) <= MOST_LOGITS:
            self._search = CandidateSearch(runtime, *concrete(output.shape, most))

    def run(self, batch: StepBatch) -> FloatArray:
        """One step; see the protocol."""
        return self._result(self._compute(batch))

    def run_candidates(self, batch: StepBatch, temperatures: NDArray[np.float64]) -> Candidates:
        """One step, whose logits stay on the device; see the protocol."""
        if self._search is None:
            raise UnsupportedError("candidates are of float32 logits [R, V], and this result is not")
        if len(temperatures) != len(batch.logit_rows):
            raise RequestError(
                f"there are {len(temperatures)} temperatures for {len(batch.logit_rows)} rows of logits"
            )
        shape = self._compute(batch, temperatures)
        return self._search.read(shape.rows, partial(self._row, self._ran, shape.rows))

    def _compute(self, batch: StepBatch, temperatures: NDArray[np.float64] | None = None) -> StepShape:
        """Queue a step, and what finds its candidates where there are temperatures."""
        check_step_batch(
            batch,
            self._layout,
            vocabulary_size=self._program.vocabulary_size,
            sizes=self._plan.sizes,
        )
        shape = shape_of(batch, self._layout)
        self._ran += 1
        step = self._step(shape, candidates=temperatures is not None)
        step.arrays.write(batch, temperatures)
        step.run()
        return shape

    def _step(self, shape: StepShape, *, candidates: bool) -> _Step:
        """What was made for a shape, or is now."""
        key = shape, candidates
        if (step := self._steps.get(key)) is not None:
            self._steps.move_to_end(key)
            return step
        self._steps[key] = step = self._made(shape, candidates=candidates)
        if len(self._steps) > MOST_GRAPHS:
            self._steps.popitem(last=False)
        return step

    def _made(self, shape: StepShape, *, candidates: bool) -> _Step:
        pools = len(self._layout.groups)
        offsets, nbytes = offsets_of(shape, pools)
        if self._inputs.nbytes < nbytes:
            self._steps.clear()  # they hold addresses
            self._take_inputs(2 * nbytes)
        places = self._places(offsets)
        work = [
            Copy(self._input_staging.address, self._inputs.address, nbytes),
            *self._lowering.launches(shape, places),
        ]
        if candidates and self._search is not None:
            work += self._search.work(shape.rows, places.output, places.inputs["temperatures"])
        arrays = StepArrays(shape, pools, self._input_staging.data)
        return _Step(self._runtime, arrays, work, recorded=shape.tokens <= GRAPH_TOKENS)

    def _take_inputs(self, nbytes: int) -> None:
        self._inputs: Memory = self._runtime.allocate(nbytes, "a step's arrays")
        self._input_staging: Pinned = self._runtime.pinned(nbytes, "a step's arrays")

    def _places(self, offsets: Mapping[str, int]) -> Places:
        return Places(
            arena=self._arena.address,
            output=self._own.address,
            counters=self._counters.address,
            inputs={name: self._inputs.address + offset for name, offset in offsets.items()},
            frequencies={at: memory.address for at, memory in self._frequencies.items()},
        )

    def _result(self, shape: StepShape) -> FloatArray:
        return self._copied(self._own.address, concrete(self._program.output.shape, shape.sizes))

    def _copied(self, address: int, shape: tuple[int, ...]) -> FloatArray:
        """A copy of what lies at an address."""
        result: NDArray[Any] = np.empty(shape, self._dtype)
        if result.nbytes <= self._staging.nbytes:
            staged = self._staging[: result.nbytes]
            self._runtime.download(address, staged)
            result.reshape(-1).view(np.uint8)[...] = staged
        else:
            self._runtime.download(address, result)
        return result

    def _row(self, ran: int, rows: int, row: int) -> FloatArray:
        """A row of the logits of the last step, which must be the one that is meant."""
        if ran != self._ran:
            raise RequestError("the logits of an earlier step are gone: ask for a row before the next step")
        if not 0 <= row < rows:
            raise RequestError(f"the step has {rows} rows of logits, and none is row {row}")
        columns = int(self._program.output.shape[1])
        return self._copied(self._own.address + row * columns * self._dtype.itemsize, (columns,))

    def _upload_frequencies(self) -> dict[int, Memory]:
        kept = {}
        for at, frequencies in self._lowering.rope_tables.items():
            numbers = np.asarray(frequencies, np.float64)
            kept[at] = self._runtime.allocate(max(8, numbers.nbytes), "frequencies")
            self._runtime.upload(kept[at].address, numbers)
        return kept


class _Step:
    """What steps of one shape take: the arrays to fill, then what is queued.

    Args:
        runtime: the device.
        arrays: what the work begins with copying.
        work: what is queued.
        recorded: whether it is run as a graph from the second time on.
    """

    def __init__(self, runtime: Runtime, arrays: StepArrays, work: list[Work], *, recorded: bool) -> None:
        self.arrays = arrays
        self._runtime, self._work, self._recorded = runtime, work, recorded
        self._graph: Callable[[], None] | None = None
        self._ran = False

    def run(self) -> None:
        """Queue it."""
        if self._graph is None and self._recorded and self._ran:
            self._graph = self._runtime.record(self._work)
        self._ran = True
        if self._graph is None:
            self._runtime.launch(self._work)
        else:
            self._graph()
