"""Memory of an engine: what is planned is what is held, limits hold, and what is shared changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.backend import load
from refengine.engine_plan import plan_engine
from refengine.errors import (
    ContextLengthError,
    MemoryLimitError,
    RequestError,
    SequenceStateError,
    TokenIdError,
)
from refengine.forecast import forecast
from refengine.memory import FlightRecorder
from refengine.models import Model

FAMILIES = ["llama", "qwen2", "gemma3"]
ALL_FAMILIES = ["llama", "mistral", "mistral3", "qwen2", "qwen3", "gemma3"]
KV_DTYPES = [None, "float16", "int8", "int4", "int8/int4"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


def engine(model: Model, **config: object) -> Engine:
    return Engine(model, load("numpy"), EngineConfig(**config))  # type: ignore[arg-type]


def prompts(lengths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(t) for t in rng.integers(0, 97, length)) for length in lengths]


def run(made: Engine, *requests: Request) -> dict[tuple[int, int], list[Output]]:
    """Outputs by request and sample."""
    for request in requests:
        made.submit(request)
    outputs: dict[tuple[int, int], list[Output]] = {}
    while made.has_work:
        for output in made.step():
            outputs.setdefault((output.request, output.sample), []).append(output)
    return outputs


def sampled(outputs: list[Output]) -> list[object]:
    return [output.sampled for output in outputs]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("policy", ["float32", "float64"])
@pytest.mark.parametrize("weight_cache", [None, 0])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_is_planned_is_what_is_held(
    family: str, policy: str, kv_dtype: str | None, batch: int, weight_cache: int | None
) -> None:
    """Every byte by purpose, at the moment when most is held: forecast before loading, counted while running."""
    model, context, prompt = tiny_model(family), 90, 20
    config = EngineConfig(
        policy=policy, kv_dtype=kv_dtype, max_sequences=batch, token_budget=prompt * batch, block_size=4,
        kv_tokens=context * batch + 64, weight_cache=weight_cache,
    )  # fmt: skip
    told = forecast(plan_engine(model, load("numpy"), config), context, batch, prompt)
    made = Engine(model, load("numpy"), config)
    run(made, *(Request(p, context - prompt + 1) for p in prompts([prompt] * batch)))
    assert made.memory().peak == told.peak


def test_nothing_is_held_before_and_after(model: Model) -> None:
    """No block is reserved at start, and every segment is given back at the end."""
    made = engine(model, block_size=4)
    assert made.memory().current.kv_cache == 0
    run(made, *(Request(p, 5) for p in prompts([3, 40, 17])))
    report = made.memory()
    assert report.current.kv_cache == 0
    assert report.peak.kv_cache > 0
    assert report.kv.blocks_in_use == (0,) * len(report.kv.blocks_in_use)


def test_what_is_reserved_is_held_throughout(model: Model) -> None:
    """The asked positions of every pool are there from the start, and stay."""
    made = engine(model, block_size=4, reserve=64)
    reserved = made.memory().current.kv_cache
    assert reserved >= 64 // 4 * sum(
        made.plan.layout.block_bytes(g) for g in range(len(made.plan.layout.groups))
    )
    run(made, Request(prompts([30])[0], 5))
    assert made.memory().current.kv_cache == reserved == made.memory().peak.kv_cache


def test_a_limit_is_never_exceeded(model: Model) -> None:
    """From the least that works upwards: the engine's bytes stay below, and the tokens are the same."""
    wanted = [Request(p, 12) for p in prompts([30, 9, 25])]
    free = run(engine(model, block_size=4), *wanted)
    with pytest.raises(MemoryLimitError) as refused:
        engine(model, block_size=4, memory=1000)
    for extra in (0, 50_000, 1_000_000):
        made = engine(model, block_size=4, memory=refused.value.needed + extra)
        outputs = run(made, *wanted)
        assert {key: sampled(o) for key, o in outputs.items()} == {key: sampled(o) for key, o in free.items()}
        assert made.plan.most_bytes <= refused.value.needed + extra
        assert made.memory().peak.total <= made.plan.most_bytes
    with pytest.raises(MemoryLimitError):
        engine(model, block_size=4, memory=refused.value.needed - 1)


