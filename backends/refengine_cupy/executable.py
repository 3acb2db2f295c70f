"""A compiled Program: launches by a step's shape, replayed as a graph where a shape comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
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
from refengine_cupy.runtime import Memory, Runtime, Work
from refengine_cupy.step_arrays import offsets_of, shape_of, write_arrays
from refengine_cupy.step_shape import Places, StepShape
from refengine_cupy.weights import DeviceWeights

GRAPH_TOKENS = 256
"""Steps with more tokens are launched kernel by kernel: they take long enough to hide that."""

MOST_GRAPHS = 64
"""Graphs that are kept; the one that was not used for longest goes."""

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
        self._inputs: Memory | None = None
        self._input_staging: NDArray[np.uint8] = np.empty(0, np.uint8)
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
        return self._search.read(shape.rows, partial(self._row, self._ran, shape))

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
        self._send(batch, shape, temperatures)
        self._step(shape, candidates=temperatures is not None)()
        return shape

    def _send(self, batch: StepBatch, shape: StepShape, temperatures: NDArray[np.float64] | None) -> None:
        offsets, nbytes = offsets_of(shape, len(self._layout.groups))
        if self._inputs is None or self._inputs.nbytes < nbytes:
            self._steps.clear()  # they hold addresses
            self._inputs = self._runtime.allocate(2 * nbytes, "a step's arrays")
            self._input_staging = self._runtime.staging(2 * nbytes)
        staged = self._input_staging[:nbytes]
        write_arrays(batch, shape, offsets, staged)
        if temperatures is not None:
            at = offsets["temperatures"]
            staged[at : at + 8 * shape.rows].view(np.float64)[...] = temperatures
        self._runtime.upload(self._inputs.address, staged)

    def _step(self, shape: StepShape, *, candidates: bool) -> Callable[[], None]:
        step = self._steps.pop((shape, candidates), None)
        if step is None:
            places = self._places(shape)
            launches = self._lowering.launches(shape, places)
            if candidates and self._search is not None:
                launches += self._search.launches(shape.rows, places.output, places.inputs["temperatures"])
            step = _Step(self._runtime, launches)
        self._steps[shape, candidates] = step
        if len(self._steps) > MOST_GRAPHS:
            self._steps.popitem(last=False)
        return step.run if shape.tokens <= GRAPH_TOKENS else step.launch

    def _places(self, shape: StepShape) -> Places:
        offsets, _ = offsets_of(shape, len(self._layout.groups))
        start = 0 if self._inputs is None else self._inputs.address
        return Places(
            arena=self._arena.address,
            output=self._own.address,
            counters=self._counters.address,
            inputs={name: start + offset for name, offset in offsets.items()},
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

    def _row(self, ran: int, shape: StepShape, row: int) -> FloatArray:
        """A row of the logits of the last step, which must be the one that is meant."""
        if ran != self._ran:
            raise RequestError("the logits of an earlier step are gone: ask for a row before the next step")
        if not 0 <= row < shape.rows:
            raise RequestError(f"the step has {shape.rows} rows of logits, and none is row {row}")
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
    """The launches of one shape."""

    def __init__(self, runtime: Runtime, launches: list[Work]) -> None:
        self._runtime, self._launches = runtime, launches
        self._graph: Callable[[], None] | None = None
        self._runs = 0

    def launch(self) -> None:
        """One kernel after the other."""
        self._runtime.launch(self._launches)

    def run(self) -> None:
        """As a graph from the second time on."""
        self._runs += 1
        if self._graph is None and self._runs > 1:
            self._graph = self._runtime.record(self._launches)
        if self._graph is None:
            self.launch()
        else:
            self._graph()
