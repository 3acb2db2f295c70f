"""``show``, ``inspect``, ``tokenize``, ``logits``, ``program`` and ``backends`` tell what is so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import pytest
from cli.alphabet_model import BEGIN, END, TEMPLATE, TURN, VOCABULARY_SIZE
from click.testing import Result

from refengine import EngineConfig, SamplingParams
from refengine.backend import BackendInfo, BackendStatus
from refengine.cli.commands import refengine

Run = Callable[..., Result]


def as_json(run: Run, *args: str, **kwargs: Any) -> Any:
    result = run(*args, "--json", **kwargs)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_inspect_lists_every_tensor(run: Run, models: Path) -> None:
    """Names, shapes, encodings and bytes are those that gguf reads, in the file's order."""
    reader = gguf.GGUFReader(models / "alphabet.gguf")
    expected = [
        {
            "name": tensor.name,
            "shape": tensor.shape[::-1].tolist(),
            "encoding": tensor.tensor_type.name.lower(),
            "bytes": int(tensor.n_bytes),
        }
        for tensor in reader.tensors
    ]
    contents = as_json(run, "inspect", "alphabet.gguf")
    assert contents["tensors"] == expected
    assert contents["file_bytes"] == (models / "alphabet.gguf").stat().st_size
    for name, total in contents["encodings"].items():
        of_it = [tensor for tensor in expected if tensor["encoding"] == name]
        assert total["tensors"] == len(of_it)
        assert total["bytes"] == sum(tensor["bytes"] for tensor in of_it)
        assert total["weights"] == sum(int(np.prod(tensor["shape"])) for tensor in of_it)


def test_inspect_prints_a_line_for_each_tensor(run: Run, models: Path) -> None:
    """A pipe gets one line per tensor, however long, and then the totals."""
    lines = run("inspect", "alphabet.gguf").stdout.splitlines()
    tensors = gguf.GGUFReader(models / "alphabet.gguf").tensors
    assert [line.split()[0] for line in lines[1 : len(tensors) + 1]] == [tensor.name for tensor in tensors]
    assert lines[-1].split()[:2] == ["all", str(len(tensors))]


def test_inspect_prints_the_metadata(run: Run, models: Path) -> None:
    """Every key of the file with its value: whole in JSON, cut in the table."""
    fields = gguf.GGUFReader(models / "alphabet.gguf").fields
    expected = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert as_json(run, "inspect", "alphabet.gguf", "--metadata")["metadata"] == expected
    table = run("inspect", "alphabet.gguf", "--metadata").stdout.splitlines()
    assert [line.split()[0] for line in table[1:]] == list(expected)
    assert re.search(r"tokenizer\.ggml\.tokens +str \[260\] +'Ā', .*…$", "\n".join(table), re.MULTILINE)


def test_show_tells_the_shape(run: Run) -> None:
    """The JSON holds the model's spec, tokenizer and template; the table says it in words."""
    card = as_json(run, "show", "alphabet.gguf")
    assert (card["name"], card["architecture"], card["problems"]) == ("Alphabet [a-z]", "llama", [])
    assert (card["chat_template"], card["spec"]["context_length"]) == (TEMPLATE, 4096)
    assert card["tokenizer"]["vocabulary_size"] == card["spec"]["vocabulary_size"] == VOCABULARY_SIZE
    assert card["tokenizer"]["end_ids"] == [BEGIN, END]
    table = dict(
        re.split(r"\s{2,}", line)[:2]
        for line in run("show", "alphabet.gguf").stdout.splitlines()
        if "  " in line
    )
    assert table["name"] == "Alphabet [a-z]"
    assert (table["context"], table["layers"], table["runs here"]) == ("4,096 tokens", "2, 32 wide", "yes")
    assert table["attention"] == "4 heads, 2 of keys and values, each 8 wide"
    assert table["ends at"] == "<|endoftext|> <|im_end|>"


def test_show_describes_what_does_not_run_here(run: Run) -> None:
    """A model of an unknown architecture is shown, and why it does not run."""
    result = run("show", "alien.gguf")
    assert result.exit_code == 0
    assert re.search("runs here +no: architecture 'alien' is not supported", result.stdout)
    assert as_json(run, "show", "alien.gguf")["spec"] is None
    assert as_json(run, "inspect", "alien.gguf")["tensors"]