def test_a_limit_that_is_too_small_says_what_would_do(model: Model) -> None:
    """The error names the bytes that are needed and options that need less; each is enough."""
    with pytest.raises(MemoryLimitError, match=r"--kv-tokens 256 needs [\d.]+ MB") as refused:
        engine(model, memory=10_000)
    first, *options = re.findall(
        r"([\d.]+) MB are needed|--([\w-]+) (\w+) needs ([\d.]+) MB", str(refused.value)
    )
    assert engine(model, memory=round(float(first[0]) * 1e6)).plan
    for _, option, value, megabytes in options:
        field = {option.replace("-", "_"): int(value) if value.isdigit() else value}
        assert engine(model, memory=round(float(megabytes) * 1e6), **field).plan


def test_a_request_beyond_the_memory_is_refused(model: Model) -> None:
    """At submission, before it holds anything; what runs is not disturbed, and the recorder is told."""
    reasons: list[str] = []
    made = Engine(
        model, load("numpy"), EngineConfig(block_size=4, kv_tokens=32),
        on_limit=lambda recorder, reason: reasons.append(reason),
    )  # fmt: skip
    made.submit(Request(prompts([10])[0], 5))
    with pytest.raises(ContextLengthError, match="kv_tokens"):
        made.submit(Request(prompts([40])[0], 5))
    assert len(reasons) == 1
    assert len(run(made)) == 1


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("length", [3, 4, 17, 30])
def test_samples_are_what_single_requests_with_their_seeds_are(
    model: Model, kv_dtype: str | None, length: int
) -> None:
    """Each of n samples equals a request of its own with seed + i, whatever they share."""
    prompt, sampling = prompts([length])[0], SamplingParams(temperature=1.0, seed=11, logprobs=2)
    made = engine(model, block_size=4, kv_dtype=kv_dtype, check=True)
    together = run(made, Request(prompt, 9, sampling, samples=4))
    assert len(together) == 4
    for sample in range(4):
        alone = run(
            engine(model, block_size=4, kv_dtype=kv_dtype),
            Request(prompt, 9, replace(sampling, seed=11 + sample)),
        )
        assert sampled(together[0, sample]) == sampled(alone[0, 0])
    assert made.memory().current.kv_cache == 0


def test_samples_share_their_prompts_blocks(model: Model) -> None:
    """Four samples of a long prompt take little more than one."""
    prompt = prompts([64])[0]
    peaks = [
        (made := engine(model, block_size=4), run(made, Request(prompt, 2, samples=n)))[0]
        .memory()
        .peak.kv_cache
        for n in (1, 4)
    ]
    assert peaks[1] < 2 * peaks[0]


def test_samples_survive_too_little_memory(model: Model) -> None:
    """Where all samples do not fit, they are pre-empted in turn and end as they would have."""
    request = Request(prompts([20])[0], 12, SamplingParams(temperature=1.0), samples=4)
    roomy = run(engine(model, block_size=4), request)
    made = engine(model, block_size=4, kv_tokens=36, check=True)
    tight = run(made, request)
    assert {k: sampled(o) for k, o in tight.items()} == {k: sampled(o) for k, o in roomy.items()}
    assert made.memory().current.kv_cache == 0


def test_too_many_samples_are_refused(model: Model) -> None:
    """More than may run at once, none, or with the prompt's logits."""
    with pytest.raises(RequestError, match="max_sequences"):
        engine(model, max_sequences=2).submit(Request((1,), 1, samples=3))
    with pytest.raises(RequestError, match="samples"):
        Request((1,), 1, samples=0)
    with pytest.raises(RequestError, match="one sample"):
        Request((1,), 1, samples=2, logits_from=0)


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_a_cached_prefix_changes_no_bit(model: Model, kv_dtype: str | None) -> None:
    """Requests that begin alike, one after another: tokens and logprobs as without the cache, prompts as hits."""
    beginning = prompts([41])[0]
    wanted = [
        Request((*beginning, *tail), 9, SamplingParams(logprobs=2)) for tail in prompts([1, 7, 7, 30], seed=1)
    ]
    made = engine(model, block_size=4, prefix_cache=True, check=True, kv_dtype=kv_dtype)
    for request in wanted:
        cached = run(made, request)
        alone = run(engine(model, block_size=4, kv_dtype=kv_dtype), request)
        assert [sampled(o) for o in cached.values()] == [sampled(o) for o in alone.values()]
    report = made.memory().kv
    assert report.hit_tokens >= 3 * 40
    assert report.lookups >= 4


