"""What the engine itself costs in a step.

    python benchmarks/step_cost.py [--steps 200]

Everything of ``Engine.step`` but the executable and the sampler, which do nothing here. All running requests
decode, each with 2,000 tokens of context or more, in blocks of 16; the others wait.

build   until the executable is called: deciding, building the batch, settling memory
step    all of it: accounting for what was computed and making outputs too

Of each the median and the fastest by the clock, and the median of the processor's time, which others that run
on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from time import perf_counter, process_time
from typing import Any

import numpy as np

from refengine import Engine, EngineConfig, Request
from refengine.backend.numpy_backend import NumpyBackend
from refengine.memory import KVLayout
from refengine.ops import FloatArray
from refengine.program import MemoryPlan, Policy, Program, StepBatch
from refengine.sampling import Sampled
from refengine_conformance.tiny_model import tiny_model

CONTEXT = 2000

TOKEN = Sampled(1, 0.0)


class Idle(NumpyBackend):
    """Plans as the NumPy backend does, and computes nothing."""

    idler: Idler

    def compile(  # type: ignore[override]
        self,
        program: Program,
        policy: Policy,
        plan: MemoryPlan,
        weights: Any,
        layout: KVLayout,
        cache: Any,
        *,
        fallback: bool = False,
    ) -> Idler:
        self.idler = Idler(np.zeros((plan.sizes["R"], program.vocabulary_size), policy.activations))
        return self.idler


class Idler:
    """Has the logits of every step ready.

    Attributes:
        called: when it was called last, by the clock and in the processor's time.
    """

    def __init__(self, logits: FloatArray) -> None:
        self._logits, self.called = logits, (0.0, 0.0)

    def run(self, batch: StepBatch) -> FloatArray:
        self.called = perf_counter(), process_time()
        return self._logits[: len(batch.logit_rows)]


def decoding(
    running: int, waiting: int, steps: int, options: dict[str, Any], backend: Idle | None = None
) -> Engine:
    """An engine in which so many requests decode and so many wait."""
    model = tiny_model("llama", layers=1)
    model = replace(model, spec=replace(model.spec, context_length=2 * CONTEXT + 4 * steps))
    config = EngineConfig(
        token_budget=max(8192, running),
        max_sequences=running,
        kv_tokens=running * (CONTEXT + 4 * steps + 16),
        **options,
    )
    engine = Engine(model, backend or Idle(), config, sample=lambda *arguments: TOKEN)
    for _ in range(running):
        engine.submit(Request((2,) * CONTEXT, 2 * steps + CONTEXT // 2))
    while len(engine.step()) < running:  # until all prompts are computed
        pass
    for _ in range(waiting):
        engine.submit(Request((3,) * 20, 5))
    return engine


Times = list[tuple[float, float]]
"""Microseconds of steps: by the clock, and of the processor."""


def measure(running: int, waiting: int, steps: int, options: dict[str, Any]) -> tuple[Times, Times]:
    """So many steps: until the executable is called, and in all."""
    backend = Idle()
    engine = decoding(running, waiting, steps, options, backend)
    built, taken = [], []
    for _ in range(steps):
        start = perf_counter(), process_time()
        outputs = engine.step()
        end = perf_counter(), process_time()
        built.append(microseconds(start, backend.idler.called))
        taken.append(microseconds(start, end))
        if len(outputs) != running:
            raise SystemExit(f"{len(outputs)} of {running} requests have decoded a token")
    return built, taken


def microseconds(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return 1e6 * (end[0] - start[0]), 1e6 * (end[1] - start[1])


def figures(times: Times) -> list[str]:
    """Median and fastest by the clock, median of the processor."""
    clock, processor = zip(*times, strict=True)
    return [f"{each:,.0f}" for each in (statistics.median(clock), min(clock), statistics.median(processor))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prefix-cache", action="store_true")
    parser.add_argument("--scheduling", default="fcfs")
    arguments = parser.parse_args()
    options = {"prefix_cache": arguments.prefix_cache, "scheduling": arguments.scheduling}
    print("| running | waiting | build: median, µs | fastest | CPU | step: median, µs | fastest | CPU |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for running in (64, 256, 1000):
        for waiting in (100, 10_000):
            built, taken = measure(running, waiting, arguments.steps, options)
            print(
                f"| {running:,} | {waiting:,} |", " | ".join(figures(built) + figures(taken)), "|", flush=True
            )


if __name__ == "__main__":
    main()
