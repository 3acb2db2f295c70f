"""``refengine plan`` tells what will be held, in words, in JSON and as a picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cli.alphabet_model import HEAD_SIZE, KV_HEADS, LAYERS, VOCABULARY_SIZE
from click.testing import Result

from refengine import backend
from refengine.cli.activations import activations
from refengine.cli.charts.arena import Box, boxes, draw, living, overview, whole
from refengine.cli.charts.svg import ticks
from refengine.config import EngineConfig
from refengine.engine_plan import EnginePlan, plan_engine
from refengine.loader import read_gguf
from refengine.models import build

Run = Callable[..., Result]


def as_json(run: Run, *args: str) -> dict[str, Any]:
    result = run("plan", *args, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


@pytest.fixture(scope="module")
def plan(models: Path) -> EnginePlan:
    """Of the alphabet, for 48 tokens per step."""
    config = EngineConfig(max_sequences=1, token_budget=48, kv_tokens=256)
    return plan_engine(build(read_gguf(models / "alphabet.gguf")), backend.load("numpy"), config)


def test_weights_are_those_of_the_file(run: Run, models: Path) -> None:
    """Every tensor is counted once under its encoding, with the bytes that gguf reads."""
    summary = as_json(run, "alphabet.gguf")
    tensors = gguf.GGUFReader(models / "alphabet.gguf").tensors
    for encoding in {row["encoding"] for row in summary["weights"]}:
        rows = [row for row in summary["weights"] if row["encoding"] == encoding]
        stored = [tensor for tensor in tensors if tensor.tensor_type.name.lower() == encoding]
        assert sum(row["tensors"] for row in rows) == len(stored)
        assert sum(row["stored"] for row in rows) == sum(int(tensor.n_bytes) for tensor in stored)
        assert sum(row["weights"] for row in rows) == sum(int(np.prod(tensor.shape)) for tensor in stored)


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (100, 1), (2048, 1), (256, 5)])
def test_the_kv_cache_is_whole_blocks(run: Run, context: int, batch: int) -> None:
    """Keys and values of each position in float32, every sequence rounded up to blocks of 16.

    Logits are those of the prompts that end in the fullest step, the last one of 512 tokens.
    """
    summary = as_json(run, "alphabet.gguf", "--context", str(context), "--batch", str(batch))
    position = LAYERS * 2 * KV_HEADS * HEAD_SIZE * 4
    assert summary["kv_bytes_per_position"] == position
    assert summary["peak"]["kv_cache"] == batch * -(-context // 16) * 16 * position
    last_step = (batch * context - 1) // 512 * 512
    ended = sum((number + 1) * context > last_step for number in range(batch))
    assert summary["peak"]["logits"] == ended * VOCABULARY_SIZE * 4
    assert (summary["context"], summary["batch"]) == (context, batch)


def test_the_total_is_its_parts(run: Run) -> None:
    """Purposes make up the engine, and with the process the peak."""
    peak = as_json(run, "alphabet.gguf")["peak"]
    parts = [peak[name] for name in ("weights", "mapped", "arena", "logits", "kv_cache")]
    assert peak["engine"] == sum(parts)
    assert peak["total"] == peak["engine"] + peak["process"]


def test_what_is_planned_is_what_a_run_measures(run: Run) -> None:
    """A run of as many positions holds what the plan says, whatever the options."""
    for options in ([], ["--kv-dtype", "float16"], ["--weight-cache", "0"], ["--token-budget", "32"]):
        peak = as_json(run, "digits.gguf", "--context", "120", *options)["peak"]
        answer = run(
            "run", "digits.gguf", "x" * 120, "--raw", "-n", "1", "--memory-report", "--json", *options
        )
        measured = json.loads(answer.stdout)["memory"]["peak"]
        for purpose in ("weights", "mapped", "arena", "logits", "kv_cache", "engine"):
            assert measured[purpose] == peak[purpose], (options, purpose)


def test_baselines_are_arithmetic(run: Run, models: Path) -> None:
    """Two bytes per weight and per key and value; at equal precision the file's bytes and the plan's KV dtype."""
    summary = as_json(run, "alphabet.gguf", "--context", "96", "--batch", "3", "--kv-dtype", "float32")
    half, equal = summary["baselines"]
    tensors = gguf.GGUFReader(models / "alphabet.gguf").tensors
    elements = 3 * 96 * LAYERS * 2 * KV_HEADS * HEAD_SIZE
    assert half["weights"] == 2 * sum(int(np.prod(tensor.shape)) for tensor in tensors)
    assert (half["kv_cache"], half["total"]) == (2 * elements, half["weights"] + 2 * elements)
    assert equal["weights"] == sum(int(tensor.n_bytes) for tensor in tensors)
    assert equal["kv_cache"] == 4 * elements
    assert "Arithmetic, not measured" in summary["baselines_basis"]


def test_the_tables_tell_the_same(run: Run) -> None:
    """Bytes by purpose, the peak's moment and the baselines are printed."""
    summary = as_json(run, "alphabet.gguf")
    output = run("plan", "alphabet.gguf").stdout
    assert output.startswith("alphabet.gguf: 1 sequence of 2,048 positions, float32 on numpy, ")
    printed = dict(re.findall(r"^(\S+(?: \S+)*)  +([\d,]+)  ", output, re.MULTILINE))
    for name, key in (("arena", "arena"), ("KV cache", "kv_cache"), ("engine", "engine"), ("peak", "total")):
        assert printed[name] == f"{summary['peak'][key]:,}"
    assert f"The peak is at {summary['peak']['moment']}." in output
    for row in ("Transformers, float16", "the same at equal precision"):
        assert re.search(rf"^{row} .* (less|more|same)$", output, re.MULTILINE)


