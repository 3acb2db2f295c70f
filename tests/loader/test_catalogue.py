"""Names become verified files, and the cache holds nothing else, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import refengine
from refengine.errors import DownloadError, IntegrityError, ModelNotFoundError
from refengine.loader import cache, catalogue
from refengine.loader.catalogue import CATALOGUE, CatalogueModel, Licence, Wheel, fetch, resolve

GGUF = b"GGUF" + random.Random(2).randbytes(400_000)
LICENCE = Licence("Fake-1.0", "https://licence.invalid", "Be kind.")


def pack(members: dict[str, bytes]) -> bytes:
    """Make a wheel, compressed as those of the real catalogue are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def publish(server, answer, number: int, part: bytes, *answers) -> Wheel:
    """Serve a wheel that holds ``part``, and the page of its project."""
    project, file_name = f"fake-part{number}", f"fake_part{number}-1.0-py3-none-any.whl"
    member = f"fake_part{number}/model.gguf.part{number}"
    content = pack({f"fake_part{number}/__init__.py": b"", member: part})
    page = {"files": [{"filename": file_name, "url": f"/files/{file_name}"}]}
    json_type = {"Content-Type": "application/vnd.pypi.simple.v1+json"}
    server.answer(f"/simple/{project}/", answer(json.dumps(page).encode(), headers=json_type))
    server.answer(f"/files/{file_name}", *(answers or [answer(content)]))
    return Wheel(project, file_name, len(content), sha256(content), member)


def describe(*wheels: Wheel, size: int = len(GGUF), digest: str = sha256(GGUF)) -> CatalogueModel:
    return CatalogueModel("fake", ("fake-alias",), "a fake", "model.gguf", size, digest, LICENCE, wheels)


@pytest.fixture(autouse=True)
def index(server, cache_folder, monkeypatch):
    monkeypatch.setenv("REFENGINE_INDEX_URL", f"{server.url}/simple")


@pytest.fixture
def model(server, answer, monkeypatch) -> CatalogueModel:
    """The only model of the catalogue, served as one wheel."""
    model = describe(publish(server, answer, 1, GGUF))
    monkeypatch.setattr(catalogue, "CATALOGUE", (model,))
    return model


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


# Fetching


def test_parts_are_joined_in_order(server, answer, cache_folder):
    """A model in three wheels is their parts joined; the cache keeps it and its record, nothing else."""
    parts = [GGUF[:1000], GGUF[1000:300_000], GGUF[300_000:]]
    model = describe(*(publish(server, answer, number, part) for number, part in enumerate(parts)))
    path = fetch(model)
    assert path == cache_folder / "models" / "fake" / "model.gguf"
    assert path.read_bytes() == GGUF
    assert {p.name for p in cache_folder.iterdir()} == {"models"}
    assert files_in(cache_folder) == {"models/fake/model.gguf", "models/fake/model.gguf.sha256"}


def test_the_disk_never_holds_more_than_the_stated_peak(server, answer, cache_folder, progress):
    """The model and one wheel at a time: what ``peak_bytes`` says is what the cache needs."""
    parts = [GGUF[start : start + 100_001] for start in range(0, len(GGUF), 100_001)]
    model = describe(*(publish(server, answer, number, part) for number, part in enumerate(parts)))
    held = []

    def measure(n_bytes):
        held.append(sum(path.stat().st_size for path in cache_folder.rglob("*") if path.is_file()))

    progress.advance = measure
    fetch(model, progress=progress)
    assert max(held) <= model.peak_bytes


def test_progress_is_told_in_order(model, progress):
    """The licence first, then one transfer of all wheels' bytes."""
    fetch(model, progress=progress)
    assert re.fullmatch("(notice )+start (advance )+finish ", " ".join([*progress.calls, ""]))
    assert progress.total_bytes == sum(progress.advances) == model.wheels[0].size
    (notice,) = progress.notices
    for expected in ("Fake-1.0", "https://licence.invalid", "Be kind."):
        assert expected in notice


def test_a_cached_model_needs_no_network(model, server, progress):
    """The second time nothing is asked and nothing is said, offline as well."""
    fetch(model)
    asked = len(server.requests)
    assert fetch(model, progress=progress, offline=True) == fetch(model, progress=progress) == model.path
    assert len(server.requests) == asked
    assert progress.calls == []


def test_the_record_is_one_that_sha256sum_reads(model):
    """The file beside the model has the form ``<hash>  <name>``."""
    record = fetch(model).with_name("model.gguf.sha256")
    assert record.read_text() == f"{sha256(GGUF)}  model.gguf\n"


