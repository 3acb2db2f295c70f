"""What an engine held while it answered: the report of ``--memory-report``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from refengine.cli.answer import Answer
from refengine.cli.figures import amount, bytes_figure
from refengine.cli.tables import print_fields, print_table
from refengine.cli.terminal import say

if TYPE_CHECKING:
    from refengine.forecast import Forecast
    from refengine.llm import LLM
    from refengine.memory import KVLayout
    from refengine.memory_report import Holdings, LayerHoldings, MemoryReport
    from refengine.request import Output

PURPOSES = {
    "weights": "weights, decoded",
    "mapped": "weights, as stored",
    "arena": "arena",
    "logits": "logits",
    "kv_cache": "KV cache",
    "host": "on the host, beside",
}


@dataclass(frozen=True)
class Observed:
    """What was planned for an answer and what was measured.

    Attributes:
        planned: the forecast for as many positions; of several samples as if they shared nothing.
        fullest: the report of the moment between two steps when most was held.
        now: after the answer.
        layout: of the KV cache.
    """

    planned: Forecast
    fullest: MemoryReport
    now: MemoryReport
    layout: KVLayout


class MemoryWatch:
    """Looks at an engine's memory while an answer comes."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        self._fullest = llm.engine.memory()

    def __call__(self, output: Output) -> None:
        """Remember the report of this moment, if more is held than before."""
        found = self._engine.memory()
        if found.current.total >= self._fullest.current.total:
            self._fullest = found

    def observed(self, answers: Sequence[Answer]) -> Observed:
        """What was planned for these samples of one prompt, and what was seen."""
        from refengine.forecast import forecast

        plan = self._engine.plan
        prompt = len(answers[0].prompt_ids)
        longest = max(len(answer.sampled) for answer in answers)
        positions = prompt + max(longest - 1, 0)  # the last token is not computed
        planned = forecast(plan, positions, len(answers), prompt)
        return Observed(planned, self._fullest, self._engine.memory(), plan.layout)


def print_memory(observed: Observed) -> None:
    """Print the report to stderr, after an empty line."""
    fullest, now = observed.fullest, observed.now
    planned = "PLANNED" if observed.planned.batch == 1 else "PLANNED, NOTHING SHARED"
    say()
    print_table(
        {"MEMORY": "left", planned: "right", "PEAK": "right", "": "left", "NOW": "right"},
        _by_purpose(observed),
        file=sys.stderr,
    )
    say()
    fields = {
        "peak": f"in step {now.peak_step:,}",
        "layers": "\n".join(_by_layer(fullest.layers)),
        "requests": ", ".join(f"request {n}: {bytes_figure(held)}" for n, held in fullest.requests.items())
        or "none",
        **_by_pool(observed),
        "sharing": f"{fullest.kv.sharing_ratio:.2f} references to a block",
        "waste": f"{fullest.kv.waste:.1%} of the positions in blocks of requests are not written yet",
        "fragmentation": f"{fullest.kv.fragmentation:.1%} of the bytes in segments are in free blocks",
        "prefix cache": _prefix_cache(fullest),
    }
    print_fields(fields, file=sys.stderr)


def memory_json(observed: Observed) -> dict[str, Any]:
    """The report as JSON has it; all sizes in bytes."""
    now, planned = observed.now, observed.planned
    return {
        "planned": {**_with_total(planned.peak), "process": planned.process_bytes, "moment": planned.moment},
        "peak": {**_with_total(now.peak), "step": now.peak_step},
        "difference": {
            name: _with_total(now.peak)[name] - nbytes for name, nbytes in _with_total(planned.peak).items()
        },
        "now": _with_total(now.current),
        "limit": now.limit,
        "resident": now.resident,
        "peak_resident": now.peak_resident,
        "fullest": {
            **_with_total(observed.fullest.current),
            "requests": {str(n): held for n, held in observed.fullest.requests.items()},
            "layers": [asdict(layer) for layer in observed.fullest.layers],
            "kv": asdict(observed.fullest.kv),
        },
    }


def _with_total(holdings: Holdings) -> dict[str, int]:
    """By purpose, in all, and what is beside a device that has memory of its own."""
    by_purpose = asdict(holdings)
    host = by_purpose.pop("host")
    return {**by_purpose, "engine": holdings.total, "host": host}


def _by_purpose(observed: Observed) -> Iterator[tuple[str, str, str, str, str]]:
    planned, peak, now = (
        _with_total(holdings) for holdings in (observed.planned.peak, observed.now.peak, observed.now.current)
    )
    for name in planned:
        if planned[name] or peak[name] or name == "engine":
            yield (
                PURPOSES.get(name, name),
                bytes_figure(planned[name]),
                bytes_figure(peak[name]),
                _difference(peak[name] - planned[name]),
                bytes_figure(now[name]),
            )
    resident, peak_resident = observed.now.resident, observed.now.peak_resident
    if resident is not None and peak_resident is not None:
        most = observed.planned.process_bytes
        yield (
            "process (RSS)",
            bytes_figure(most),
            bytes_figure(peak_resident),
            f"{_difference(peak_resident - most)} ({peak_resident / most - 1:+.1%})",
            bytes_figure(resident),
        )


def _difference(nbytes: int) -> str:
    if nbytes == 0:
        return "equal"
    return f"{bytes_figure(abs(nbytes))} {'more' if nbytes > 0 else 'less'}"


def _by_layer(layers: tuple[LayerHoldings, ...]) -> Iterator[str]:
    """A line for every run of layers that hold the same."""
    for layer, numbers in groupby(range(len(layers)), lambda number: layers[number]):
        first, *others = numbers
        which = f"{first}" if not others else f"{first} to {others[-1]}, each"
        yield (
            f"{which}: {bytes_figure(layer.weights)} of weights as stored, "
            f"{bytes_figure(layer.kv_cache)} of KV cache"
        )


def _by_pool(observed: Observed) -> dict[str, str]:
    kv, pools = observed.fullest.kv, observed.layout.groups
    told = {}
    for g, pool in enumerate(pools):
        what = "whole context" if pool.window is None else f"window of {pool.window:,}"
        what += ", exact copies" if pool.recent else ", sealed" if pool.sealed is not None else ""
        told["blocks" if len(pools) == 1 else f"blocks, pool {g}"] = (
            f"{kv.blocks_in_use[g]:,} of {kv.blocks[g]:,} in use, {kv.shared_blocks[g]:,} shared, "
            f"{kv.cached_blocks[g]:,} cached; {bytes_figure(kv.block_bytes[g])} each, for "
            f"{amount(len(pool.layers), 'layer')} ({what})"
        )
    return told


def _prefix_cache(report: MemoryReport) -> str:
    kv = report.kv
    if not kv.lookups:
        return "not asked"
    return (
        f"{amount(kv.lookups, 'look-up')}, {kv.hit_tokens:,} of {amount(kv.looked_up_tokens, 'token')} found "
        f"({kv.hit_tokens / max(kv.looked_up_tokens, 1):.0%}), {amount(kv.evictions, 'eviction')}"
    )
