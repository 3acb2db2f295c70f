"""The folder of downloaded models: ``models/<name>/<file>.gguf``, with ``<file>.gguf.sha256`` beside it.

The ``.sha256`` file records that the model was verified, in the form that ``sha256sum --check`` reads. Work
in progress lives in ``.partial-*``, a folder for each download, removed when it ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refengine.errors import DownloadError

STALE_AFTER_S = 24 * 3600.0
_PARTIAL_PREFIX = ".partial-"


def cache_folder() -> Path:
    r"""Return the cache folder, which need not exist yet.

    ``REFENGINE_CACHE``; else ``$XDG_CACHE_HOME/refengine``; else what the platform is used to:
    ``~/.cache/refengine``, on macOS ``~/Library/Caches/refengine``, on Windows
    ``%LOCALAPPDATA%\refengine\cache``.

    Raises:
        DownloadError: none of the variables is set and there is no home folder.
    """
    if chosen := os.environ.get("REFENGINE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "refengine"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "refengine" / "cache"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise DownloadError(
            "this user has no home folder to keep models in: set REFENGINE_CACHE to a folder"
        ) from error
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "refengine"
    return home / ".cache" / "refengine"


def is_recorded(path: Path, *, size: int, sha256: str) -> bool:
    """Whether ``path`` has the right size and a record that it was verified; reads only the record."""
    try:
        return path.stat().st_size == size and _record(path).read_text().split()[0] == sha256
    except (OSError, IndexError, UnicodeDecodeError):
        return False


def is_intact(path: Path, *, size: int, sha256: str) -> bool:
    """Whether ``path`` is the promised file, by its record or else by its hash, which is then recorded.

    So a file put into the cache by hand is verified once, like a downloaded one.
    """
    if is_recorded(path, size=size, sha256=sha256):
        return True
    with suppress(OSError):  # what cannot be read is not there
        if has_content(path, size=size, sha256=sha256):
            with suppress(OSError):  # a cache that cannot be written is still good to read
                _write_record(path, sha256)
            return True
    return False


def has_content(path: Path, *, size: int, sha256: str) -> bool:
    """Whether ``path`` is a file of this size and hash; reads all of it where the size is right."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        import hashlib  # brings OpenSSL, which takes megabytes; most runs hash nothing

        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def publish(temporary: Path, path: Path, *, size: int, sha256: str) -> None:
    """Move a verified file from a working folder to its place; the first of several processes wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_recorded(path, size=size, sha256=sha256):
        os.replace(temporary, path)
        _write_record(path, sha256)


def discard(path: Path) -> None:
    """Delete a cached file and its record."""
    path.unlink(missing_ok=True)
    _record(path).unlink(missing_ok=True)


@contextmanager
def working_folder(needed_bytes: int) -> Iterator[Path]:
    """A folder of this download's own, on the cache's disk, removed however the block ends.

    What a killed process left behind is removed here too, once nothing in it has changed for a day.

    Raises:
        DownloadError: fewer than ``needed_bytes`` are free, or the cache cannot be written.
    """
    cache = cache_folder()
    with disk_errors(needed_bytes):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        if shutil.disk_usage(cache).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        folder = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=cache))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_errors(needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into a DownloadError that names the cache folder and what it needs."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = f"{needed_bytes:,} bytes are needed" if full else "it cannot be used"
        raise DownloadError(
            f"the cache folder {cache_folder()}: {problem} ({error.strerror or error}). "
            f"{'Make room, or set' if full else 'Set'} REFENGINE_CACHE to another folder."
        ) from error


def _remove_stale(cache: Path) -> None:
    for folder in cache.glob(f"{_PARTIAL_PREFIX}*"):
        with suppress(OSError):  # its owner may be removing it at this moment
            newest = max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
            if newest < time.time() - STALE_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _write_record(path: Path, sha256: str) -> None:
    _record(path).write_text(f"{sha256}  {path.name}\n")


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
