"""The suite passes the golden engine, catches every seeded fault, and survives whatever a backend does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance import suspects
from refengine.errors import BackendFailedError, UnknownBackendError
from refengine_conformance import conform as conform_module
from refengine_conformance.faults.fault import Fault
from refengine_conformance.outcome import PROFILES, Outcome, Task
from refengine_conformance.registry import Property, all_properties
from refengine_conformance.runner import Worker, run_suite
from refengine_conformance.self_test import Verdict, faults, judge
from refengine_conformance.subjects import BackendSubject
from refengine_conformance.support import Examine

NORM = next(item for item in all_properties() if item.parts == {"rms_norm"})
QUICK = PROFILES["quick"]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.mark.parametrize(
    ("item", "policy"),
    [
        pytest.param(item, policy, id=f"{item.id} {policy}")
        for item in all_properties()
        for policy in item.policies
    ],
)
def test_the_golden_engine_conforms(item: Property, policy: str, worker: Worker) -> None:
    """Every property holds on the NumPy backend, under the policies that it is about."""
    outcome = worker.hold(Task(BackendSubject("numpy", policy), item.id, QUICK.examples, 0, QUICK.limit_s))
    assert outcome.kind == "passed", f"{outcome.message}\n{outcome.example}"


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: f"{fault.clause} {fault.name}")
def test_every_fault_is_caught(fault: Fault, worker: Worker) -> None:
    """A seeded fault is found by a property of the clause that it breaks."""
    verdict = judge(fault, worker, QUICK)
    assert verdict.killed, verdict


def hold(worker: Worker, make: Callable[[], object], limit_s: float = 20.0) -> Outcome:
    return worker.hold(Task(make, NORM.id, 25, 0, limit_s))  # type: ignore[arg-type]


def test_a_hang_is_a_finding_that_says_where(worker: Worker) -> None:
    """A backend that never returns is stopped at the limit, and the report names the line."""
    outcome = hold(worker, suspects.hanging, limit_s=1.0)
    assert outcome.kind == "hung"
    assert "in hang" in outcome.example
    assert hold(worker, suspects.chatty).kind == "passed"


def test_a_crash_is_a_finding_that_says_where(worker: Worker) -> None:
    """A segmentation fault takes the worker down and nothing else; the next property gets a new one."""
    outcome = hold(worker, suspects.crashing)
    assert outcome.kind == "crashed"
    assert "SIGSEGV" in outcome.message
    assert "in crash" in outcome.example
    assert hold(worker, suspects.chatty).kind == "passed"


def test_an_exit_is_a_finding(worker: Worker) -> None:
    """A backend that ends the process has not thereby passed."""
    outcome = hold(worker, suspects.leaving)
    assert (outcome.kind, outcome.message) == ("crashed", "the process ended: exit code 0")


def test_an_error_is_a_finding(worker: Worker) -> None:
    """Any error that is no assertion is told by name, place and example."""
    outcome = hold(worker, suspects.raising)
    assert outcome.kind == "raised"
    assert "KeyError: 'a lookup gone wrong'" in outcome.message
    assert "suspects.py" in outcome.message
    assert "Draw 1" in outcome.example


def test_a_wrong_result_is_a_finding_with_the_simplest_example(worker: Worker) -> None:
    """A broken clause comes with a small example."""
    outcome = hold(worker, suspects.doubling)
    assert outcome.kind == "broken"
    assert outcome.message
    assert "Draw 1" in outcome.example


def test_an_unsteady_result_is_a_finding(worker: Worker) -> None:
    """A failure that does not come again is told as such."""
    assert hold(worker, suspects.unsteady).kind == "unsteady"


def test_a_failed_backend_gets_another_process(worker: Worker) -> None:
    """What fails is told as it was; what comes next is not made to fail by it."""
    outcome = hold(worker, suspects.losing)
    assert outcome.found
    assert "an address that is misaligned" in outcome.message
    assert worker.call(Examine(suspects.losing)).name == "numpy"


def test_slow_work_is_done_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend has prepared itself for is there in every process, and takes no property's time."""
    monkeypatch.setenv("SUSPECT_CACHE", str(tmp_path))
    with Worker() as another:
        assert hold(another, suspects.preparing, limit_s=1.0).kind == "hung"
        another.prepare(suspects.preparing)
        assert hold(another, suspects.preparing).kind == "passed"


