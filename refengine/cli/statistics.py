"""What an answer took: tokens, rates, times and memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refengine.cli.answer import Answer
from refengine.cli.figures import amount, bytes_figure
from refengine.cli.tables import print_fields
from refengine.cli.terminal import say


@dataclass(frozen=True)
class Statistics:
    """Figures of one answer, or of several samples together.

    Attributes:
        prompt_tokens, generated_tokens: their numbers.
        cached_tokens: of the prompt, found in the prefix cache.
        load_s: seconds to load the model, a download not included.
        first_token_s: seconds from the request to its first token.
        prefill_tokens_per_s: prompt tokens computed over ``first_token_s``.
        decode_tokens_per_s: of the tokens after the first of each sample, ``None`` where there are none.
        peak_rss_bytes: the most memory this process has had resident, ``None`` where that is not told.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    load_s: float
    first_token_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    peak_rss_bytes: int | None


def statistics_of(answers: Sequence[Answer], load_s: float, cached_tokens: int = 0) -> Statistics:
    """The figures of an answer, or of several that one prompt was given at once."""
    prompt, generated = len(answers[0].prompt_ids), sum(len(answer.sampled) for answer in answers)
    first_token_s = min(answer.first_token_s for answer in answers)
    decode_s = max(answer.first_token_s + answer.decode_s for answer in answers) - first_token_s
    decoded = generated - len(answers)
    return Statistics(
        prompt_tokens=prompt,
        cached_tokens=cached_tokens,
        generated_tokens=generated,
        load_s=load_s,
        first_token_s=first_token_s,
        prefill_tokens_per_s=(prompt - cached_tokens) / first_token_s if first_token_s else None,
        decode_tokens_per_s=decoded / decode_s if decoded > 0 and decode_s else None,
        peak_rss_bytes=peak_rss_bytes(),
    )


def print_statistics(statistics: Statistics) -> None:
    """Print them to stderr, after an empty line."""
    prefill, decode = statistics.prefill_tokens_per_s, statistics.decode_tokens_per_s
    peak = statistics.peak_rss_bytes
    kept = f", {statistics.cached_tokens:,} of them kept from before" if statistics.cached_tokens else ""
    fields = {
        "load": f"{statistics.load_s:.2f} s",
        "prompt": amount(statistics.prompt_tokens, "token") + kept + _rate(prefill),
        "first token": f"after {statistics.first_token_s:.2f} s",
        "answer": amount(statistics.generated_tokens, "token") + _rate(decode),
        "peak memory": bytes_figure(peak) if peak else "unknown",
    }
    say()
    print_fields(fields, file=sys.stderr)


def peak_rss_bytes() -> int | None:
    """The most memory this process has had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what our parent had before it became us
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rate(tokens_per_s: float | None) -> str:
    return f", {tokens_per_s:.1f} tok/s" if tokens_per_s else ""
