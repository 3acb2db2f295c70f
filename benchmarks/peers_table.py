"""The results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from peers_figures import OTHERS, QUIET, READING, Ratio, Results

LLAMA = "llama.cpp"

BASES = {LLAMA: LLAMA, "transformers": "Transformers"}
"""Whom the others are divided by, and how tables call it: the first of these that took part."""

LABELS = {
    "prefill": "prefill of {prompt} tokens, tok/s",
    "prefill_long": "prefill of {long_prompt:,} tokens, tok/s",
    "decode": "decode of {steps} tokens, tok/s",
    "share": "· share of the read bandwidth",
    "context": "decode at {context:,} tokens, tok/s",
    "context_share": "· share of the read bandwidth",
    "far": "decode at {far_context:,} tokens, tok/s",
    "many": "{requests} requests at once, tok/s",
    "gain": "· times one request's",
    "crowd": "{crowd} requests at once, tok/s",
    "crowd_gain": "· times one request's",
    "device_peak": "peak device memory at {context:,} tokens, MB",
    "device_imports": "· of it there before the file is opened",
    "device_net": "· the rest",
    "device_peak_far": "peak device memory at {far_context:,} tokens, MB",
    "device_net_far": "· less what was there before",
    "peak": "peak RSS, one request, MB",
    "imports": "· of it there after the imports",
    "net": "· the rest",
    "peak_many": "peak RSS, {requests} requests as well, MB",
    "first_token": "first token of a process, s",
}
"""Rows of the table of a file."""

LESS_IS_BETTER = (
    "peak", "imports", "net", "peak_many", "first_token",
    "device_peak", "device_imports", "device_net", "device_peak_far", "device_net_far",
)  # fmt: skip

SHARES = ("share", "context_share")

COMPARED = {
    "prefill": "prefill",
    "prefill_long": "prefill of {long_prompt:,}",
    "decode": "decode",
    "context": "decode at {context:,}",
    "far": "decode at {far_context:,}",
    "many": "{requests} at once",
    "crowd": "{crowd} at once",
    "device_net": "device memory at {context:,}",
    "device_net_far": "device memory at {far_context:,}",
    "peak": "peak RSS",
    "net": "· less imports",
    "first_token": "first token",
}
"""Columns of the table of ratios."""

OF_GPUS = ("prefill_long", "far", "crowd", "device_net", "device_net_far")
"""Of them, those that are there only where they were measured."""


BASIS = {
    "share": "decode", "context_share": "context", "gain": "many", "crowd_gain": "crowd",
    "imports": "peak", "net": "peak",
    "device_imports": "device_peak", "device_net": "device_peak", "device_net_far": "device_peak_far",
}  # fmt: skip
"""Where the better setting in one figure is that in another."""


def base_of(results: Results) -> str:
    """The engine that the others are divided by; empty where none of ``BASES`` took part."""
    took_part = {results.engines[name] for file in results.files for name in results.contestants(file)}
    return next((engine for engine in BASES if engine in took_part), "")


def best_of_base(results: Results, file: str, figure: str) -> str | None:
    """That engine; llama.cpp with flash attention or without, whichever has the better median in it."""
    basis = BASIS.get(figure, figure)
    return results.best(file, base_of(results), basis, less=basis in LESS_IS_BETTER)


def compared(results: Results) -> list[str]:
    """Columns of the table of ratios."""
    measured = {sample.figure for sample in results.samples}
    return [name for name in COMPARED if name not in OF_GPUS or BASIS.get(name, name) in measured]


def report(results: Results) -> str:
    """All tables: every file's, and the ratios of all."""
    parts = [*heading(results)]
    for file in results.files:
        parts += ["", *file_table(results, file)]
    base = base_of(results)
    for ours in (name for name, engine in results.engines.items() if engine != base):
        parts += ["", *ratio_table(results, ours)]
    return "\n".join(parts)


def heading(results: Results) -> Iterator[str]:
    """What ran on what."""
    rounds = 1 + max((sample.round for sample in results.samples), default=-1)
    yield f"Medians of {rounds} rounds, {results.threads} threads each, alternating. Ratios are"
    yield "formed within a round: their median (least – most)."
    taken = [sample.value for sample in results.samples if sample.contestant == OTHERS]
    if taken:
        yield f"Others took {statistics.median(taken):.0%} of the cores' time, {max(taken):.0%} at most."
    if taken and max(taken) > QUIET:
        yield ""
        yield "**The machine was not quiet: these figures compare nothing.** Threads that spin lose most."
    yield ""
    for name, text in (results.machine | results.about).items():
        yield f"- {name}: {text}"


