"""The results as a picture: how many times llama.cpp's (or Transformers', without it), file by file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers_figures import Results
from peers_table import BASES, COMPARED, LESS_IS_BETTER, base_of, best_of_base

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    "prefill", "prefill_long", "decode", "context", "far", "many", "crowd",
    "net", "device_net", "device_net_far", "first_token",
)  # fmt: skip
TITLES = {
    "net": "peak RSS, imports taken off",
    "device_net": "device memory at {context:,}, context taken off",
    "device_net_far": "device memory at {far_context:,}, context taken off",
    "crowd": "{crowd} requests at once",
    "first_token": "first token of a process",
    "many": "{requests} requests at once",
}
UNITS = {"net": "MB", "device_net": "MB", "device_net_far": "MB", "first_token": "s"}
"""Tokens per second, where none is given."""

COLOURS = {"refengine": ("#1f5fa8", "#7fb2e5", "#b9d4ee"), "transformers": ("#c98a3b",)}
INK, FAINT, LIMIT = "#222222", "#777777", "#b22222"

BAR = 0.36
"""Height of a bar, where one file has two."""


def draw(results: Results, path: Path) -> None:
    """Write the chart in the format that the suffix says.

    A panel for each figure, a group of bars for each file; a bar goes from 1, which is the base, to the
    median of the ratios, with a line from the least to the most. Decoding has a mark where the memory would
    be the limit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no chart: {error}; install refengine[bench]", flush=True)
        return
    base = base_of(results)
    present = {name for file in results.files for name in results.contestants(file)}
    names = [name for name, engine in results.engines.items() if engine != base and name in present]
    panels = [f for f in PANELS if any(_ratios(results, name, f) for name in names)]
    if not panels:
        print("no chart: there is nothing to divide by, or nothing beside it", flush=True)
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.9 + (0.25 + 0.24 * len(names)) * len(results.files)
    figure = Figure(figsize=(5.2 * columns + 0.6, height * rows + 1.1), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i < len(panels):
            _panel(axes, results, panels[i], names, labels=i % columns == 0)
        else:
            axes.axis("off")
    handles = [_patch(_colour(results, name), name) for name in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=11)
    rounds = 1 + max(sample.round for sample in results.samples)
    several = sum(engine == base for engine in results.engines.values()) > 1
    settings = " (flash attention on or off, whichever is better)" if several else ""
    figure.supxlabel(
        f"times {BASES[base]}{settings}, logarithmic. Medians of {rounds} "
        f"rounds; lines: least and most. {results.machine.get('machine', '')}, {results.threads} threads.",
        fontsize=9,
        color=FAINT,
    )
    figure.savefig(path)


def _panel(axes: Axes, results: Results, key: str, names: list[str], *, labels: bool) -> None:
    files = results.files
    ratios = {name: _ratios(results, name, key) for name in names}
    least, most, below = 0.9, 1.1, False
    for number, name in enumerate(names):
        for row, file in enumerate(files):
            ratio = ratios[name].get(file)
            if ratio is None:
                continue
            y = row + BAR * (number - (len(names) - 1) / 2) * (0.9 if len(names) < 3 else 0.72)
            tall = BAR * (0.82 if len(names) < 3 else 0.64)
            axes.barh(y, ratio.median - 1, tall, left=1, color=_colour(results, name), zorder=2)
            axes.plot([ratio.least, ratio.most], [y, y], color=INK, linewidth=1.1, zorder=3)
            _label(axes, y, ratio, key, results.median(file, name, key))
            least, most = min(least, ratio.least), max(most, ratio.most)
            below = below or ratio.median < 1
    if key == "decode":
        most = max(most, _limits(axes, results))
    axes.axvline(1, color=INK, linewidth=1, zorder=4)
    axes.set_xscale("log", base=2)
    span = most / least
    axes.set_xlim(least / span ** (0.46 if below else 0.06), most * span**0.46)  # with room for labels
    _ticks(axes)
    axes.set_ylim(len(files) - 0.45, -0.55)
    axes.set_yticks(range(len(files)), files if labels else [""] * len(files), fontsize=10)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", zorder=0)
    title = TITLES.get(key, COMPARED[key]).format(**vars(results.sizes))
    better = "less" if key in LESS_IS_BETTER else "more"
    axes.set_title(f"{title} ({better} is better)", loc="left", fontsize=11, color=INK)


def _label(axes: Axes, y: float, ratio: Any, key: str, value: float | None) -> None:
    """The ratio and what was measured, outside the bar's end."""
    unit = UNITS.get(key, "tok/s")
    digits = 2 if unit == "s" else 1 if value is not None and value < 10 else 0
    text = f"{ratio.median:.2f}×  {value or 0:,.{digits}f} {unit}"
    right = ratio.median >= 1
    axes.annotate(
        text,
        (max(ratio.most, 1.0) if right else min(ratio.least, 1.0), y),
        xytext=(4 if right else -4, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=8.5,
        color=INK,
        zorder=5,
        clip_on=True,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _limits(axes: Axes, results: Results) -> float:
    """Marks where reading the weights at the measured bandwidth would be all; gives the farthest."""
    farthest = 1.0
    for row, file in enumerate(results.files):
        base = best_of_base(results, file, "decode")
        share = results.median(file, base, "share") if base else None
        if share:
            farthest = max(farthest, 1 / share)
            axes.plot([1 / share] * 2, [row - 0.44, row + 0.44], color=LIMIT, linewidth=1.5, zorder=1)
            if row == 0:
                axes.annotate(
                    "memory limit",
                    (1 / share, row - 0.44),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=LIMIT,
                )
    return farthest


def _ticks(axes: Axes) -> None:
    """Powers of four or two, or less far apart, so that there are three to six or so."""
    low, high = axes.get_xlim()
    found: list[float] = []
    for steps in ((1.0,), (1.0, 2.0), (1.0, 1.5, 2.0, 3.0), (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5)):
        found = [x for i in range(-6, 7) for step in steps if low <= (x := step * 4.0**i) <= high]
        if len(found) >= 3:
            break
    axes.set_xticks(found, [f"{x:g}" if x >= 1 or 1 / x % 1 else f"1/{1 / x:g}" for x in found], fontsize=9)
    axes.minorticks_off()


def _ratios(results: Results, name: str, key: str) -> dict[str, Any]:
    found = {}
    for file in results.files:
        base = best_of_base(results, file, key)
        ratio = results.ratio(file, name, base, key) if base else None
        if ratio is not None:
            found[file] = ratio
    return found


def _colour(results: Results, name: str) -> str:
    engine = results.engines[name]
    alike = [other for other, kind in results.engines.items() if kind == engine]
    colours = COLOURS[engine]
    return colours[min(alike.index(name), len(colours) - 1)]


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)
