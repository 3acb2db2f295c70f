"""A device with memory of its own: a limit is about that, and the host's memory is told beside it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from cupy_backend.emulation import EmulatedRuntime

from refengine import Engine, EngineConfig, Request
from refengine.backend import Device
from refengine.backend.numpy_backend import NumpyBackend
from refengine.cli.plan_summary import plan_json, purposes, summarize
from refengine.engine_plan import EnginePlan, plan_engine
from refengine.errors import MemoryLimitError
from refengine.forecast import forecast
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy.backend import CONTEXT_BYTES, UNPLANNED_BYTES, CupyBackend

MODEL = tiny_model()
CONFIG = EngineConfig(max_sequences=2, token_budget=20, block_size=4, kv_tokens=64)
PROMPTS = (tuple(range(1, 17)), (30, 31, 32))


def planned(free: int | None = None, **fields: object) -> EnginePlan:
    runtime = EmulatedRuntime()
    runtime.free = runtime.total_bytes if free is None else free + UNPLANNED_BYTES
    return plan_engine(MODEL, CupyBackend(runtime), replace(CONFIG, **fields))  # type: ignore[arg-type]


def least() -> int:
    """What the refusal of a limit says is needed."""
    with pytest.raises(MemoryLimitError) as refused:
        planned(memory=1000)
    return refused.value.needed or 0


def tokens(engine: Engine) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for prompt in PROMPTS:
        engine.submit(Request(prompt, 6))
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request, []).append(output.sampled.token)
    return found


def test_a_limit_counts_the_device_and_the_host_stands_beside() -> None:
    """Weights, arena, KV cache, logits and context in one sum; process, pinned weights and swap in another."""
    plan = planned(memory=least() + 5000, swap=10**9)
    weights, config = plan.weights, plan.config
    device = weights.held + weights.streamed + plan.activations.arena_bytes + plan.layout.nbytes
    assert plan.most_bytes == device + plan.logits_bytes + CONTEXT_BYTES <= plan.limit == config.memory
    assert weights.host > 0
    assert plan.host_bytes == plan.process_bytes + weights.host + plan.logits_bytes + 10**9
    assert plan.host_bytes > config.memory  # type: ignore[operator]


def test_where_memory_is_the_hosts_there_is_one_sum() -> None:
    class OfTheHost(NumpyBackend):
        import_bytes = 12345

    plan = plan_engine(MODEL, OfTheHost(), CONFIG)
    assert plan.host_bytes == 0
    assert plan.most_bytes == plan.process_bytes + plan.fixed_bytes + plan.layout.nbytes
    on_a_device = replace(plan, device=Device("a card", None, own_memory=True, context_bytes=7))
    assert on_a_device.most_bytes == plan.most_bytes - plan.process_bytes + 7
    assert on_a_device.host_bytes == plan.process_bytes + plan.logits_bytes


@pytest.mark.parametrize("extra", [0, 3000, 20_000, 10**6])
def test_under_a_limit_an_engine_gives_the_same_tokens_and_holds_what_was_told(extra: int) -> None:
    limit = least() + extra
    engine = Engine(MODEL, CupyBackend(EmulatedRuntime()), replace(CONFIG, memory=limit))
    assert tokens(engine) == tokens(Engine(MODEL, CupyBackend(EmulatedRuntime()), CONFIG))
    report, plan = engine.memory(), engine.plan
    assert report.peak.total + CONTEXT_BYTES <= plan.most_bytes <= limit == report.limit
    assert (report.peak.weights, report.peak.mapped) == (plan.weights.held, plan.weights.streamed)
    assert report.peak.host == plan.weights.host
    assert (plan.weights.host > 0) == (extra < 10**6)


def test_a_forecast_is_what_is_held() -> None:
    """Every byte by purpose, the host's too; of logits an engine may keep less, or candidates."""
    config = replace(CONFIG, memory=least() + 10_000, max_sequences=1)
    told = forecast(plan_engine(MODEL, CupyBackend(EmulatedRuntime()), config), 22, 1, 16)
    engine = Engine(MODEL, CupyBackend(EmulatedRuntime()), config)
    engine.submit(Request(PROMPTS[0], 7))
    while engine.has_work:
        engine.step()
    held = engine.memory().peak
    assert replace(held, logits=0) == replace(told.peak, logits=0)
    assert told.limited_bytes == told.peak.total + CONTEXT_BYTES
    assert told.process_bytes == engine.plan.process_bytes + told.peak.host + told.peak.logits


