"""``refengine synth`` writes a file that every other command takes for a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import Result

from refengine.quantizer import ENCODINGS
from refengine.synth import SHAPES
from refengine.synth.blocks import RandomWeights
from refengine.synth.mixture import FILE_TYPES

Run = Callable[..., Result]

SMALL = ("synth", "--shape", "smollm2-135m", "--layers", "1", "--vocabulary", "400")


@pytest.fixture
def folder(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_line_tells_size_and_rate(run: Run, folder: Path) -> None:
    """On stdout, and nothing on stderr where it is no terminal."""
    result = run(*SMALL, "small.gguf")
    assert (result.exit_code, result.stderr, names(folder)) == (0, "", ["small.gguf"])
    size = (folder / "small.gguf").stat().st_size
    assert result.stdout.startswith(f"small.gguf: {size / 1e6:.1f} MB, 3.8 M weights, ")
    assert result.stdout.endswith("/s)\n")


def test_json_tells_what_was_made(run: Run, folder: Path) -> None:
    """One object with the file, its sizes by encoding, and the rate."""
    result = run(*SMALL, "small.gguf", "--encoding", "q4_1", "--seed", "5", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    made = json.loads(result.stdout)
    tensors = gguf.GGUFReader(folder / "small.gguf").tensors
    assert (made["file"], made["shape"], made["encoding"], made["seed"]) == (
        "small.gguf", "smollm2-135m", "q4_1", 5,
    )  # fmt: skip
    assert made["bytes"] == (folder / "small.gguf").stat().st_size
    assert made["weights"] == sum(int(tensor.n_elements) for tensor in tensors)
    assert {name: total["bytes"] for name, total in made["encodings"].items()} == {
        name: sum(int(t.n_bytes) for t in tensors if t.tensor_type.name.lower() == name)
        for name in ("q4_1", "q8_0", "f32")
    }
    assert made["bytes_per_second"] == pytest.approx(made["bytes"] / made["seconds"])


def test_other_commands_take_it_for_a_model(run: Run, folder: Path) -> None:
    """It can be inspected, shown, tokenized with and run."""
    run(*SMALL, "small.gguf", "--context", "100")
    metadata = json.loads(run("inspect", "small.gguf", "--metadata", "--json").stdout)["metadata"]
    assert (metadata["llama.block_count"], metadata["llama.context_length"]) == (1, 100)
    assert len(metadata["tokenizer.ggml.tokens"]) == 400
    assert json.loads(run("show", "small.gguf", "--json").stdout)["problems"] == []
    assert run("tokenize", "small.gguf", "Any text, 1 2 3: äöü").exit_code == 0
    answer = run("run", "small.gguf", "text", "--raw", "-n", "4", "--json")
    assert answer.exit_code == 0
    assert 1 <= len(json.loads(answer.stdout)["token_ids"]) <= 4


def test_a_seed_is_a_file(run: Run, folder: Path) -> None:
    """The same seed gives the same file, 0 where none is given, and another seed another file."""
    for name, seed in {"a": [], "b": ["--seed", "0"], "c": ["--seed", "1"]}.items():
        assert run(*SMALL, name, *seed).exit_code == 0
    a, b, c = ((folder / name).read_bytes() for name in "abc")
    assert a == b != c
    assert len(a) == len(c)


def test_uniform_leaves_the_mixture_out(run: Run, folder: Path) -> None:
    """One encoding in every matrix, where llama-quantize gives the output more bits."""
    mixed = json.loads(run(*SMALL, "mixed", "--json").stdout)
    uniform = json.loads(run(*SMALL, "uniform", "--uniform", "--json").stdout)
    assert set(mixed["encodings"]) == {"q4_0", "q8_0", "f32"}
    assert set(uniform["encodings"]) == {"q4_0", "f32"}


def test_help_names_every_shape_and_encoding(run: Run) -> None:
    """What can be asked for is in the help."""
    words = run("synth", "--help").stdout.split()
    assert set(SHAPES) <= set(words)
    assert set(FILE_TYPES) <= set(words)
    assert not (set(ENCODINGS) - set(FILE_TYPES)) & set(words)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--shape", "llama2-7b"], 7, "no shape 'llama2-7b'; did you mean llama-2-7b"),
        (["--shape", "nonsense"], 7, "there are llama-2-7b"),
        (["--shape", "llama-1b", "--encoding", "q4_K"], 4, "did you mean q4_k"),
        (["--shape", "llama-1b", "--encoding", "int4"], 4, "unknown encoding 'int4' (there are f32"),
        (
            ["--shape", "llama-1b", "--encoding", "int4_g32"],
            4,
            "GGUF files have no type for int4_g32; choose one of",
        ),
        (["--shape", "llama-1b", "--layers", "0"], 7, "layers must be between 1 and 4,096, but is 0"),
        (["--shape", "llama-1b", "--context", "-5"], 7, "the context must be between 1 and"),
        (["--shape", "llama-1b", "--vocabulary", "300"], 7, "the least is 354"),
        (["--shape", "llama-1b", "--vocabulary", "99999999"], 7, "the vocabulary must be between"),
        (["--shape", "llama-1b", "--seed", "-1"], 7, "the seed must be between 0 and"),
        (["--shape", "llama-1b", "--layers", "many"], 2, "'many' is not a valid integer"),
        (["--encoding", "q4_0"], 2, "missing option '--shape'"),
    ],
)
def test_bad_input_makes_no_file(run: Run, folder: Path, arguments: list[str], code: int, told: str) -> None:
    """What cannot be made is told, with what can."""
    result = run("synth", "x.gguf", *arguments)
    assert (result.exit_code, result.stdout, names(folder)) == (code, "", [])
    assert told in result.stderr


def test_a_file_is_replaced_with_force_only(run: Run, folder: Path) -> None:
    """Without it the old file stays."""
    path = folder / "x.gguf"
    path.write_text("precious")
    result = run(*SMALL, "x.gguf")
    assert (result.exit_code, path.read_text()) == (13, "precious")
    assert "--force" in result.stderr
    assert run(*SMALL, "x.gguf", "--force").exit_code == 0
    assert path.read_bytes()[:4] == b"GGUF"
    assert names(folder) == ["x.gguf"]


def test_a_missing_folder_is_told(run: Run, folder: Path) -> None:
    """And not made."""
    result = run(*SMALL, "no/x.gguf")
    assert (result.exit_code, names(folder)) == (13, [])
    assert "there is no folder no: make it first" in result.stderr


def test_room_is_asked_for_first(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that cannot hold a 13B model in float32 is told how much it takes."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    result = run("synth", "--shape", "llama-2-13b", "--encoding", "f32", "x.gguf")
    assert (result.exit_code, names(folder)) == (13, [])
    assert "takes 52,06" in result.stderr
    assert "1,000,000,000 free" in result.stderr


def test_an_interrupt_leaves_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle: exit code 130, no word, no file."""
    chunks = RandomWeights.chunks

    def interrupted(source: RandomWeights, *args: Any) -> Iterator[Any]:
        yield next(chunks(source, *args))
        assert len(names(folder)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(RandomWeights, "chunks", interrupted)
    result = run(*SMALL, "x.gguf")
    assert (result.exit_code, result.stdout, result.stderr, names(folder)) == (130, "", "", [])
