"""Engines break where two features meet: every pair of them, against the request alone."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from schedules import alone, transcripts
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request, SamplingParams

FEATURES: dict[str, dict[str, object]] = {
    "chunked prefill": {"token_budget": 5},
    "prefix hit": {"prefix_cache": True},
    "pre-empted by recompute": {"kv_tokens": 64},
    "pre-empted by swap": {"kv_tokens": 64, "swap": 10**9},
    "samples": {},
    "window": {},
    "quantized KV": {"kv_dtype": "int4"},
    "abort": {},
}
"""What each asks of the engine's configuration; some are asked of the model or the requests instead."""

BEGINNING = tuple(range(3, 20))


@pytest.mark.parametrize("pair", list(combinations_with_replacement(FEATURES, 2)), ids=" x ".join)
def test_two_features_at_once_change_no_bit(pair: tuple[str, str]) -> None:
    """Logits and tokens of every request that was not aborted are those it has alone."""
    fields: dict[str, object] = {"block_size": 4, "max_sequences": 6, "check": True}
    for feature in pair:
        fields |= FEATURES[feature]
    config = EngineConfig(**fields)  # type: ignore[arg-type]
    model = tiny_model("gemma3", layers=3) if "window" in pair else tiny_model("llama")
    samples = 3 if "samples" in pair else 1
    wanted = [
        Request((*BEGINNING, number), 30, SamplingParams(temperature=0.9, seed=100 * number), samples=samples)
        for number in range(3)
    ]
    doomed = Request((*BEGINNING, 90), 40, SamplingParams(seed=900), samples=samples)

    def between(engine: Engine) -> None:
        engine.step()
        engine.step()
        if "abort" in pair:
            number = engine.submit(doomed)
            for _ in range(3):
                engine.step()
            engine.abort(number)

    seen: list[Engine] = []

    def watched(engine: Engine) -> None:
        seen.append(engine)
        between(engine)

    found = transcripts(model, config, wanted, watched)
    assert found == [alone(model, config, request) for request in wanted]
    kinds = {event.kind for event in seen[0].recorder.events}
    swapped = {event.fields["swapped"] for event in seen[0].recorder.events if event.kind == "preempt"}
    if "pre-empted by recompute" in pair and "pre-empted by swap" not in pair:
        assert swapped == {False}
    if "pre-empted by swap" in pair:
        assert True in swapped
    if "prefix hit" in pair:
        assert seen[0].memory().kv.hit_tokens > 0
    if samples > 1:
        assert "fork" in kinds
