"""A folder of tiny models, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli.alphabet_model import write_model
from click.testing import CliRunner, Result

from refengine.cli.commands import refengine


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: ``alphabet``, ``digits`` (endless), ``base`` (no template, a BOS), ``short``, ``alien``."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "alphabet.gguf")
    write_model(folder / "digits.gguf", answer="digits", context=100_000)
    write_model(folder / "base.gguf", template=None, add_bos=True)
    write_model(folder / "short.gguf", answer="digits", context=64)
    write_model(folder / "alien.gguf", architecture="alien")
    return folder


@pytest.fixture
def run(models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in the folder of the models: ``run("show", "alphabet.gguf", stdin=…)``."""
    monkeypatch.chdir(models)
    monkeypatch.delenv("REFENGINE_TRACEBACK", raising=False)

    def run(*args: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(refengine, args, input=stdin)

    return run