def test_a_transfer_that_breaks_off_once_is_mended(server, answer, progress):
    """A short body and a fault of the server cost attempts, not the model."""
    wheel = publish(server, answer, 1, GGUF)
    whole = server.answers[f"/files/{wheel.file_name}"][0]
    broken = answer(whole.body, send=200_000)
    server.answer(f"/files/{wheel.file_name}", broken, answer(status=500), answer(whole.body, ranges=True))
    assert fetch(describe(wheel), progress=progress).read_bytes() == GGUF
    assert sum(progress.advances) == wheel.size


# Faults: each names its cause, ends the progress, and leaves the cache empty


def wrong_wheel_hash(server, answer):
    wheel = publish(server, answer, 1, GGUF)
    body = server.answers[f"/files/{wheel.file_name}"][0].body
    server.answer(f"/files/{wheel.file_name}", answer(body[:-1] + b"!"))
    return describe(wheel)


def wrong_wheel_size(server, answer):
    wheel = publish(server, answer, 1, GGUF)
    server.answer(f"/files/{wheel.file_name}", answer(b"<html>Please log in</html>"))
    return describe(wheel)


def truncated_wheel(server, answer):
    wheel = publish(server, answer, 1, GGUF)
    body = server.answers[f"/files/{wheel.file_name}"][0].body
    server.answer(f"/files/{wheel.file_name}", answer(body, send=100_000))
    return describe(wheel)


def wrong_member_size(server, answer):
    return describe(publish(server, answer, 1, GGUF), size=len(GGUF) + 1)


def wrong_member_hash(server, answer):
    return describe(publish(server, answer, 1, GGUF), digest=sha256(b"another"))


def missing_member(server, answer):
    wheel = publish(server, answer, 1, GGUF)
    return describe(Wheel(wheel.project, wheel.file_name, wheel.size, wheel.sha256, "fake/other.gguf"))


def no_wheel_at_all(server, answer):
    content = b"not a zip archive"
    wheel = publish(server, answer, 1, GGUF, answer(content))
    return describe(Wheel(wheel.project, wheel.file_name, len(content), sha256(content), wheel.member))


def second_part_missing(server, answer):
    first, second = publish(server, answer, 1, GGUF[:9]), publish(server, answer, 2, GGUF[9:])
    server.answer(f"/files/{second.file_name}", answer(status=404))
    return describe(first, second)


def project_missing(server, answer):
    wheel = publish(server, answer, 1, GGUF)
    server.answer(f"/simple/{wheel.project}/", answer(status=404))
    return describe(wheel)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (
            wrong_wheel_hash,
            IntegrityError,
            r"fake_part1-1\.0-py3-none-any\.whl is not the promised file: SHA-256",
        ),
        (wrong_wheel_size, IntegrityError, r"26 bytes, not \d"),
        (truncated_wheel, DownloadError, "broke off after 100,000 of"),
        (wrong_member_size, IntegrityError, "promised file of 400,005 bytes.*another of 400,004 bytes"),
        (wrong_member_hash, IntegrityError, f"SHA-256 {sha256(b'another')}"),
        (missing_member, IntegrityError, r"no readable member fake/other\.gguf"),
        (no_wheel_at_all, IntegrityError, "no readable member"),
        (second_part_missing, DownloadError, r"fake_part2-1\.0-py3-none-any\.whl.* 404"),
        (project_missing, DownloadError, "/simple/fake-part1/.* 404"),
    ],
)
def test_a_fault_leaves_the_cache_empty(server, answer, cache_folder, progress, fault, error, text):
    """Nothing half-made stays, and what was started is finished."""
    with pytest.raises(DownloadError, match=text) as raised:
        fetch(fault(server, answer), progress=progress)
    assert raised.type is error or error is DownloadError
    assert isinstance(raised.value, IntegrityError) == (error is IntegrityError)
    assert list(cache_folder.iterdir()) == []
    assert progress.calls.count("start") == progress.calls.count("finish")