def test_tokenize_prints_ids_and_tokens(run: Run) -> None:
    """A row for each token; a token that is not whole characters is shown as bytes."""
    rows = [line.split(maxsplit=1) for line in run("tokenize", "alphabet.gguf", "a\né").stdout.splitlines()]
    assert rows[1:] == [["97", "'a'"], ["10", r"'\n'"], ["195", r"b'\xc3'"], ["169", r"b'\xa9'"]]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((), [BEGIN, *b"<|im_start|>"]),
        (("--special",), [BEGIN, TURN]),
        (("--no-bos",), [*b"<|im_start|>"]),
        (("--special", "--no-bos"), [TURN]),
    ],
)
def test_tokenize_options(run: Run, options: tuple[str, ...], ids: list[int]) -> None:
    """--special reads control tokens, --no-bos leaves out what the tokenizer adds."""
    assert as_json(run, "tokenize", "base.gguf", "<|im_start|>", *options)["ids"] == ids


@pytest.mark.parametrize("ids", ["104 105 10", "104,105, 10", "[104, 105, 10]"])
def test_tokenize_turns_ids_into_text(run: Run, ids: str) -> None:
    """--ids is the way back; a pipe gets the text and nothing more."""
    assert run("tokenize", "alphabet.gguf", "--ids", ids).stdout == "hi\n"
    assert as_json(run, "tokenize", "alphabet.gguf", "--ids", ids)["text"] == "hi\n"


@pytest.mark.parametrize("ids", ["104 x", "-1", "260", "9" * 5000])
def test_tokenize_refuses_what_is_no_id(run: Run, ids: str) -> None:
    """Words, and numbers outside the vocabulary, are wrong requests."""
    assert run("tokenize", "alphabet.gguf", "--ids", "--", ids).exit_code == 7


def test_texts_can_be_piped_in(run: Run) -> None:
    """tokenize and logits read stdin where there is no argument."""
    assert as_json(run, "tokenize", "alphabet.gguf", stdin="hi\n")["ids"] == [*b"hi"]
    assert as_json(run, "logits", "alphabet.gguf", stdin="hi\n")["prompt_token_ids"] == [*b"hi"]
    for command in ("tokenize", "logits"):
        assert run(command, "alphabet.gguf").exit_code == 2


def test_logits_tell_what_comes_next(run: Run) -> None:
    """The likeliest token after the last, or with --all after each."""
    last = as_json(run, "logits", "alphabet.gguf", "abz", "--top", "3")["positions"]
    assert [(p["position"], p["id"], len(p["likeliest"])) for p in last] == [(2, ord("z"), 3)]
    every = as_json(run, "logits", "alphabet.gguf", "abz", "--all", "--top", "1")["positions"]
    assert "".join(p["likeliest"][0]["text"] for p in every) == "bc."
    table = run("logits", "alphabet.gguf", "abz", "--top", "1").stdout.splitlines()
    assert table[1].split()[:2] == ["'.'", str(ord("."))]
    table = run("logits", "alphabet.gguf", "abz", "--all", "--top", "1").stdout.splitlines()
    assert [line.split()[1:3] for line in table[1:]] == [["'a'", "'b'"], ["'b'", "'c'"], ["'z'", "'.'"]]


@pytest.mark.parametrize("policy", ["float32", "float64"])
def test_logits_go_to_a_numpy_file(run: Run, tmp_path: Path, policy: str) -> None:
    """The file has the logits of every position in the policy's precision, and JSON agrees with it."""
    path = tmp_path / "logits"
    result = run(
        "logits", "alphabet.gguf", "--ids", "97 98", "--policy", policy, "--all", "--json", "-o", str(path)
    )
    scores = np.load(path)
    assert (scores.dtype.name, scores.shape) == (policy, (2, VOCABULARY_SIZE))
    assert result.stderr == f"Wrote {path}: {policy} [2, {VOCABULARY_SIZE}]\n"
    for row, position in zip(scores, json.loads(result.stdout)["positions"], strict=True):
        order = np.argsort(-row, kind="stable")[:10]
        assert [c["id"] for c in position["likeliest"]] == order.tolist()
        assert [c["logit"] for c in position["likeliest"]] == row[order].tolist()


