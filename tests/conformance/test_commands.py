"""The ways to run the suite: ``refengine conform``, ``refengine spec``, the three reports and the pytest plugin."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import refengine
from conformance import suspects
from refengine.cli.commands import refengine as command
from refengine.program import POLICIES
from refengine.specification import clauses
from refengine_conformance import Subject, conform
from refengine_conformance.bounds import BoundExceeded, check_bound
from refengine_conformance.registry import all_properties
from refengine_conformance.self_test import faults

NORM = next(item for item in all_properties() if item.parts == {"rms_norm"})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


@dataclass(frozen=True)
class Suspect:
    """Stands in for ``BackendSubject``: whatever backend is named, a suspect is made."""

    make: Callable[[], Subject]

    def __call__(self) -> Subject:
        return self.make()


@pytest.fixture
def suspect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Subject]], None]:
    """Makes the suite test a suspect instead of the backend that is named."""
    return lambda make: monkeypatch.setattr(conform, "BackendSubject", lambda *_: Suspect(make))


def test_a_conforming_backend_exits_with_0(tmp_path: Path) -> None:
    """A clause that holds: verdict on stdout, both files written."""
    json_file, html_file = tmp_path / "r.json", tmp_path / "r.html"
    result = run("conform", "--clause", NORM.clause, "--json", str(json_file), "--html", str(html_file))
    assert result.exit_code == 0, result.output
    assert "numpy reaches L1 on the clauses chosen" in result.stdout
    report = json.loads(json_file.read_text())
    assert report["policies"] == ["float32", "float64"]
    assert {r["outcome"] for r in report["results"]} == {"passed"}
    assert report["levels"]["L1"]["reached"]
    assert not report["levels"]["L2"]["reached"]  # no check of it was chosen
    assert {row["standing"] for row in report["support"]} == {"native"}
    assert html_file.read_text().startswith("<!doctype html>")


def test_a_finding_exits_with_12(suspect: Callable[[Callable[[], Subject]], None], tmp_path: Path) -> None:
    """A broken clause is told with its text, the example and the command that shows it again."""
    suspect(suspects.doubling)
    page = tmp_path / "r.html"
    result = run("conform", "--clause", NORM.clause, "--policy", "float32", "--html", str(page))
    assert result.exit_code == 12, result.output
    for told in (clauses()[NORM.clause].title, NORM.name, "broken", "Draw 1", "numpy breaks 1 clause"):
        assert told in result.stdout
    assert f"refengine conform --backend numpy --clause {NORM.clause} --policy float32" in result.stdout
    assert "Draw 1" in page.read_text()


def test_json_on_stdout_is_all_there_is() -> None:
    """``--json -`` leaves stdout to the report."""
    result = run("conform", "--clause", NORM.clause, "--policy", "float32", "--json", "-")
    assert json.loads(result.stdout)["backend"]["name"] == "numpy"


def test_a_backend_that_lacks_everything_was_not_tested(
    suspect: Callable[[Callable[[], Subject]], None],
) -> None:
    """Nothing ran, so nothing passed: that is an error that says how to go on."""
    suspect(suspects.lacking)
    result = run("conform", "--clause", NORM.clause)
    assert result.exit_code == 4
    assert "--fallback" in result.stderr
    assert "lacking has no rms_norm of its own" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["conform", "--clause", "XYZ-1"], 7, "no property is of clause 'XYZ-1'"),
        (["conform", "--policy", "float7", "--clause", NORM.clause], 4, "unknown precision policy 'float7'"),
        (["conform", "--backend", "nump", "--clause", NORM.clause], 10, "perhaps 'numpy'"),
        (["conform", "--html", "/nowhere/at/all.html"], 2, "there is no folder"),
        (["spec", "show", "XYZ-1"], 7, "there is no clause 'XYZ-1'"),
    ],
)
def test_what_cannot_be_run_is_told_at_once(arguments: list[str], code: int, told: str) -> None:
    """A mistyped name or path costs no waiting."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert told in result.stderr


@pytest.mark.parametrize("arguments", [("conform",), ("run",)])
def test_the_help_names_every_policy(arguments: tuple[str, ...]) -> None:
    """Nobody has to guess what may be asked for."""
    words = re.findall(r"\w+", run(*arguments, "--help").stdout)
    assert set(POLICIES) <= set(words)


