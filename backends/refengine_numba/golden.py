"""Golden ops in the place of kernels that there are not: for programs that may fall back on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.ops.scratch import Scratch
from refengine.program import Instruction, Value
from refengine_numba.binding import Binding
from refengine_numba.team import Team


class GoldenCall:
    """One instruction, computed by its golden op between two runs of compiled stages.

    Args:
        instruction: what to compute.
        at: its position in the program.
        binding: its values' arrays.
        output: the program's result, which lands in an array of the step's own.
        name: that array's name.
    """

    def __init__(self, instruction: Instruction, at: int, binding: Binding, output: Value, name: str) -> None:
        self._instruction, self._binding = instruction, binding
        self._workspace = binding.workspace(at)
        self._name = name if instruction.result is output else None

    def run(
        self, team: Team, threads: int, sizes: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        """Compute it for a step of these sizes, in the caller's thread."""
        operands = [self._operand(value, sizes, arrays) for value in self._instruction.operands]
        op, options = self._instruction.op, dict(self._instruction.attributes)
        if len(self._workspace):
            options["scratch"] = Scratch(self._workspace)
        with np.errstate(all="ignore"):  # what overflows has a defined value; nothing here may print
            if op.sharing == "state":
                op.golden(*operands, **options)
                return
            out = arrays[self._name] if self._name else self._rows(self._instruction.result, sizes)
            op.golden(*operands, **options, out=out)

    def _operand(
        self, value: Value | None, sizes: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]
    ) -> Any:
        if value is None:
            return None
        if value.kind == "input":
            return arrays[value.name]
        if value.kind == "weight":
            return self._binding.golden_weight(value.name)
        return self._rows(value, sizes)

    def _rows(self, value: Value, sizes: Mapping[str, int]) -> Any:
        """The rows of a value that this step has; all of a cache."""
        array, first = self._binding.array(value), str(value.shape[0])
        return array[: sizes[first]] if isinstance(array, np.ndarray) and first in sizes else array