def test_an_index_that_refuses_connections_is_named(model, server, cache_folder, monkeypatch):
    """The text names the index and the variables that help."""
    monkeypatch.setenv("REFENGINE_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:1/simple/.*HTTPS_PROXY.*REFENGINE_INDEX_URL"):
        fetch(model)
    assert list(cache_folder.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_download(model, server, cache_folder, monkeypatch):
    """Less room than the model and its wheel need is an error with the bytes and the folder."""
    needed = model.size + model.wheels[0].size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(DownloadError, match=f"{re.escape(str(cache_folder))}: {needed:,} bytes are needed"):
        fetch(model)
    assert server.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert fetch(model).read_bytes() == GGUF


def test_a_disk_that_fills_up_on_the_way_is_reported(model, cache_folder, monkeypatch):
    """The system's own "no space left" becomes the same error, and the cache is emptied."""

    def copy(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(DownloadError, match=r"bytes are needed \(No space left on device\)"):
        fetch(model)
    assert list(cache_folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(model, tmp_path, monkeypatch):
    """A cache folder that cannot be made is named, with the variable to set."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match=r"file/cache: it cannot be used .*Set REFENGINE_CACHE"):
        fetch(model)


@contextmanager
def read_only(*folders: Path):
    """Take away the right to write, and root's freedom from such rights with it."""
    me = os.geteuid()
    for folder in folders:
        folder.chmod(0o555)
    try:
        if me == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(me)
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="file modes of Windows differ")
def test_a_read_only_cache_serves_what_it_has(model, monkeypatch):
    """A cache without the right to write refuses to fetch a model, and serves one that was put there."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("REFENGINE_CACHE", folder)
        model.path.parent.mkdir(parents=True)
        with (
            read_only(Path(folder), model.path.parent),
            pytest.raises(DownloadError, match=r"it cannot be used \(Permission denied\)"),
        ):
            fetch(model)
        model.path.write_bytes(GGUF)
        with read_only(Path(folder), model.path.parent):
            assert fetch(model) == model.path
        assert not model.path.with_name("model.gguf.sha256").exists()


# Interruptions and company

CHILD = (
    "import sys; from refengine.loader.catalogue import *\n"
    "class Told(QuietProgress):\n"
    "    def advance(self, n): print('advance', flush=True)\n"
    "print(fetch(eval(sys.argv[1]), progress=Told()))"
)


def run_child(model: CatalogueModel) -> SimpleNamespace:
    """Fetch ``model`` in a process of its own, which prints a line whenever bytes have arrived."""
    environment = {**os.environ, "PYTHONPATH": str(Path(refengine.__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, repr(model)]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def wait_for() -> SimpleNamespace:
        stdout, stderr = process.communicate(timeout=30)
        return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=process.returncode)

    return SimpleNamespace(process=process, wait_for=wait_for)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_an_interrupt_leaves_the_cache_empty(server, answer, cache_folder):
    """Ctrl-C in the middle of a transfer ends the process as Ctrl-C does, and its temporary files go."""
    wheel = publish(server, answer, 1, GGUF)
    released = threading.Event()
    (served,) = server.answers[f"/files/{wheel.file_name}"]
    served.meanwhile = lambda: released.wait(30)
    child = run_child(describe(wheel))
    try:
        assert child.process.stdout.readline() == "advance\n"
        assert [path.name for path in cache_folder.glob(".partial-*/*.whl")] == [wheel.file_name]
        child.process.send_signal(signal.SIGINT)
        ended = child.wait_for()
    finally:
        released.set()
        child.process.kill()
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert list(cache_folder.iterdir()) == []


def test_two_processes_fetch_the_same_model(server, answer, cache_folder):
    """Both are in the middle at the same time; both get the file, and one copy stays."""
    wheel = publish(server, answer, 1, GGUF)
    (served,) = server.answers[f"/files/{wheel.file_name}"]
    served.meanwhile = threading.Barrier(2, timeout=20).wait
    model = describe(wheel)
    for child in [run_child(model), run_child(model)]:
        ended = child.wait_for()
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == str(model.path)
    assert model.path.read_bytes() == GGUF
    assert files_in(cache_folder) == {"models/fake/model.gguf", "models/fake/model.gguf.sha256"}


def test_the_first_to_finish_wins(model, answer, server):
    """A download that ends second leaves the file of the first alone: somebody may have it mapped."""
    (served,) = server.answers[f"/files/{model.wheels[0].file_name}"]
    overtaken = []

    def overtake():
        served.meanwhile = lambda: None
        overtaken.append(fetch(model).stat().st_ino)

    served.meanwhile = overtake
    assert fetch(model).stat().st_ino == overtaken[0]


def test_what_a_killed_process_left_goes_after_a_day(model, cache_folder):
    """Old working folders are removed by the next download; young ones may be in use and stay."""
    old, young = cache_folder / ".partial-old", cache_folder / ".partial-young"
    for folder, age in ((old, cache.STALE_AFTER_S + 60), (young, cache.STALE_AFTER_S + 60)):
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(b"half")
        for path in (folder / "model.gguf", folder):
            os.utime(path, (time.time() - age, time.time() - age))
    os.utime(young / "model.gguf")  # still being written
    fetch(model)
    assert not old.exists()
    assert young.exists()


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
