"""A Program ready to run: one call of compiled code a step, in every thread."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.memory import KVLayout
from refengine.ops import FloatArray
from refengine.program import (
    Instruction,
    MemoryPlan,
    Program,
    StepBatch,
    check_step_batch,
    concrete,
    input_arrays,
)
from refengine_numba import machine_code
from refengine_numba.binding import Binding
from refengine_numba.golden import GoldenCall
from refengine_numba.lowering import LOWERINGS, Site, lower
from refengine_numba.stage_table import StageTable
from refengine_numba.team import Team

OUTPUT = "output"
"""The name of the step's result among the arrays that move."""


class NumbaExecutable:
    """See ``refengine.backend.Executable``.

    Args:
        program: what to compute.
        binding: its values' arrays.
        plan: the largest sizes.
        layout: of the KV cache.
        team: the threads.
        threads: the most of them that may compute: what the working memory is planned for.
        isa: the instruction set to compile for.
    """

    def __init__(
        self,
        program: Program,
        binding: Binding,
        plan: MemoryPlan,
        layout: KVLayout,
        *,
        team: Team,
        threads: int,
        isa: str,
    ) -> None:
        self._program, self._binding, self._plan, self._layout = program, binding, plan, layout
        self._team, self._threads = team, threads
        self._dtype = binding.array(program.output).dtype
        moving = {leaf.name: binding.array(leaf) for leaf in program.leaves if leaf.kind == "input"}
        # What is only another name for a value in the arena is copied from there.
        self._renamed = any(i.result is program.output and i.op.sharing == "view" for i in program)
        if not self._renamed:
            moving[OUTPUT] = binding.array(program.output)
        numbered = [(at, i) for at, i in enumerate(program) if i.op.sharing != "view"]
        self._parts: list[StageTable | GoldenCall] = []
        for native, group in groupby(numbered, key=lambda pair: pair[1].op.name in LOWERINGS):
            if native:
                sites = [self._site(at, instruction, isa) for at, instruction in group]
                self._parts.append(StageTable([stage for site in sites for stage in lower(site)], moving))
            else:
                self._parts += [GoldenCall(i, at, binding, program.output, OUTPUT) for at, i in group]
        machine_code.give_back()  # all kernels are there

    def run(self, batch: StepBatch) -> FloatArray:
        """One step; see the protocol."""
        check_step_batch(
            batch,
            self._layout,
            vocabulary_size=self._program.vocabulary_size,
            sizes=self._plan.sizes,
        )
        sizes = {"T": len(batch.token_ids), "S": len(batch.context_lens), "R": len(batch.logit_rows)}
        sizes |= {f"M{pool}": tables.shape[1] for pool, tables in enumerate(batch.block_tables)}
        arrays: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(array, np.int32) for name, array in input_arrays(batch).items()
        }
        arrays[OUTPUT] = logits = np.empty(concrete(self._program.output.shape, sizes), self._dtype)
        for part in self._parts:
            part.run(self._team, self._threads, sizes, arrays)
        if self._renamed:
            logits[...] = self._binding.array(self._program.output)[: len(logits)]
        return logits

    def _site(self, at: int, instruction: Instruction, isa: str) -> Site:
        return Site(
            instruction,
            self._binding.operands(instruction),
            self._binding.array(instruction.result),
            self._binding.workspace(at),
            isa,
            self._threads,
        )