def test_the_file_has_every_position_whatever_is_printed(run: Run, tmp_path: Path) -> None:
    """Without --all, the file is the same, and what is printed is its last row."""
    path = tmp_path / "logits.npy"
    result = run("logits", "alphabet.gguf", "ab", "--json", "-o", str(path))
    scores = np.load(path)
    (position,) = json.loads(result.stdout)["positions"]
    assert (len(scores), position["position"]) == (2, 1)
    assert position["likeliest"][0]["logit"] == scores[1].max()


def test_a_file_that_cannot_be_written_is_an_error(run: Run, tmp_path: Path) -> None:
    """It is named."""
    path = tmp_path / "missing" / "logits.npy"
    result = run("logits", "alphabet.gguf", "hi", "-o", str(path))
    assert result.exit_code == 1
    assert str(path) in result.stderr


def test_program_prints_instructions_and_counts(run: Run) -> None:
    """Each op is counted as often as it is printed."""
    listing, counts = run("program", "alphabet.gguf").stdout.split("\n\n")
    ops = re.findall(r"^%\d+\[.*?\] = (\w+)\(", listing, re.MULTILINE)
    rows = [line.split() for line in counts.splitlines()[1:]]
    assert rows == [[op, str(ops.count(op))] for op, _ in rows[:-1]] + [["all", str(len(ops))]]
    assert listing.splitlines()[-1].startswith("return %")


def test_program_plans_the_arena(run: Run) -> None:
    """With --plan values and working memory have their places: T rows of float32 are as long, and all fill the arena."""
    output = run("program", "alphabet.gguf", "--plan", "64").stdout
    arena = re.search(r"^arena: ([\d,]+) bytes", output, re.MULTILINE)
    assert arena
    places = re.findall(r"^ *([\d,]+) \+([\d,]+)  %\d+\[T, ([\d, ]+)\] =", output, re.MULTILINE)
    assert len(places) > 20
    ends = []
    for offset, length, row in places:
        assert integer(length) == 64 * np.prod([int(size) for size in row.split(", ")]) * 4
        ends.append(integer(offset) + integer(length))
    working = re.findall(r"  with ([\d,]+) bytes at ([\d,]+)$", output, re.MULTILINE)
    assert working
    ends += [integer(offset) + integer(length) for length, offset in working]
    assert max(ends) == integer(arena[1])


def integer(text: str) -> int:
    return int(text.replace(",", ""))


def test_backends_tell_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot be used is listed with the reason and the command that mends it."""
    good = BackendInfo("computes", "pip install good", lambda: None, 0)
    bad = BackendInfo("would compute", "pip install 'refengine[bad]'", lambda: "bad is missing", 1)
    statuses = (
        BackendStatus("good", good, None),
        BackendStatus("bad", bad, "bad is missing"),
        BackendStatus("odd", None, "its description failed to load"),
    )
    monkeypatch.setattr("refengine.backend.registered", lambda: statuses)
    output = run("backends").stdout
    assert re.search("good +yes +computes", output)
    assert "bad: bad is missing\n  to mend it: pip install 'refengine[bad]'\n" in output
    assert "odd: its description failed to load\n" in output
    assert as_json(run, "backends") == [
        {"name": "good", "usable": True, "description": "computes", "problem": None, "install": "pip install good"},
        {"name": "bad", "usable": False, "description": "would compute", "problem": "bad is missing",
         "install": "pip install 'refengine[bad]'"},
        {"name": "odd", "usable": False, "description": None, "problem": "its description failed to load",
         "install": None},
    ]  # fmt: skip


def test_a_mistyped_command_is_told_its_near_match(run: Run) -> None:
    """And without a command the help is wrong usage, on stderr."""
    result = run("rnu", "alphabet.gguf")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean 'run'?" in result.stderr
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Talk to a model:" in result.stderr


def test_the_defaults_are_the_library_s() -> None:
    """What is not said on the command line is what the Python API does."""
    command = refengine.get_command(click.Context(refengine), "run")
    assert command is not None
    defaults = command.make_context("run", ["a model"]).params
    for name, field in SamplingParams.__dataclass_fields__.items():
        assert defaults[name] == field.default, name
    for name in ("policy", "kv_tokens"):
        assert defaults[name] == getattr(EngineConfig(), name)