def test_the_context_is_the_model_s_where_that_is_short(run: Run) -> None:
    """By default 2,048 positions, or what there is; more than there is is an error."""
    assert as_json(run, "short.gguf")["context"] == 64
    result = run("plan", "short.gguf", "--context", "65")
    assert (result.exit_code, result.stdout) == (7, "")
    assert "64 positions" in result.stderr


def test_a_limit_bounds_the_plan(run: Run) -> None:
    """What fits is planned within it; what does not is refused, with options that plan knows."""
    summary = as_json(run, "alphabet.gguf", "--memory", "70MB")
    assert summary["peak"]["total"] <= summary["limit"] == 70_000_000
    result = run("plan", "alphabet.gguf", "--memory", "67.4MB", "--batch", "4")
    assert (result.exit_code, result.stdout) == (11, "")
    options = re.findall(r"--[a-z-]+", result.stderr)
    assert options
    help_text = run("plan", "--help").stdout
    assert all(option in help_text for option in options)


def test_nothing_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan uploads no weight and compiles nothing."""
    monkeypatch.setattr("refengine.backend.interpreter.InterpretedBackend.upload", pytest.fail)
    monkeypatch.setattr("refengine.backend.interpreter.InterpretedBackend.create_cache", pytest.fail)
    assert run("plan", "alphabet.gguf").exit_code == 0


@pytest.mark.parametrize(("options", "code"), [
    (["--kv-dtype", "int7"], 4), (["--policy", "float7"], 4), (["--batch", "0"], 2), (["--context", "0"], 2),
    (["--backend", "abacus"], 10), (["--html", "missing/plan.html"], 1),
])  # fmt: skip
def test_what_cannot_be_planned_is_told(run: Run, options: list[str], code: int) -> None:
    """Each with its exit code, nothing on stdout."""
    result = run("plan", "alphabet.gguf", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("refengine: error: ")


def test_boxes_are_the_plan(plan: EnginePlan) -> None:
    """Each placed value is in one box at its place, each working memory is one, and no two overlap."""
    found = boxes(plan.program, plan.activations)
    placed = {(p.offset, p.nbytes, p.first, p.last) for p in plan.activations.placements.values()}
    working = {(p.offset, p.nbytes, p.first, p.last) for p in plan.activations.workspaces.values()}
    drawn = [(box.offset, box.nbytes, box.first, box.last) for box in found]
    assert sorted(drawn) == sorted([*placed, *working])
    named = re.findall(r"^%(\d+) =", "\n".join(line for box in found for line in box.about), re.MULTILINE)
    assert sorted(map(int, named)) == sorted(plan.activations.placements)
    for a, b in combinations(found, 2):
        assert (
            a.last < b.first
            or b.last < a.first
            or a.offset + a.nbytes <= b.offset
            or b.offset + b.nbytes <= a.offset
        )


def test_the_curve_is_what_lives() -> None:
    """Bytes of all boxes whose life has begun and not ended."""
    spans = [(0, 2, 5), (1, 1, 7), (2, 3, 11), (3, 4, 13)]
    found = [Box("", "ffn", 0, nbytes, first, last, ()) for first, last, nbytes in spans]
    expected = [sum(n for first, last, n in spans if first <= at <= last) for at in range(4)]
    assert living(found, 4) == expected


def test_the_curve_ends_at_the_peak_of_the_plan(plan: EnginePlan) -> None:
    """The most bytes in use are those below which no arena can be."""
    found = boxes(plan.program, plan.activations)
    assert (
        max(living(found, len(plan.program))) == plan.activations.least_bytes <= plan.activations.arena_bytes
    )


@pytest.mark.parametrize("view", [overview, whole])
def test_the_picture_is_well_formed(plan: EnginePlan, view: Callable[..., Any]) -> None:
    """Every instruction has its column, and every box lies inside the picture."""
    stretches = view(plan.program)
    columns = [at for s in stretches for at in range(s.first, s.last + 1)]
    assert columns == list(range(len(plan.program)))
    picture = ElementTree.fromstring(draw(plan.program, plan.activations, stretches))
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    drawn = [r.attrib for r in picture.iter("rect") if r.attrib["class"].startswith("box")]
    assert len(drawn) == len(boxes(plan.program, plan.activations))
    for box in drawn:
        x, y, w, h = (float(box[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_the_page_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    """One file without script or foreign address, for light and dark; its pictures are well-formed."""
    path = tmp_path / "plan.html"
    result = run("plan", "alphabet.gguf", "--html", str(path))
    assert result.stderr == f"Wrote {path}\n"
    page = path.read_text()
    assert "<script" not in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?https?:", page)
    assert "prefers-color-scheme: dark" in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) > 6
    for picture in pictures:
        ElementTree.fromstring(picture)
    summary = as_json(run, "alphabet.gguf")
    for purpose in ("weights", "arena", "kv_cache", "engine", "total"):
        assert f"{summary['peak'][purpose]:,}" in page


def test_activations_without_a_plan(plan: EnginePlan) -> None:
    """Every value kept takes all rows of all layers; one buffer per name takes those of one layer."""
    found = activations(plan.program, plan.activations)
    row = plan.activations.sizes["T"] * 4
    layer = (
        32 + (32 + 16 + 16) + 32 + 32 + 32 + 48 + 48 + 32
    )  # norm, q, k, v, attention, output, norm, gate, up, down
    rows = (32 + 32) * 4  # taken for logits, and their norm: R is 1
    named = (32 + 8 + layer) * row + rows
    assert found.named == named + found.workspace
    in_place = 32 + 16 + 32 + 48 + 32  # rope of q and k, add, gated, add
    assert found.kept == (32 + 8 + LAYERS * (layer + in_place)) * row + rows + found.workspace
    assert found.arena == plan.activations.arena_bytes < found.named < found.kept


@pytest.mark.parametrize("most", [1, 3, 7.5, 100, 1234, 9_060_352, 2.5e12])
def test_ticks_are_round_and_few(most: float) -> None:
    """From 0 up to the most, evenly, by 1, 2 or 5 times a power of ten."""
    found = ticks(most)
    assert found[0] == 0
    assert found[-1] <= most * 1.001
    assert 2 <= len(found) <= 6
    step = found[1]
    assert np.allclose(np.diff(found), step)
    assert float(f"{step:e}"[:3].rstrip(".")) in (1.0, 2.0, 5.0)