def test_what_a_device_has_free_is_a_limit() -> None:
    """Where everything fits, nothing changes; below that, weights are streamed; and a larger --memory is no help."""
    everything = planned()
    fits = everything.most_bytes - CONTEXT_BYTES
    assert (planned(fits), everything.limit) == (replace(everything, device=planned(fits).device), None)
    short = planned(fits - 1)
    assert short.weights.host > 0
    assert short.most_bytes <= short.limit == fits - 1 + CONTEXT_BYTES
    assert planned(fits - 1, memory=2**40).weights == short.weights
    assert planned(fits, memory=2**40).weights == everything.weights


def test_the_kv_cache_gives_way_before_weights_are_streamed() -> None:
    """Without a number of positions: first the weights on the device, then as many positions as there is room for."""
    model = MODEL
    config = replace(CONFIG, kv_tokens=None, max_sequences=4)
    runtime = EmulatedRuntime()
    everything = plan_engine(model, CupyBackend(runtime), config)
    runtime.free = everything.most_bytes - CONTEXT_BYTES - everything.layout.nbytes // 2 + UNPLANNED_BYTES
    half = plan_engine(model, CupyBackend(runtime), config)
    assert half.weights == everything.weights
    assert half.layout.nbytes <= everything.layout.nbytes // 2


def test_a_device_that_is_too_small_is_named_with_what_would_do() -> None:
    needed = least()
    assert planned(memory=needed).most_bytes <= needed
    with pytest.raises(
        MemoryLimitError, match=r"of the memory of a GPU, played by the CPU are needed .*limit is"
    ):
        planned(memory=needed - 1)
    with pytest.raises(MemoryLimitError, match="what it has free, with its context, is") as refused:
        planned(free=needed - CONTEXT_BYTES - 1)
    assert refused.value.needed == needed
    options = re.findall(r"--([\w-]+) (\w+) needs ([\d.]+) MB", str(refused.value))
    assert options
    for option, value, megabytes in options:
        field = {option.replace("-", "_"): int(value) if value.isdigit() else value}
        assert planned(memory=round(float(megabytes) * 1e6), **field).most_bytes <= float(megabytes) * 1e6


def test_a_weight_cache_is_about_the_host() -> None:
    """It says what is kept decoded, and on the device nothing is."""
    assert planned(weight_cache=0).weights == planned().weights


def test_a_plan_prints_both_sums() -> None:
    """What the device holds, up to its limit; then what the process holds beside it."""
    plan = planned(memory=least() + 5000)
    summary = summarize("tiny", MODEL, "cupy", forecast(plan, 32, 2))
    rows = {name: nbytes for name, nbytes, _ in purposes(summary)}
    device = ("weights, repacked", "weights, in passage", "arena", "logits", "KV cache")
    assert rows["engine"] == sum(rows[name] for name in device)
    assert rows["peak on the device"] == rows["engine"] + rows["context"] <= plan.limit  # type: ignore[operator]
    host = ("weights on the host", "logits on the host", "process")
    assert rows["peak on the host"] == sum(rows[name] for name in host)
    peak = plan_json(summary)["peak"]
    assert (peak["total"], peak["host_total"]) == (rows["peak on the device"], rows["peak on the host"])
    assert peak["host"] == plan.weights.host
    kinds = {row.holding: row.held for row in summary.weights}
    assert kinds["pinned"] == sum(w.host for w in plan.weights.weights.values() if w.holding == "pinned")