def test_without_hypothesis_the_error_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that is missing is named in a command."""
    monkeypatch.setattr(
        "refengine.cli.suite.find_spec", lambda name: None if name == "hypothesis" else object()
    )
    result = run("conform")
    assert result.exit_code == 4
    assert "pip install 'refengine[conformance]'" in result.stderr


def test_the_self_test_prints_a_kill_table() -> None:
    """Each fault with the property that caught it; the exit code is 0 where all are."""
    id = faults()[0].clause
    result = run("conform", "--self-test", "--clause", id)
    assert result.exit_code == 0, result.output
    assert f"{id}:" in result.stdout
    assert re.search(r"(\d+) of \1 faults killed", result.stdout)


def test_spec_show_list_and_coverage() -> None:
    """The specification can be read clause by clause."""
    clause = clauses()[NORM.clause]
    shown = run("spec", "show", NORM.clause.lower()).stdout
    assert all(
        part in shown for part in (clause.title, clause.result, clause.source, clause.text, clause.example)
    )
    listed = run("spec", "list").stdout
    assert all(id in listed for id in clauses())
    assert re.search(rf"^{NORM.clause} +{NORM.name}$", run("spec", "coverage").stdout, re.MULTILINE)


class References(HTMLParser):
    """Collects what a page points to, and the ids it has."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src"):
                self.links.add(value or "")
            elif name == "id":
                self.ids.add(value or "")


def test_the_page_stands_alone(suspect: Callable[[Callable[[], Subject]], None], tmp_path: Path) -> None:
    """It loads nothing, its links lead within it, and what a backend says is shown, not obeyed."""
    suspect(suspects.injecting)
    page = tmp_path / "r.html"
    run("conform", "--clause", NORM.clause, "--html", str(page))
    text, references = page.read_text(), References()
    references.feed(text)
    assert references.links <= {f"#{id}" for id in references.ids}
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_cli_imports_the_suite_only_when_asked() -> None:
    """No module of the command line imports the suite at its top."""
    for path in (Path(refengine.__file__).parent / "cli").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not (
                isinstance(node, ast.ImportFrom) and "refengine_conformance" in (node.module or "")
            ), path


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_the_plugin_is_inert(tmp_path: Path) -> None:
    """Whose tests never asked for it pay nothing: not even NumPy is imported."""
    heavy = "{'numpy', 'hypothesis', 'refengine.backend', 'refengine_conformance.registry'}"
    (tmp_path / "test_it.py").write_text(
        f"import sys\ndef test_it(pytestconfig):\n"
        f"    assert pytestconfig.pluginmanager.has_plugin('refengine_conformance')\n"
        f"    assert not {heavy} & set(sys.modules)\n"
    )
    result = pytest_in(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_plugin_runs_one_test_per_property(tmp_path: Path) -> None:
    """A test's id is the property's; without a backend's name all are skipped, with a wrong one none is tried."""
    suite = ["--pyargs", "refengine_conformance", "-k", NORM.name, "-v", "-rs"]
    passed = pytest_in(tmp_path, *suite, "--refengine-backend", "numpy")
    assert f"[{NORM.id}] PASSED" in passed.stdout, passed.stdout + passed.stderr
    assert "no backend is named" in pytest_in(tmp_path, *suite).stdout
    unknown = pytest_in(tmp_path, *suite, "--refengine-backend", "nump")
    assert unknown.returncode == 10
    assert "perhaps 'numpy'" in unknown.stdout + unknown.stderr


@given(error=st.floats(0, 10), bound=st.floats(1e-3, 10), at=st.integers(0, 5))
def test_a_bound_is_met_or_exceeded(error: float, bound: float, at: int) -> None:
    """An element further away than its bound is told, as a fraction of it."""
    expected, result = np.zeros((2, 3)), np.zeros((2, 3))
    result.flat[at] = error
    if error <= bound:
        check_bound(result, expected, bound)
    else:
        with pytest.raises(BoundExceeded) as exceeded:
            check_bound(result, expected, bound)
        assert exceeded.value.worst == error / bound


def test_bounds_and_what_is_not_finite() -> None:
    """NaN and infinity are met by themselves only; a zero bound allows no error; shapes must agree."""
    special = [np.nan, np.inf, -np.inf]
    check_bound(special, special, 0)
    check_bound([], [], 0)
    for result, expected, bound in (
        ([np.nan], [0], 1),
        ([0], [np.nan], 1),
        ([np.inf], [1], np.inf),
        ([1], [2], 0),
    ):
        with pytest.raises(BoundExceeded) as exceeded:
            check_bound(result, expected, bound)
        assert exceeded.value.worst == np.inf
    with pytest.raises(AssertionError, match="shape"):
        check_bound([[0.0]], [0.0], 1)
