"""``refengine replay`` compares policies on loads that are generated or were recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from batch.jsonl import completion, write
from click.testing import Result
from journal_lines import sealed

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
    line["do"][0][1] += 1
    lines[at] = json.dumps(line)
    journal.write_text(sealed(lines), encoding="utf-8")
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


@pytest.fixture
def served(run: Run, tmp_path: Path) -> Path:
    """The journal of a batch, with rows of several prompts and samples, in a cache with little room."""
    path = tmp_path / "journal.jsonl"
    rows = [completion(f"t{i}", ["ab", "x" * (i + 1)], n=1 + i % 3, max_tokens=9) for i in range(6)]
    result = run(
        "batch", "alphabet.gguf", "--model-name", "m", "-i", str(write(tmp_path / "in.jsonl", *rows)), "-o",
        str(tmp_path / "out.jsonl"), "--journal", str(path), "--scheduling", "sjf:ageing=2", "--swap", "1MB",
        "--kv-tokens", "64", "--backend", "numpy", "--max-sequences", "4",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    return path


def test_the_journal_of_a_batch_comes_again(run: Run, served: Path) -> None:
    """Its decisions are the same, and its load passes under another policy."""
    told = json.loads(run("replay", str(served), "--policy", "fcfs", "--json").stdout)
    assert told["differing_lines"] == []
    assert told["decisions"] > 5
    assert told["policies"]["fcfs"]["requests"] == 12
    head = json.loads(served.read_text(encoding="utf-8").splitlines()[0])
    assert (head["policy"], head["engine"]["model"]) == ("sjf:ageing=2", "alphabet.gguf")


def test_a_request_run_alone_is_equal(run: Run, served: Path) -> None:
    """Every one of the batch; what was compared is told."""
    lines = map(json.loads, served.read_text(encoding="utf-8").splitlines())
    for number in [line["submit"] for line in lines if "submit" in line]:
        result = run("replay", str(served), "--request", str(number))
        assert (result.exit_code, result.stderr) == (0, "")
        first, second, *_ = result.stdout.splitlines()
        assert first == "equal"
        assert second.startswith(f"Compared: logits and tokens of request {number} (row 't")
        told = json.loads(run("replay", str(served), "--request", str(number), "--json").stdout)
        assert told["equal"] is True
        assert all(each["sha256"]["recorded"] == each["sha256"]["now"] for each in told["samples"])


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("sha256", "0" * 64, "request 0, sample 0: the tokens are the same, but logits differ"),
        ("tokens", [1, 2, 3], "request 0, sample 0: token 0 was 1, and is "),
    ],
)
def test_a_difference_is_a_finding(run: Run, served: Path, field: str, value: object, told: str) -> None:
    """Told with its place; the exit code is that of findings."""
    lines = [json.loads(line) for line in served.read_text(encoding="utf-8").splitlines()]
    next(line for line in lines if line.get("end") == 0)[field] = value
    served.write_text(sealed(map(json.dumps, lines)), encoding="utf-8")
    result = run("replay", str(served), "--request", "0")
    assert result.exit_code == 12
    assert result.stdout.startswith(f"different\n{told}")


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (("--request", "0", "--model", "digits.gguf"), 7, "of another model"),
        (("--request", "999"), 7, "no request 999"),
        (("--request", "-1"), 7, "no request -1"),
        (("--request", "3"), 7, "sample 1 of request 2"),
        (("--request", "0", "--policy", "sjf"), 2, "--policy"),
        (("--request", "0", "--row", "t0"), 2, "two names"),
        (("--row", "t0", "--html", "x.html"), 2, "--html"),
        (("--row", "t00"), 7, "no row 't00': there are 6; is it 't0'?"),
        (("--row", ""), 7, "no row ''"),
        (("--model", "digits.gguf"), 2, "--request"),
    ],
)
def test_a_request_that_cannot_come_again(
    run: Run, served: Path, given: tuple[str, ...], code: int, told: str
) -> None:
    """Is refused with the reason."""
    result = run("replay", str(served), *given)
    assert result.exit_code == code
    assert told in result.stderr.replace("\n", " ")


def test_a_row_is_found_by_its_custom_id(run: Run, served: Path) -> None:
    """All its parts, in their order; each of them is told, and names the row when asked for by its number."""
    numbers = []
    for i in range(6):
        told = json.loads(run("replay", str(served), "--row", f"t{i}", "--json").stdout)
        assert (told["row"], told["equal"]) == (f"t{i}", True)
        assert [each["row"] for each in told["requests"]] == [
            {"custom_id": f"t{i}", "part": 0}, {"custom_id": f"t{i}", "part": 1},
        ]  # fmt: skip
        assert all(len(each["samples"]) == 1 + i % 3 for each in told["requests"])
        numbers += [each["request"] for each in told["requests"]]
    record = [json.loads(line) for line in served.read_text(encoding="utf-8").splitlines()]
    assert sorted(numbers) == [line["submit"] for line in record if "submit" in line]
    result = run("replay", str(served), "--row", "t1")
    first, *compared, model = result.stdout.splitlines()
    assert (result.exit_code, first, model.startswith("Model alphabet.gguf")) == (0, "equal", True)
    assert ["(row 't1', part 1 of 2)" in compared[0], "(row 't1', part 2 of 2)" in compared[1]] == [
        True,
        True,
    ]


def test_a_journal_that_breaks_off_tells_what_cannot_be_compared(run: Run, served: Path) -> None:
    """Requests that had not ended, by name; where nothing is left to compare, that is an error."""
    lines = served.read_text(encoding="utf-8").splitlines(keepends=True)
    ends = [at for at, line in enumerate(lines) if line.startswith('{"end"')]
    number = json.loads(lines[ends[-1]])["end"]
    first = max(n for line in lines if (n := json.loads(line).get("submit", -1)) <= number)
    served.write_text("".join(lines[: ends[0]]) + lines[ends[0]][:-20], encoding="utf-8")
    result = run("replay", str(served), "--request", str(first))
    assert result.exit_code == 7
    assert f"Left out: line {ends[0] + 1}, which breaks off" in result.stderr
    if f'"submit":{first},' in "".join(lines[: ends[0]]):
        assert "it was still running where that breaks off" in result.stderr
    else:
        assert f"no request {first}" in result.stderr
    assert run("replay", str(served)).exit_code == 0


def test_the_recorded_policy_is_the_first_of_the_comparison(run: Run, served: Path) -> None:
    """With its parameters; the others follow."""
    told = json.loads(run("replay", str(served), "--json").stdout)
    assert list(told["policies"]) == ["sjf:ageing=2", "fcfs", "sjf", "fair"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the journal is empty"),
        (b"hello\n", "this is no journal"),
        (b"\x89PNG\r\n\x1a\n\0\0", "this is no journal"),
        (b'{"id": "batch_req_0"}\n', "this is no journal"),
        (b"{", "line 1 is not JSON"),
        (b'{"journal":1,"policy":"fcfs","parameters":{},"cache":null}\n', "is of version 1, and this"),
        (b'{"journal":2,"policy":"fcfs","parameters":{},"cache":null}\n', "its checksum is another"),
        (b'{"journal":2,"policy":"fc\xff', "line 1 is not JSON"),
    ],
)
def test_files_that_are_no_journals(run: Run, tmp_path: Path, content: bytes, told: str) -> None:
    """Empty ones, others, binary ones, those of another version, and those cut in the first line."""
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    for options in ((), ("--request", "0"), ("--damaged",)):
        result = run("replay", str(path), *options)
        assert (result.exit_code, result.stdout) == (3, "")
        assert (told in result.stderr, "file.jsonl" in result.stderr) == (True, True)


def test_a_damaged_journal_is_read_up_to_there_where_asked(run: Run, served: Path) -> None:
    """A byte that is none, a number that is another, a line that is missing or there twice."""
    whole = served.read_bytes()
    lines = whole.splitlines(keepends=True)
    middle = len(lines) // 2
    for damaged in (
        [*lines[:middle], lines[middle].replace(b'"', b"\xff", 1), *lines[middle + 1 :]],
        [*lines[:middle], lines[middle].replace(b":", b": ", 1), *lines[middle + 1 :]],
        [*lines[:middle], *lines[middle + 1 :]],
        [*lines[:middle], lines[middle - 1], *lines[middle:]],
    ):
        served.write_bytes(b"".join(damaged))
        result = run("replay", str(served))
        assert (result.exit_code, result.stdout) == (3, "")
        assert f"line {middle + 1} " in result.stderr
        assert f"; --damaged reads the {middle} before it, which are whole" in result.stderr
        result = run("replay", str(served), "--damaged", "--json")
        assert result.exit_code == 0
        assert f"Left out: what follows line {middle}, since line {middle + 1} is" in result.stderr
        assert json.loads(result.stdout)["differing_lines"] == []


def test_the_page_does_not_overwrite_the_journal(run: Run, served: Path) -> None:
    """Nor is anything drawn in its place."""
    kept = served.read_bytes()
    assert run("replay", str(served), "--html", str(served)).exit_code == 2
    assert served.read_bytes() == kept


def test_a_simulated_request_has_no_bits(run: Run, journal: Path) -> None:
    """A journal of no model names none to run."""
    result = run("replay", str(journal), "--request", "0")
    assert (result.exit_code, "simulation" in result.stderr) == (7, True)


def test_run_writes_a_journal_where_asked(run: Run, tmp_path: Path) -> None:
    """Samples with seeds of their own, and a stop string; without --journal there is no file."""
    path = tmp_path / "run.jsonl"
    given = (
        "run",
        "alphabet.gguf",
        "Hi",
        "--stop",
        "f",
        "--samples",
        "2",
        "--temp",
        "1",
        "--backend",
        "numpy",
    )
    plain = run(*given)
    assert list(tmp_path.iterdir()) == []
    assert run(*given, "--journal", str(path)).stdout == plain.stdout
    written = path.read_bytes()
    refused = run(*given, "--journal", str(path))
    assert (refused.exit_code, path.read_bytes()) == (13, written)
    assert "another name" in refused.stderr
    result = run("replay", str(path), "--request", "0")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "equal")


def test_a_batch_neither_overwrites_its_files_nor_takes_any_policy(run: Run, tmp_path: Path) -> None:
    """A journal in the place of the input, and a policy that there is not."""
    source = write(tmp_path / "in.jsonl", completion("a", "b"))
    given = ("batch", "alphabet.gguf", "-i", str(source), "-o", str(tmp_path / "out.jsonl"))
    kept = source.read_bytes()
    assert run(*given, "--journal", str(source)).exit_code == 2
    assert run(*given, "--scheduling", "longest").exit_code == 7
    assert source.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