def test_a_run_begins_with_slow_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUSPECT_CACHE", str(tmp_path))
    monkeypatch.setattr(conform_module, "BackendSubject", suspects.PreparingSubject)
    run = conform_module.conform("preparing", (NORM,), policies=("float32",), profile=QUICK)
    assert [result.outcome.kind for result in run.results] == ["passed"]


def test_what_cannot_be_prepared_is_left_to_the_properties(worker: Worker) -> None:
    worker.prepare(suspects.unpreparable)
    worker.prepare(suspects.unmakeable)
    worker.prepare(suspects.raising)
    assert hold(worker, suspects.unpreparable).kind == "passed"


def test_a_declared_lack_is_no_finding(worker: Worker) -> None:
    """What a backend declares not to support is told with its reason; a refusal it never declared is a finding."""
    lacking = hold(worker, suspects.lacking)
    assert (lacking.kind, lacking.found) == ("unsupported", False)
    assert "lacking has no rms_norm of its own" in lacking.message
    assert hold(worker, suspects.refusing).kind == "raised"


def test_a_lack_hides_no_finding(worker: Worker) -> None:
    """Examples that the backend declines are left out; what is wrong in the others is found."""
    assert hold(worker, suspects.narrow_and_right).kind == "unsupported"
    assert hold(worker, suspects.narrow_and_wrong).kind == "broken"


def test_a_backend_that_cannot_start_is_told_as_its_error(worker: Worker) -> None:
    """Errors about backends keep their four parts on the way out of the worker."""
    with pytest.raises(UnknownBackendError) as error:
        worker.call(Examine(BackendSubject("no such backend")))
    assert error.value.mend
    with pytest.raises(BackendFailedError, match="it cannot be made"):
        worker.call(Examine(suspects.unmakeable))
    with pytest.raises(BackendFailedError, match="SIGSEGV"):
        worker.call(suspects.crash)


def test_the_same_seed_draws_the_same_examples(worker: Worker) -> None:
    """An outcome can be had again, in another process too."""
    first = hold(worker, suspects.doubling)
    with Worker() as another:
        second = hold(another, suspects.doubling)
    assert (first.kind, first.message, first.example) == (second.kind, second.message, second.example)


def test_a_slow_search_for_a_simpler_example_keeps_the_finding(worker: Worker) -> None:
    """Where the limit ends the search, the first failure is told, not a hang."""
    outcome = hold(worker, suspects.slowly_doubling, limit_s=1.5)
    assert outcome.kind == "broken"


def test_assertions_count_with_optimisation_too(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """``PYTHONOPTIMIZE`` would strip what properties are made of, so the worker goes without it."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    with Worker() as another:
        assert hold(another, suspects.doubling).kind == "broken"


def test_the_suite_yields_every_result() -> None:
    """One result per property and policy, in order, whatever the backend does."""
    makers = [("hanging", suspects.hanging), ("doubling", suspects.doubling)]
    profile = type(QUICK)("tiny", 5, 1.0)
    results = list(run_suite(makers, (NORM, NORM), profile))
    assert [(r.policy, r.outcome.kind) for r in results] == [
        ("hanging", "hung"),
        ("hanging", "hung"),
        ("doubling", "broken"),
        ("doubling", "broken"),
    ]


def test_a_surviving_fault_is_told() -> None:
    """A fault counts as killed only under the clause that it breaks."""
    assert Verdict("fault", "ATT-1", "ATT-1:law", "broken").word == "killed"
    assert Verdict("fault", "ATT-1", "ATT-10:law", "broken").word == "killed elsewhere"
    assert Verdict("fault", "ATT-1", None, None).word == "survived"
    assert Verdict("fault", "ATT-1", "ATT-1:law", "broken", sound=False).word == "false alarm"


def test_the_worker_finds_the_same_modules() -> None:
    """What the tests can import, the worker can: it is given this process's path."""
    with Worker() as another:
        assert another.call(suspects.path) == sys.path
