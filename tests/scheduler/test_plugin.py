"""A package that offers a scheduling policy, as it lies in an environment once it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request
from refengine.backend import load
from refengine.scheduler import BUILT_IN, policy, scheduling_policies

MODULE = """
from refengine.scheduler import SchedulingPolicy


def longest_first(patience: int = 1000) -> SchedulingPolicy:
    return SchedulingPolicy("longest", "the longest prompt first", lambda t: patience - t.prompt, patience)
"""

METADATA = """Metadata-Version: 2.1
Name: longest-policy
Version: 1.0
"""

ENTRY_POINTS = """[refengine.scheduling_policies]
longest = longest_policy:longest_first
fcfs = longest_policy:longest_first
"""


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module, and what an installer writes beside it."""
    (tmp_path / "longest_policy.py").write_text(MODULE)
    about = tmp_path / "longest_policy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "longest_policy", raising=False)


def order(scheduling: str) -> list[int]:
    """Lengths of prompts in the order in which they are answered, one after the other, by a real engine."""
    config = EngineConfig(block_size=4, max_sequences=1, scheduling=scheduling)
    engine = Engine(tiny_model("llama", layers=1), load("numpy"), config)
    lengths = {engine.submit(Request((1,) * length, 2)): length for length in (3, 9, 5, 30)}
    ended = []
    while engine.has_work:
        ended += [lengths[output.request] for output in engine.step() if output.finish_reason]
    return ended


@pytest.mark.usefixtures("_installed")
def test_an_engine_schedules_by_the_policy_of_an_installed_package() -> None:
    """By its name, with its parameters; those built in keep their names, whoever else wants them."""
    assert scheduling_policies()[: len(BUILT_IN)] == tuple(BUILT_IN)
    assert scheduling_policies().count("fcfs") == scheduling_policies().count("longest") == 1
    assert order("longest") == [30, 9, 5, 3]
    assert order("longest:patience=5") == [9, 5, 30, 3]  # from five tokens on, all count as equally long
    assert order("fcfs") == [3, 9, 5, 30]


def test_without_it_there_are_those_built_in() -> None:
    """The package is gone, and so is its policy."""
    assert "longest" not in scheduling_policies()
    assert policy.GROUP == "refengine.scheduling_policies"
