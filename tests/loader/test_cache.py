"""What lies in the cache is used where it is whole; where the cache lies; and what is done without a network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from loader.fake_catalogue import GGUF, sha256

from refengine.errors import DownloadError
from refengine.loader import cache, catalogue
from refengine.loader.catalogue import fetch, resolve

pytestmark = pytest.mark.usefixtures("index")


# Offline


@pytest.mark.parametrize(
    ("variable", "value"),
    [(None, None), ("REFENGINE_OFFLINE", "1"), ("HF_HUB_OFFLINE", "1"), ("REFENGINE_OFFLINE", "True")],
)
def test_offline_nothing_is_asked(model, server, cache_folder, monkeypatch, variable, value):
    """The text says what keeps the network off and where a file could be put."""
    if variable:
        monkeypatch.setenv(variable, value)
    with pytest.raises(DownloadError, match=re.escape(f"{variable or 'offline'}={value or True}")) as raised:
        resolve("fake", offline=variable is None)
    assert str(model.path) in str(raised.value)
    assert server.requests == []
    assert not cache_folder.exists()


@pytest.mark.parametrize("value", ["0", "", "no"])
def test_a_variable_that_is_off_is_off(model, monkeypatch, value):
    """``REFENGINE_OFFLINE=0`` is no offline mode."""
    monkeypatch.setenv("REFENGINE_OFFLINE", value)
    assert resolve("fake").read_bytes() == GGUF


def test_a_file_put_into_the_cache_by_hand_is_verified_and_used(model, server):
    """Without a record the file is hashed, once."""
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(GGUF)
    assert not catalogue.list_models()[0].cached
    assert resolve("fake", offline=True) == model.path
    assert catalogue.list_models()[0].cached
    assert server.requests == []


@pytest.mark.parametrize("wrong", [b"", GGUF[:-1], GGUF[:-1] + b"!"], ids=["empty", "short", "changed"])
def test_a_wrong_file_in_the_cache_is_replaced(model, wrong):
    """A file without a record that is not the model is fetched over."""
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(wrong)
    assert fetch(model).read_bytes() == GGUF


def test_a_recorded_file_that_lost_its_end_is_replaced(model):
    """The size is looked at each time, record or not."""
    with fetch(model).open("r+b") as file:
        file.truncate(1000)
    assert not catalogue.list_models()[0].cached
    assert fetch(model).read_bytes() == GGUF


def test_a_file_of_an_older_catalogue_is_replaced(model):
    """A record of another hash does not count, even where the sizes agree."""
    older = bytes(len(GGUF))
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(older)
    model.path.with_name("model.gguf.sha256").write_text(f"{sha256(older)}  model.gguf\n")
    assert fetch(model).read_bytes() == GGUF
    assert catalogue.list_models()[0].cached


# The cache's place


@pytest.mark.parametrize(
    ("platform", "variables", "place"),
    [
        ("linux", {"REFENGINE_CACHE": "/chosen", "XDG_CACHE_HOME": "/xdg"}, "/chosen"),
        ("linux", {"REFENGINE_CACHE": "~/chosen"}, "/home/me/chosen"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/refengine"),
        ("linux", {}, "/home/me/.cache/refengine"),
        ("darwin", {}, "/home/me/Library/Caches/refengine"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/refengine"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/refengine/cache"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the paths are written for POSIX")
def test_the_cache_lies_where_the_platform_keeps_caches(monkeypatch, platform, variables, place):
    """refengine's variable first, then XDG's, then the platform's habit."""
    for variable in ("REFENGINE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", platform)
    assert cache.cache_folder() == Path(place)


def test_without_a_home_the_cache_must_be_named(monkeypatch):
    """A user without a home folder is told which variable to set."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("REFENGINE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DownloadError, match="REFENGINE_CACHE"):
        cache.cache_folder()
