"""Schedule invariance: a thousand random schedules of each family, and not one bit of a difference."""

from __future__ import annotations

import os
import random

import pytest
from schedules import alone, requests, transcripts
from tiny_model import tiny_model

import refengine
from refengine import Engine, EngineConfig, Request
from refengine.models import Model

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "mistral", "mistral3"]
SCHEDULES = int(os.environ.get("REFENGINE_SCHEDULES", "1000"))
"""Per family."""

REAL_SCHEDULES = int(os.environ.get("REFENGINE_REAL_SCHEDULES", "100"))
"""Per real model."""

FIRST_REAL_SCHEDULE = int(os.environ.get("REFENGINE_FIRST_REAL_SCHEDULE", "0"))
"""Each schedule is drawn by its number alone: processes may share them out."""

SETS = 10
"""Of requests, each under a tenth of the schedules."""


@pytest.mark.parametrize("kv_dtype", [None, "int8/int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_schedule_changes_a_bit(family: str, kv_dtype: str | None) -> None:
    """Company, order, chunks, pre-emption, prefix hits, places in memory: logits and tokens are those alone."""
    model = tiny_model(family, layers=3 if family == "gemma3" else 1)
    rng = random.Random(f"{family} {kv_dtype}")
    for _ in range(SETS):
        wanted = requests(rng, count=3, longest=25)
        golden = [alone(model, EngineConfig(block_size=4, kv_dtype=kv_dtype), request) for request in wanted]
        for _ in range(SCHEDULES // SETS // 2):
            agrees_under_one_schedule(model, wanted, golden, kv_dtype, rng)


@pytest.mark.parametrize("path", ["smollm2_path", "gemma3_path"])
def test_no_schedule_changes_a_bit_of_a_real_model(path: str, request: pytest.FixtureRequest) -> None:
    """The same of models that people use, every other schedule with a quantized KV cache; by night."""
    if request.config.getoption("--refengine-profile") != "thorough":
        pytest.skip("takes minutes: --refengine-profile thorough")
    model = refengine.load(str(request.getfixturevalue(path)), backend="numpy").model
    wanted = requests(random.Random(path), count=3, longest=25)
    kv_dtypes = (None, "int8/int4")
    golden = {
        kv_dtype: [alone(model, EngineConfig(block_size=4, kv_dtype=kv_dtype), each) for each in wanted]
        for kv_dtype in kv_dtypes
    }
    for schedule in range(FIRST_REAL_SCHEDULE, FIRST_REAL_SCHEDULE + REAL_SCHEDULES):
        kv_dtype, rng = kv_dtypes[schedule % 2], random.Random(f"{path} {schedule}")
        agrees_under_one_schedule(model, wanted, golden[kv_dtype], kv_dtype, rng)


def agrees_under_one_schedule(
    model: Model, wanted: list[Request], golden: list[list[str]], kv_dtype: str | None, rng: random.Random
) -> None:
    """Requests in any order, in an engine of any configuration: their hashes are the golden ones."""
    config = EngineConfig(
        block_size=4,
        kv_dtype=kv_dtype,
        token_budget=rng.choice([1, 3, 8, 13, 64]),
        max_sequences=rng.choice([3, 4, 9]),
        kv_tokens=rng.choice([64, 80, 256]),
        prefix_cache=rng.random() < 0.5,
        swap=rng.choice([0, 0, 10**9]),
        scheduling=rng.choice(["fcfs", "fcfs", "sjf", "priority:ageing=2", "fair"]),
        check=rng.random() < 0.2,
    )
    order = list(range(len(wanted)))
    rng.shuffle(order)

    def between(engine: Engine) -> None:
        for _ in range(rng.choice([0, 0, 1, 4])):
            engine.step()

    found = transcripts(model, config, [wanted[i] for i in order], between)
    assert found == [golden[i] for i in order], f"{config} {order}"
