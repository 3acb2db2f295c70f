"""A run of stages as one table of words, which compiled code goes through without coming back to Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_numba.barrier import barrier_state
from refengine_numba.entries import entry
from refengine_numba.stage import Stage, barriers
from refengine_numba.team import Team


class StageTable:
    """Stages in order, and where their arguments change from step to step.

    Every buffer has its place for good, so only sizes change, and the addresses of *moving* arrays: a step's
    inputs, and its output.

    Args:
        stages: with arguments for the largest step.
        moving: by name, the arrays that stand for the moving ones in the stages' arguments.
    """

    def __init__(self, stages: Sequence[Stage], moving: Mapping[str, NDArray[Any]]) -> None:
        self._kept = [stage.arguments.arrays for stage in stages]
        self._arguments = np.concatenate([stage.arguments.words for stage in stages])
        starts = np.cumsum([0, *(len(stage.arguments.words) for stage in stages)])[:-1]
        rows = [
            (stage.entry.address, start, meets)
            for stage, start, meets in zip(stages, starts, barriers(stages), strict=True)
        ]
        self._table, self._barrier = np.array(rows, np.int64), barrier_state()
        self._words = np.array(
            [
                _address(self._table),
                len(stages),
                _address(self._arguments),
                len(self._arguments),
                _address(self._barrier),
            ],
            np.int64,
        )
        symbols: dict[str, list[int]] = {}
        for stage, start in zip(stages, starts, strict=True):
            for at, symbol in stage.arguments.symbols.items():
                symbols.setdefault(symbol, []).append(start + at)
        self._symbols = {symbol: np.array(places) for symbol, places in symbols.items()}
        self._sizes: dict[str, int] = {}  # as the arguments have them now
        self._moving = {
            name: np.flatnonzero(self._arguments == _address(array)) for name, array in moving.items()
        }

    def run(
        self, team: Team, threads: int, sizes: Mapping[str, int], moving: Mapping[str, NDArray[Any]]
    ) -> None:
        """Run all stages for a step of these sizes, with these arrays in the place of the moving ones."""
        for symbol, places in self._symbols.items():
            if self._sizes.get(symbol) != sizes[symbol]:  # in decoding, they stay for long
                self._arguments[places] = sizes[symbol]
                self._sizes[symbol] = sizes[symbol]
        for name, places in self._moving.items():
            self._arguments[places] = _address(moving[name])
        team.run(entry("stages.run_stages"), self._words, threads)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