def file_table(results: Results, file: str) -> Iterator[str]:
    """Medians of every engine; llama.cpp with or without flash attention, whichever is better in a row."""
    base = base_of(results)
    others = [name for name in results.contestants(file) if results.engines[name] != base]
    divided = any(results.engines[name] == base for name in results.contestants(file))
    shown = BASES.get(base, "")
    names = [*others, shown] if divided else others
    ratios = [f"{name} ÷ {shown}" for name in others] if divided else []
    read = results.median(file, READING, "bandwidth")
    yield (
        f"{file}: {results.file_bytes[file] / 1e6:,.1f} MB, of which a token reads "
        f"{results.step_bytes[file][0] / 1e6:,.1f}"
        + ("" if read is None else f"; memory is read at {read:.1f} GB/s")
    )
    yield ""
    yield from _head(["", *names, *ratios])
    for figure, label in LABELS.items():
        chosen = {name: name for name in others}
        best = best_of_base(results, file, figure)
        if best is not None:
            chosen[shown] = best
        cells = [_cell(figure, results.median(file, chosen.get(name, name), figure)) for name in names]
        cells += [
            _ratio(results.ratio(file, name, best, figure) if best and figure in COMPARED else None)
            for name in others
            if divided
        ]
        if any(cells):
            yield _row([label.format(**vars(results.sizes)), *cells])
    yield from _agreement_rows(results, file, names, len(ratios))
    yield from _flash_attention(results, file)


def _agreement_rows(results: Results, file: str, names: list[str], blank: int) -> Iterator[str]:
    found = {a.contestant: a for a in results.agreements if a.file == file}
    if not found:
        return
    variants = [name for name in results.contestants(file) if results.engines[name] == LLAMA]
    if variants and variants[0] in found:
        found[LLAMA] = found[variants[0]]
    reference = next(iter(found.values())).reference
    columns = [found.get(name) for name in names]
    rows = {
        f"KL divergence from {reference}, nats": [f"{a.divergence:.1e}" if a else "" for a in columns],
        "· same likeliest token": [f"{a.same_top:.0%}" if a else "" for a in columns],
        "· same greedy continuation": [f"{a.continued} of {a.out_of}" if a else "" for a in columns],
    }
    for label, cells in rows.items():
        yield _row([label, *cells, *[""] * blank])


def _flash_attention(results: Results, file: str) -> Iterator[str]:
    """Which of llama.cpp's settings a row has."""
    variants = [name for name in results.contestants(file) if results.engines[name] == LLAMA]
    if len(variants) < 2:
        return
    rows: dict[str, list[str]] = {}
    for figure in ("prefill", "decode", "context", "many", "peak", "first_token"):
        best = best_of_base(results, file, figure)
        if best is not None:
            rows.setdefault(best, []).append(COMPARED[figure].format(**vars(results.sizes)))
    yield ""
    yield "Better in its rows: " + "; ".join(f"{name} ({', '.join(rows[name])})" for name in rows) + "."


def ratio_table(results: Results, ours: str) -> Iterator[str]:
    """One contestant ÷ llama.cpp, or what else the others are divided by; a row for each file."""
    rows, columns = [], compared(results)
    for file in results.files:
        ratios = []
        for figure in columns:
            best = best_of_base(results, file, figure)
            ratios.append(results.ratio(file, ours, best, figure) if best else None)
        if any(ratios):
            share = results.median(file, ours, "share")
            rows.append(
                _row([file, *(f"{r.median:.2f}" if r else "" for r in ratios), _cell("share", share)])
            )
    if rows:
        labels = [COMPARED[figure].format(**vars(results.sizes)) for figure in columns]
        yield from _head([f"{ours} ÷ {BASES[base_of(results)]}", *labels, "share of bandwidth, decode"])
        yield from rows


def _head(cells: list[str]) -> Iterator[str]:
    yield _row(cells)
    yield "|---|" + "--:|" * (len(cells) - 1)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(figure: str, value: float | None) -> str:
    if value is None:
        return ""
    if figure in SHARES:
        return f"{value:.0%}"
    if figure in ("gain", "crowd_gain", "first_token"):
        return f"{value:.2f}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.2f} ({ratio.least:.2f} – {ratio.most:.2f})"
