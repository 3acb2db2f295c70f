"""What an answer took: tokens, rates, times and memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from refengine.cli.answer import Answer
from refengine.cli.figures import amount, bytes_figure
from refengine.cli.tables import print_fields
from refengine.cli.terminal import say


@dataclass(frozen=True)
class Statistics:
    """Figures of one answer.

    Attributes:
        prompt_tokens, generated_tokens: their numbers.
        load_s: seconds to load the model, a download not included.
        first_token_s: seconds from the request to its first token.
        prefill_tokens_per_s: prompt tokens over ``first_token_s``.
        decode_tokens_per_s: of the tokens after the first, ``None`` where there are none.
        peak_rss_bytes: the most memory this process has had resident, ``None`` where that is not told.
    """

    prompt_tokens: int
    generated_tokens: int
    load_s: float
    first_token_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    peak_rss_bytes: int | None


def statistics_of(answer: Answer, load_s: float) -> Statistics:
    """The figures of an answer."""
    prompt, generated = len(answer.prompt_ids), len(answer.sampled)
    return Statistics(
        prompt_tokens=prompt,
        generated_tokens=generated,
        load_s=load_s,
        first_token_s=answer.first_token_s,
        prefill_tokens_per_s=prompt / answer.first_token_s if answer.first_token_s else None,
        decode_tokens_per_s=(generated - 1) / answer.decode_s if generated > 1 and answer.decode_s else None,
        peak_rss_bytes=peak_rss_bytes(),
    )


def print_statistics(statistics: Statistics) -> None:
    """Print them to stderr, after an empty line."""
    prefill, decode = statistics.prefill_tokens_per_s, statistics.decode_tokens_per_s
    peak = statistics.peak_rss_bytes
    fields = {
        "load": f"{statistics.load_s:.2f} s",
        "prompt": amount(statistics.prompt_tokens, "token") + _rate(prefill),
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
