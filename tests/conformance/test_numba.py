"""The Numba backend conforms, under every policy it claims and on every instruction set there is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from refengine.ops import OPS
from refengine_conformance.outcome import PROFILES, Outcome, Task
from refengine_conformance.registry import Property, all_properties
from refengine_conformance.runner import Worker
from refengine_conformance.subjects import BackendSubject

if (found := importlib.util.find_spec("numba")) is None or found.origin is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from refengine_numba import isa

QUICK = PROFILES["quick"]
POLICIES = ("float32", "mixed8", "mixed16")

PROPERTIES = [item for item in all_properties() if item.parts & (OPS.keys() | {"backend"})]
"""What a backend has a hand in."""

CASES = [
    pytest.param(item, policy, id=f"{item.id} {policy}")
    for item in PROPERTIES
    for policy in POLICIES
    if policy in item.policies
]

BY_INSTRUCTIONS = {"linear_a8", "attention", "sealed_attention"}
"""Ops whose kernels are written anew for each instruction set."""

OTHER_CASES = [
    pytest.param(item, policy, id=f"{item.id} {policy}")
    for item in PROPERTIES
    for policy in POLICIES
    if policy in item.policies and item.parts & BY_INSTRUCTIONS
]

OTHERS = [name for name in isa.available(isa.processor_features()) if name != isa.choose()]
"""Instruction sets that would not be taken by themselves."""

LIMIT_S = 6 * QUICK.limit_s
"""Of a property: some draw formats whose kernels are compiled when they are first met."""

FEW = 6
"""Examples of a property for those."""


@pytest.fixture(scope="module", params=[isa.choose(), *OTHERS])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, chosen for every process that is started, its kernels compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(isa.VARIABLE, request.param)
        done = subprocess.run(
            [sys.executable, "-m", "refengine_numba"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert request.param in done.stdout
        yield request.param


@pytest.fixture(scope="module")
def worker(instructions: str) -> Iterator[Worker]:
    """A process of that instruction set."""
    assert os.environ[isa.VARIABLE] == instructions
    with Worker() as worker:
        yield worker


def hold(worker: Worker, item: Property, policy: str, examples: int) -> Outcome:
    return worker.hold(Task(BackendSubject("numba", policy), item.id, examples, 0, LIMIT_S))


@pytest.mark.parametrize("instructions", [isa.choose()], indirect=True)
@pytest.mark.parametrize(("item", "policy"), CASES)
def test_the_backend_conforms(item: Property, policy: str, worker: Worker) -> None:
    """Every property holds, but for what the backend declares not to compute."""
    outcome = hold(worker, item, policy, QUICK.examples)
    assert outcome.kind in ("passed", "unsupported"), f"{outcome.message}\n{outcome.example}"


@pytest.mark.parametrize("instructions", OTHERS, indirect=True)
@pytest.mark.parametrize(("item", "policy"), OTHER_CASES)
def test_it_conforms_on_other_instruction_sets(item: Property, policy: str, worker: Worker) -> None:
    """Each of them, forced."""
    outcome = hold(worker, item, policy, FEW)
    assert outcome.kind == "passed", f"{outcome.message}\n{outcome.example}"
