"""The figures of an answer are what they are called."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from refengine.cli.answer import Answer
from refengine.cli.loading import EngineOptions
from refengine.cli.statistics import peak_rss_bytes, statistics_of
from refengine.config import EngineConfig
from refengine.sampling import Sampled


def test_rates_are_tokens_over_their_own_time() -> None:
    """Prefill is the prompt over the time to the first token, decode the others over the time after it."""
    answer = Answer([1, 2, 3, 4])
    answer.sampled = [Sampled(token, -1.0) for token in range(5)]
    answer.first_token_s, answer.decode_s = 0.5, 2.0
    statistics = statistics_of([answer], 3.0)
    assert (statistics.prompt_tokens, statistics.generated_tokens) == (4, 5)
    assert (statistics.load_s, statistics.first_token_s) == (3.0, 0.5)
    assert (statistics.prefill_tokens_per_s, statistics.decode_tokens_per_s) == (8.0, 2.0)


def test_a_rate_of_nothing_is_none() -> None:
    """One token has no decode rate, and no token has no rate at all."""
    answer = Answer([1])
    assert statistics_of([answer], 0.0).prefill_tokens_per_s is None
    answer.sampled, answer.first_token_s = [Sampled(0, -1.0)], 0.5
    assert statistics_of([answer], 0.0).decode_tokens_per_s is None


def test_a_download_is_no_loading(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time to load a model begins when its file is here."""
    clock = count()
    monkeypatch.setattr("refengine.cli.loading.perf_counter", lambda: next(clock))

    def fetch(*_: object, **__: object) -> Path:
        next(clock)
        return models / "alphabet.gguf"

    monkeypatch.setattr("refengine.cli.loading.fetch", fetch)
    _, load_s = EngineOptions("numpy", EngineConfig(), offline=True).load("alphabet")
    assert load_s == 1


def test_the_peak_counts_what_was_given_back() -> None:
    """Memory that was touched and freed stays in the peak."""
    if (before := peak_rss_bytes()) is None:
        pytest.skip("this system does not tell")
    held = bytearray(b"x") * (before + 2**26)
    del held
    assert (peak_rss_bytes() or 0) >= before + 2**26