def test_prefixes_of_other_tenants_are_not_found(model: Model) -> None:
    """The same prompt under another salt is computed anew."""
    made = engine(model, block_size=4, prefix_cache=True)
    for salt in ("a", "b"):
        run(made, Request(prompts([41])[0], 2, cache_salt=salt))
    assert made.memory().kv.hit_tokens == 0
    run(made, Request(prompts([41])[0], 2, cache_salt="b"))
    assert made.memory().kv.hit_tokens == 40


def test_cached_blocks_make_room(model: Model) -> None:
    """A full cache of old prefixes refuses nobody: the least recently used go."""
    made = engine(model, block_size=4, prefix_cache=True, kv_tokens=80, check=True)
    for seed in range(8):
        run(made, Request(prompts([50], seed)[0], 5))
    assert made.memory().kv.evictions > 0


def test_the_recorder_tells_what_happened(model: Model) -> None:
    """Events of every kind that occurred, in order of their steps, and only the last of them."""
    made = engine(model, block_size=4, kv_tokens=64)
    run(made, *(Request(p, 30) for p in prompts([20, 20, 20])))
    kinds = {event.kind for event in made.recorder.events}
    assert {"submit", "admit", "step", "commit", "release", "preempt", "end"} <= kinds
    steps = [event.step for event in made.recorder.events]
    assert steps == sorted(steps)
    assert made.recorder.limits_hit > 0
    small = FlightRecorder()
    for number in range(5000):
        small.record("step", number=number)
    assert len(small.events) == 4096
    assert small.events[-1].fields["number"] == 4999


def test_the_report_adds_up(model: Model) -> None:
    """Requests' bytes are those of the blocks in use, where nothing is shared; layers' too."""
    made = engine(model, block_size=4)
    for prompt in prompts([13, 40, 9]):
        made.submit(Request(prompt, 20))
    made.step()
    made.step()
    report = made.memory()
    in_use = sum(n * b for n, b in zip(report.kv.blocks_in_use, report.kv.block_bytes, strict=True))
    assert sum(report.requests.values()) == in_use == sum(layer.kv_cache for layer in report.layers)
    assert report.kv.sharing_ratio == 1
    assert 0 <= report.kv.waste < 0.5
    stored = sum(t.nbytes for role, t in model.weights.items() if role.startswith("layers."))
    assert sum(layer.weights for layer in report.layers) == stored


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_a_fork_goes_on_as_a_request_with_its_tokens_would(model: Model, kv_dtype: str | None) -> None:
    """Beam candidates: other last tokens over one context, each with the output of a request that has them."""
    prompt = prompts([17])[0]
    made = engine(model, block_size=4, kv_dtype=kv_dtype, check=True)
    number = made.submit(Request(prompt, 12, SamplingParams(logprobs=2)))
    outputs = [output for _ in range(3) for output in made.step()]
    so_far = tuple(output.sampled.token for output in outputs if output.sampled)
    beams = {token: made.fork(number, token=token) for token in (5, 60)}
    rest: dict[int, list[object]] = {}
    while made.has_work:
        for output in made.step():
            rest.setdefault(output.request, []).append(output.sampled)
    for token, beam in beams.items():
        alone = run(
            engine(model, block_size=4, kv_dtype=kv_dtype),
            Request((*prompt, *so_far[:-1], token), 9, SamplingParams(logprobs=2)),
        )
        assert rest[beam] == sampled(alone[0, 0])
    assert made.memory().current.kv_cache == 0


def test_what_cannot_be_forked_is_refused(model: Model) -> None:
    """A finished request, one that waits, one without output, a token that is none, and one too many."""
    made = engine(model, max_sequences=2, token_budget=4, block_size=4)
    first = made.submit(Request(prompts([6])[0], 40))
    with pytest.raises(SequenceStateError):
        made.fork(first)
    made.step()
    with pytest.raises(RequestError, match="no output yet"):
        made.fork(first)
    made.step()
    with pytest.raises(TokenIdError):
        made.fork(first, token=97)
    made.fork(first, seed=3)
    with pytest.raises(RequestError, match="no more may"):
        made.fork(first)
    made.abort(first)
    with pytest.raises(SequenceStateError):
        made.fork(first)
    run(made)
    assert made.memory().current.kv_cache == 0
