"""``refengine list``, ``pull``, ``verify`` and ``rm`` keep the models of the catalogue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from refengine.loader import catalogue
from refengine.loader.catalogue import CatalogueModel

Run = Callable[..., Result]


@pytest.fixture
def model(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueModel:
    """A catalogue of one model, ``alphabet``, and a cache that has it."""
    data = (models / "alphabet.gguf").read_bytes()
    template = catalogue.CATALOGUE[0]
    model = replace(
        template,
        name="alphabet",
        aliases=("abc",),
        summary="What comes next",
        file_name="alphabet.gguf",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    monkeypatch.setattr(catalogue, "CATALOGUE", (model,))
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path))
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(data)
    return model


def test_pull_prints_the_path(run: Run, model: CatalogueModel) -> None:
    """What is here already is not fetched; its path is on stdout."""
    result = run("pull", "abc")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{model.path}\n", "")


def test_list_tells_what_is_here(run: Run, model: CatalogueModel) -> None:
    """A model is here once it was verified; ``ls`` is ``list``."""
    entry = {
        "name": "alphabet",
        "aliases": ["abc"],
        "summary": "What comes next",
        "bytes": model.size,
        "licence": model.licence.name,
        "licence_url": model.licence.url,
        "cached": False,
        "path": str(model.path),
    }
    assert json.loads(run("list", "--json").stdout) == [entry]
    run("pull", "alphabet")
    assert json.loads(run("list", "--json").stdout) == [{**entry, "cached": True}]
    heading, line = run("ls").stdout.splitlines()
    assert heading.split()[:2] == ["NAME", "SIZE"]
    assert line.split()[0] == "alphabet"
    assert model.licence.name in line


def test_verify_reads_the_file_again(run: Run, model: CatalogueModel) -> None:
    """An intact file stays; one that has changed is deleted, with the exit code of IntegrityError."""
    assert run("verify", "alphabet").stdout == f"{model.path}: intact\n"
    data = bytearray(model.path.read_bytes())
    data[-1] ^= 1
    model.path.write_bytes(data)
    assert run("verify", "alphabet").exit_code == 6
    assert not model.path.exists()


def test_rm_deletes(run: Run, model: CatalogueModel) -> None:
    """Once; the second time there is nothing to delete, which is no error."""
    first, second = run("rm", "alphabet"), run("rm", "alphabet")
    assert (first.exit_code, first.stdout, second.exit_code, second.stdout) == (0, "", 0, "")
    assert first.stderr.startswith("Deleted alphabet: ")
    assert "nothing to delete" in second.stderr
    assert not model.path.exists()


@pytest.mark.parametrize(
    "command", ["pull", "verify", "rm", "show", "inspect", "tokenize", "logits", "program", "run"]
)
def test_a_mistyped_name_is_told_its_near_match(run: Run, command: str) -> None:
    """Every command that takes a model tells the same."""
    result = run(command, "smollm", *(["text"] if command in ("tokenize", "logits", "run") else []))
    assert (result.exit_code, result.stdout) == (5, "")
    assert "Did you mean smollm2" in result.stderr


@pytest.mark.parametrize("command", ["show", "inspect", "run"])
def test_offline_downloads_nothing(run: Run, model: CatalogueModel, command: str) -> None:
    """With --offline a model that is not here is a DownloadError."""
    run("rm", "alphabet")
    result = run(command, "alphabet", "--offline", *(["Hi"] if command == "run" else []))
    assert (result.exit_code, result.stdout) == (6, "")
    assert "offline mode is on" in result.stderr
