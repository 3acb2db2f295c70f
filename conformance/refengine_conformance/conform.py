"""From a backend's name to a run of the suite on it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from time import perf_counter

import numpy as np

import refengine
from refengine.backend import registered
from refengine.program import POLICIES
from refengine.program import policy as policy_named
from refengine.specification import clauses
from refengine_conformance.conformance import Conformance
from refengine_conformance.outcome import Profile
from refengine_conformance.registry import PLAIN, Property
from refengine_conformance.runner import Result, Worker, run_suite
from refengine_conformance.subjects import BackendSubject
from refengine_conformance.support import Ask, Examine


def claimed_policies(backend: str, properties: tuple[Property, ...]) -> tuple[str, ...]:
    """The policies that the properties are about, but for mixed ones that the backend does not claim.

    Raises:
        BackendError: it cannot be used.
    """
    names = dict.fromkeys((*PLAIN, *POLICIES))
    about = [name for name in names if any(name in item.policies for item in properties)]
    with Worker() as worker:
        return tuple(name for name in about if worker.call(Ask(BackendSubject(backend, name, False), name)))


def conform(
    backend: str,
    properties: tuple[Property, ...],
    *,
    policies: tuple[str, ...],
    profile: Profile,
    seed: int = 0,
    fallback: bool = False,
    partial: bool = False,
    on_result: Callable[[Result], None] = lambda _: None,
) -> Conformance:
    """Hold a backend against properties.

    Args:
        backend: its registered name.
        properties: to be held, each under the policies it is about.
        policies: names of precision policies, one after the other.
        profile, seed: see ``run_suite``.
        fallback: whether golden ops may stand in for what it lacks.
        partial: whether these are not all properties; the report says so.
        on_result: is told of each result as it comes.

    Raises:
        BackendError: it cannot be used.
        UnsupportedError: no such policy.
    """
    started = perf_counter()
    makers = [(policy_named(name).name, BackendSubject(backend, name, fallback)) for name in policies]
    with Worker() as worker:
        examined = [worker.call(Examine(make)) for _, make in makers]
        for _, make in makers:
            worker.prepare(make)
    results = []
    for maker in makers:
        about = tuple(item for item in properties if maker[0] in item.policies)
        for result in run_suite([maker], about, profile, seed=seed):
            on_result(result)
            results.append(result)
    info = next((s.info for s in registered() if s.name == examined[0].name), None)
    return Conformance(
        backend=backend,
        description=info.description if info else "no description",
        devices=examined[0].devices,
        version=refengine.__version__,
        python=platform.python_version(),
        numpy=np.__version__,
        system=f"{platform.system()} {platform.machine()}",
        profile=profile,
        seed=seed,
        fallback=fallback,
        partial=partial,
        policies=policies,
        seconds=perf_counter() - started,
        support=tuple(row for answer in examined for row in answer.support),
        clauses=clauses(),
        results=tuple(results),
    )
