"""The flight recorder's file, as events and as a timeline."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from refengine.cli.charts.flight import lanes
from refengine.cli.flight import FlightLog
from refengine.memory import FlightRecorder

Run = Callable[..., Result]

FULL = ("run", "digits.gguf", "Hi", "--samples", "4", "-n", "100", "--kv-tokens", "160")
"""Four samples that do not fit at once: some are pre-empted."""


def test_nothing_is_written_where_no_limit_is_hit(run: Run, tmp_path: Path) -> None:
    """The recorder is silent, and leaves no file."""
    path = tmp_path / "flight.json"
    result = run("run", "alphabet.gguf", "Hi", "--flight-recorder", str(path))
    assert (result.exit_code, result.stderr, path.exists()) == (0, "", False)


def test_events_are_written_as_json(run: Run, tmp_path: Path) -> None:
    """With a limit hit, all events are in the file, the last of them too, and stderr says where."""
    path = tmp_path / "flight.json"
    result = run(*FULL, "--flight-recorder", str(path))
    assert result.exit_code == 0
    flight = json.loads(path.read_text())
    kinds = [event["kind"] for event in flight["events"]]
    assert kinds.count("preempt") == flight["limits_hit"] > 0
    assert kinds.count("end") == 4
    assert f"hit {flight['limits_hit']} time" in result.stderr
    assert f"Wrote {len(kinds):,} events to {path}" in result.stderr


def test_a_refused_request_is_recorded(run: Run, tmp_path: Path) -> None:
    """A request that can never fit ends in an error, and the file tells."""
    path = tmp_path / "flight.json"
    result = run("run", "digits.gguf", "Hi", "-n", "100", "--kv-tokens", "64", "--flight-recorder", str(path))
    assert (result.exit_code, result.stdout) == (7, "")
    (event,) = json.loads(path.read_text())["events"]
    assert event["kind"] == "refuse"
    assert "positions" in event["reason"]


def test_the_timeline_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    """A page without script or foreign address, with one picture that is well-formed: a lane for each sequence."""
    path = tmp_path / "flight.html"
    run(*FULL, "--flight-recorder", str(path))
    page = path.read_text()
    assert "<script" not in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?https?:", page)
    picture = max(re.findall(r"<svg.*?</svg>", page, re.DOTALL), key=len)
    titles = [title.text or "" for title in ElementTree.fromstring(picture).iter("title")]
    assert sum(": end" in title for title in titles) == 4
    assert any("preempt" in title for title in titles)


def test_another_suffix_is_wrong_usage(run: Run) -> None:
    """The error names the formats, before anything is loaded."""
    result = run("run", "nowhere.gguf", "Hi", "--flight-recorder", "flight.txt")
    assert result.exit_code == 2
    assert ".json or .html" in result.stderr


def test_writes_are_a_second_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many limits in a row the first is written at once, the last at the end."""
    now = 10.0
    monkeypatch.setattr("refengine.cli.flight.monotonic", lambda: now)
    path = tmp_path / "flight.json"
    log = FlightLog(path)
    recorder = FlightRecorder(log.write)

    def written() -> int:
        return len(json.loads(path.read_text())["events"])

    recorder.limit("preempt", "full")
    recorder.limit("preempt", "full")
    assert written() == 1
    now += 1.0
    recorder.limit("preempt", "full")
    assert written() == 3
    recorder.record("end", request=0)
    log.close()
    assert written() == 4


def test_lanes_tell_waiting_from_running() -> None:
    """A sequence waits from submit or preempt to admit, and runs from there; what is open lasts to the end."""
    recorder = FlightRecorder()
    for step, kind, fields in (
        (0, "submit", {"request": 7}),
        (2, "admit", {"request": 7, "cached": 0}),
        (3, "fork", {"parent": 7, "child": 8}),
        (4, "preempt", {"request": 7}),
        (5, "commit", {"pool": 0, "segment": 3}),
        (6, "admit", {"request": 7, "cached": 16}),
        (8, "end", {"request": 7}),
    ):
        recorder.step = step
        recorder.record(kind, **fields)
    found = lanes(recorder.events, 10)
    assert list(found) == [7, 8]
    assert (found[7].waits, found[7].runs) == ([(0, 2), (4, 6)], [(2, 4), (6, 9)])
    assert (found[8].waits, found[8].runs) == ([], [(3, 10)])
    assert [kind for _, kind, _ in found[7].marks] == ["submit", "admit", "preempt", "hit", "end"]
