"""What the engine adds to a step is little, linear in the running requests, and nothing for those that wait."""

from __future__ import annotations

import gc
import sys
from time import process_time
from typing import Any

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request
from refengine.backend.numpy_backend import NumpyBackend
from refengine.program import StepBatch
from refengine.sampling import Sampled

CONTEXT = 150

MODEL = tiny_model("llama", layers=1)


class Idle(NumpyBackend):
    """Plans as the NumPy backend does, and computes nothing."""

    called = 0.0

    def compile(self, program: Any, policy: Any, plan: Any, *rest: Any, fallback: bool = False) -> Any:
        self.logits = np.zeros((plan.sizes["R"], program.vocabulary_size), np.float32)
        return self

    def run(self, batch: StepBatch) -> np.ndarray:
        self.called = process_time()
        return self.logits[: len(batch.logit_rows)]


def decoding(running: int, waiting: int, *, prefix_cache: bool) -> tuple[Engine, Idle]:
    """An engine in which so many requests decode, and so many wait."""
    backend = Idle()
    config = EngineConfig(
        token_budget=4096, max_sequences=running, kv_tokens=running * 250, prefix_cache=prefix_cache
    )
    engine = Engine(MODEL, backend, config, sample=lambda *given: Sampled(1, 0.0))
    for number in range(running):
        engine.submit(Request((2, *np.base_repr(number, 3).encode(), *(3,) * CONTEXT)[:CONTEXT], 80))
    while len(engine.step()) < running:
        pass
    for _ in range(waiting):
        engine.submit(Request((4,) * 20, 5))
    return engine, backend


def calls(running: int, waiting: int, *, prefix_cache: bool) -> int:
    """Calls of functions, Python's and C's, in a block's worth of steps: a cost that no other process changes."""
    engine, _ = decoding(running, waiting, prefix_cache=prefix_cache)
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    gc.disable()  # which others may have asked to be called by
    sys.setprofile(count)
    try:
        for _ in range(engine.config.block_size):
            engine.step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_step_takes_calls_in_proportion_to_the_running(prefix_cache: bool) -> None:
    """Sixteen times the running requests take sixteen times the calls; a hundred times the waiting, no more."""
    few = calls(16, 100, prefix_cache=prefix_cache)
    assert calls(16, 10_000, prefix_cache=prefix_cache) == few
    assert calls(256, 100, prefix_cache=prefix_cache) <= 16 * few


def test_building_a_step_is_cheap() -> None:
    """Under 400 µs of the processor for 64 running: the mark is 200 on the machine of the benchmarks."""
    engine, backend = decoding(64, 100, prefix_cache=False)
    taken = []
    for _ in range(60):
        start = process_time()
        assert len(engine.step()) == 64
        taken.append(backend.called - start)
    assert min(taken) < 400e-6
