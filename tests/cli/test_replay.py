"""``refengine replay`` compares policies on loads that are generated or were recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result

from refengine.scheduler import Limits
from refengine.simulation import HeavyTails, Journal, generate, simulate, small_layout

Run = Callable[..., Result]

LOAD = generate(HeavyTails(rate=4, tenants=2), 60, seed=1)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """What a simulation with places for four wrote down."""
    path = tmp_path / "trace.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        simulate(LOAD, limits=Limits(64, 4), journal=Journal(stream, layout=small_layout()))
    return path


def test_a_generated_load_is_compared_in_a_table(run: Run) -> None:
    """A row for each policy, the first being what the others are measured by."""
    result = run("replay", "--requests", "50", "--rate", "20")
    assert (result.exit_code, result.stderr) == (0, "")
    head, *rows = result.stdout.splitlines()
    assert head.startswith("POLICY   MEAN WAIT")
    assert [row.split()[0] for row in rows] == ["fcfs", "sjf", "fair"]
    assert "%" not in rows[0]
    assert "%" in rows[1]


def test_a_recorded_load_comes_again_with_its_limits(run: Run, journal: Path) -> None:
    """The policy under which it was recorded gives the figures that it had, and the same decisions."""
    result = run("replay", str(journal), "--policy", "fcfs", "--policy", "sjf:ageing=1,chunk=2", "--json")
    told = json.loads(result.stdout)
    assert told["policies"]["fcfs"] == dict(simulate(LOAD, limits=Limits(64, 4)).figures)
    assert told["differing_lines"] == []
    assert list(told["policies"]) == ["fcfs", "sjf:ageing=1,chunk=2"]
    wider = json.loads(run("replay", str(journal), "--max-sequences", "16", "--json").stdout)
    assert wider["policies"]["fcfs"]["wait_mean"] < told["policies"]["fcfs"]["wait_mean"]


def test_a_decision_that_would_be_another_is_told(run: Run, journal: Path) -> None:
    """With the line: somebody took a token away."""
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(n for n, text in enumerate(lines) if '"do":[[' in text)
    line = json.loads(lines[at])
    line["do"][0][1] -= 1
    lines[at] = json.dumps(line) + "\n"
    journal.write_text("".join(lines), encoding="utf-8")
    result = run("replay", str(journal))
    assert result.stderr.endswith(f"1 differ, the first in line {at + 1}\n")


def test_the_chart_has_a_curve_for_each_policy(run: Run, tmp_path: Path) -> None:
    """The page is well-formed and needs nothing else."""
    page = tmp_path / "waits.html"
    result = run("replay", "--requests", "40", "--rate", "30", "--policy", "sjf", "--html", str(page))
    assert result.exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "http" not in text
    svg = ElementTree.fromstring(text[text.rindex("<svg") : text.rindex("</svg>") + 6])
    assert len([path for path in svg.iter("path") if "curve" in path.get("class", "")]) == 1


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (("--policy", "longest"), 7, "choose one of fcfs, sjf, priority, fair"),
        (("--policy", "sjf:ageing=much"), 7, "whole numbers by name"),
        (("--policy", "sjf:colour=1"), 7, "colour"),
        (("--rate", "0"), 7, "rate"),
        (("--rate", "nan"), 7, "rate"),
        (("--requests", "0"), 2, "--requests"),
        (("--kv-tokens", "16"), 7, "no room"),
        (("--tenants", "0"), 7, "tenants"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, given: tuple[str, ...], code: int, told: str) -> None:
    """With what to do instead."""
    result = run("replay", "--requests", "30", *given)
    assert result.exit_code == code
    assert told in result.stderr.replace("\n", " ")


def test_what_is_no_journal_is_refused(run: Run, tmp_path: Path) -> None:
    """With the file and the line; and one without requests, since nothing could come again."""
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    assert (run("replay", str(path)).exit_code, run("replay", str(tmp_path / "none")).exit_code) == (3, 2)
    with path.open("w") as stream:
        Journal(stream)
    assert run("replay", str(path)).exit_code == 7
