"""Faults of backends that tell candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.interpreter import InterpretedProgram
from refengine.backend.numpy_backend import NumpyBackend
from refengine.candidates import Candidates, candidates_of
from refengine.errors import RequestError
from refengine.ops import FloatArray
from refengine.program import StepBatch
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Temperatures = NDArray[np.float64]


def _telling(wrong: Callable[[FloatArray, Temperatures], Candidates]) -> Callable[[], Subject]:
    """A subject whose steps tell what ``wrong`` finds in their logits."""

    def run_candidates(
        executable: InterpretedProgram, batch: StepBatch, temperatures: Temperatures
    ) -> Candidates:
        if len(temperatures) != len(batch.logit_rows):
            raise RequestError("one temperature is needed for each row of logits")
        return wrong(executable.run(batch), temperatures)

    class Suspect(NumpyBackend):
        name = "suspect"

        def compile(self, *arguments: Any, **options: Any) -> InterpretedProgram:
            executable = super().compile(*arguments, **options)
            vars(executable)["run_candidates"] = partial(run_candidates, executable)
            return executable

    return partial(Subject, Suspect)


def _found(
    logits: FloatArray, temperatures: Temperatures, order: NDArray[np.intp], count: int = 128
) -> Candidates:
    """What is right, but for the order."""
    order = order[:, :count]
    return replace(
        candidates_of(logits, temperatures, count),
        tokens=order.astype(np.int32),
        logits=np.take_along_axis(logits, order, axis=1),
    )


def _last_of_equals(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    return _found(logits, temperatures, np.argsort(logits, axis=1, kind="stable")[:, ::-1])


def _zeros_of_two_kinds(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    lower = np.signbit(logits) & (logits == 0)
    return _found(logits, temperatures, np.lexsort((lower, -logits)))


def _best_of_parts(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    """Of every run of 1,000 logits the first 16, of which as many as are told come first."""
    part = np.arange(logits.shape[1]) // 1000
    order = np.argsort(-logits, axis=1, kind="stable")
    kept = [np.concatenate([row[part[row] == p][:16] for p in np.unique(part)]) for row in order]
    rank = [row[np.lexsort((row, -of[row]))] for row, of in zip(kept, logits, strict=True)]
    return _found(logits, temperatures, np.array(rank))


def _sums_of_candidates(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    found = candidates_of(logits, temperatures)
    return replace(found, sums=candidates_of(found.logits, temperatures).sums)


def _single_sums(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    found = candidates_of(logits, temperatures)
    return replace(found, sums=found.sums.astype(np.float32).astype(np.float64))


def _one_temperature(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    return candidates_of(logits, np.full_like(temperatures, temperatures[0]))


def _finite_candidates(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    found = candidates_of(logits, temperatures)
    return replace(found, finite=np.isfinite(found.logits).all(axis=1))


def _shared_rows() -> Callable[[FloatArray, Temperatures], Candidates]:
    """Rows are read where the last step has left its own."""
    place: list[FloatArray] = [np.empty(0)]

    def found(logits: FloatArray, temperatures: Temperatures) -> Candidates:
        place[0] = logits
        return replace(candidates_of(logits, temperatures), row=lambda row: place[0][row])

    return found


def _added_in_company(logits: FloatArray, temperatures: Temperatures) -> Candidates:
    found = candidates_of(logits, temperatures)
    if len(logits) == 1:
        return found
    sums = found.sums.copy()
    for row in np.flatnonzero(temperatures > 0):
        exact = logits[row].astype(np.float64)
        with np.errstate(over="ignore"):
            sums[row] = np.cumsum(np.exp((exact - exact.max()) / temperatures[row]))[-1]
    return replace(found, sums=sums)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "ties go to the highest id",
        "BCK-18",
        "An ascending sort, read from its end.",
        _telling(_last_of_equals),
    ),
    Fault(
        "-0 comes after 0",
        "BCK-18",
        "Logits are sorted by their bits.",
        _telling(_zeros_of_two_kinds),
    ),
    Fault(
        "every part gives a few",
        "BCK-18",
        "The row is cut into parts whose own firsts are put together, and these are fewer than are told.",
        _telling(_best_of_parts),
    ),
    Fault(
        "the sum is the candidates'",
        "BCK-18",
        "The rest weighs nothing to speak of.",
        _telling(_sums_of_candidates),
    ),
    Fault(
        "the sum is in float32",
        "BCK-18",
        "As everything else on the device.",
        _telling(_single_sums),
    ),
    Fault(
        "one temperature for all rows",
        "BCK-18",
        "A step's requests are taken to be alike.",
        _telling(_one_temperature),
    ),
    Fault(
        "only candidates are looked at for infinities",
        "BCK-18",
        "The lowest number of all is in no list of the highest.",
        _telling(_finite_candidates),
    ),
    Fault(
        "a row is the last step's",
        "BCK-18",
        "It is fetched from where the logits lie, whichever these are by then.",
        lambda: _telling(_shared_rows())(),
    ),
    Fault(
        "sums are added up otherwise in company",
        "BCK-18",
        "The blocks of threads that share a row are fewer where there are several.",
        _telling(_added_in_company),
    ),
)
