"""Names become files: what the catalogue has, what a name means, and what becomes of cached models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from loader.fake_catalogue import GGUF, files_in

from refengine.errors import IntegrityError, ModelNotFoundError
from refengine.loader import catalogue
from refengine.loader.catalogue import CATALOGUE, fetch, resolve

pytestmark = pytest.mark.usefixtures("index")


# The entries


def test_the_entries_are_well_formed():
    """Names are unique, hashes are SHA-256, and a wheel belongs to its project at one version."""
    names = [name for model in CATALOGUE for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    for model in CATALOGUE:
        assert re.fullmatch(r"[a-z0-9-]+", model.name)
        assert model.file_name.endswith(".gguf")
        assert model.licence.url.startswith("https://")
        assert model.licence.name
        assert model.licence.notice
        for entry in (model, *model.wheels):
            assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
            assert entry.size > 0
        for wheel in model.wheels:
            distribution, version, *tags = wheel.file_name.split("-")
            assert distribution.replace("_", "-") == wheel.project
            assert version
            assert tags == ["py3", "none", "any.whl"]


def test_the_gguf_files_are_the_known_ones():
    """The pinned files are those that the models' packages publish hashes of."""
    assert {model.name: (model.size, model.sha256) for model in CATALOGUE} == {
        "smollm2": (98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        "gemma3-270m": (253113024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    }


# What a name means


def test_a_path_is_itself(tmp_path, monkeypatch):
    """An existing file is returned as given, as a string, a path, or from the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert resolve("a.gguf") == Path("a.gguf")
    assert resolve(Path("a.gguf")) == Path("a.gguf")
    assert resolve("~/a.gguf") == tmp_path / "a.gguf"


def test_a_file_goes_before_a_name_of_the_catalogue(model, tmp_path, monkeypatch):
    """A file called like a model is that file; a folder called like a model is not in the way."""
    monkeypatch.chdir(tmp_path)
    Path("fake").mkdir()
    assert resolve("fake") == model.path
    Path("fake").rmdir()
    Path("fake").touch()
    assert resolve("fake") == Path("fake")


@pytest.mark.parametrize("name", ["fake", "FAKE", "fake-alias"])
def test_a_name_or_alias_in_any_case_is_the_model(model, name):
    """All of a model's names lead to its one file."""
    assert resolve(name) == model.path
    assert model.path.read_bytes() == GGUF


@pytest.mark.parametrize(
    "name", ["missing.gguf", "./missing", "a/b/missing", "owner/missing.gguf", "/missing"]
)
def test_a_missing_file_is_called_missing(name):
    """What looks like a path is not looked for elsewhere."""
    with pytest.raises(ModelNotFoundError, match=rf"there is no file {re.escape(str(Path(name)))}\."):
        resolve(name)


def test_a_mistyped_file_has_near_matches(tmp_path):
    """The GGUF files beside a missing one are suggested."""
    (tmp_path / "SmolLM2-135M.gguf").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFoundError, match=r"Did you mean SmolLM2-135M\.gguf\?"):
        resolve(tmp_path / "SmolLM2-135.gguf")


def test_a_folder_lists_its_files(tmp_path):
    """A folder is no model file; the text names those in it."""
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"is a folder.*a\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(("name", "near"), [("smolm2", "smollm2"), ("gemma-270m", "gemma3-270m")])
def test_an_unknown_name_lists_near_ones_and_all(name, near):
    """The text suggests, lists the catalogue, and shows the forms of a hub id."""
    with pytest.raises(ModelNotFoundError, match=rf"Did you mean [^?]*{near}") as raised:
        resolve(name)
    for expected in ("smollm2, gemma3-270m", "owner/repo:Q8_0"):
        assert expected in str(raised.value)


@pytest.mark.parametrize("name", ["", " ", "\0", "~", "a b"])
def test_odd_names_are_not_found(name, monkeypatch):
    """No text at all makes anything but a ModelNotFoundError."""
    with pytest.raises(ModelNotFoundError):
        resolve(name)


# Listing, verifying, removing


def test_the_list_tells_what_is_cached(model):
    """Every entry is listed with its place, before and after it is fetched."""
    assert catalogue.list_models() == (catalogue.Listing(model, model.path, cached=False),)
    fetch(model)
    assert catalogue.list_models() == (catalogue.Listing(model, model.path, cached=True),)


def test_verifying_finds_a_changed_byte(model, cache_folder):
    """An intact file passes; a changed one of the same size is deleted, and fetched again next time."""
    fetch(model)
    assert catalogue.verify("fake-alias") == model.path
    changed = bytearray(GGUF)
    changed[-1] ^= 1
    model.path.write_bytes(changed)
    with pytest.raises(IntegrityError, match="deleted"):
        catalogue.verify("fake")
    assert files_in(cache_folder) == set()
    assert fetch(model).read_bytes() == GGUF


def test_verifying_needs_a_file(model):
    """There is nothing to verify in an empty cache, or under an unknown name."""
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        catalogue.verify("fake")
    with pytest.raises(ModelNotFoundError, match="Did you mean fake"):
        catalogue.verify("fakes")


def test_removing_frees_the_bytes(model, cache_folder):
    """The file and its record go; a second removal finds nothing."""
    fetch(model)
    assert catalogue.remove("fake") >= len(GGUF)
    assert files_in(cache_folder) == set()
    assert catalogue.remove("fake") == 0
