"""One file over HTTP or HTTPS, verified, with nothing but the standard library.

A download either ends with the promised bytes at its path or with an error and no file. Within one call a
broken transfer is resumed where it stopped (RFC 9110, section 14: Range), or started again where the server
cannot resume; a later call starts from nothing.

``urllib`` brings the system's certificates (``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are honoured) and the
proxy variables (``HTTPS_PROXY``, ``HTTP_PROXY``, ``NO_PROXY``).
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from refengine.errors import DownloadError, IntegrityError
from refengine.loader.progress import Progress

CHUNK_BYTES = 1 << 16
TIMEOUT_S = 30.0  # of one connect or one read, not of the whole transfer
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0)  # one attempt more than there are delays

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_LASTING_CAUSES = (
    ConnectionRefusedError,
    socket.gaierror,
    ssl.SSLCertVerificationError,
    http.client.InvalidURL,
)
_ADVICE = (
    "If this machine is offline or behind a proxy, check the connection and HTTPS_PROXY, "
    "or set REFENGINE_INDEX_URL to a package index that it can reach."
)
_CERTIFICATE_ADVICE = "Set SSL_CERT_FILE to a file with the certificates that this network needs."
_DELETED = "What arrived was deleted; if another package index is set (REFENGINE_INDEX_URL), try without it."

T = TypeVar("T")


def download(
    url: str,
    path: Path,
    *,
    size: int,
    sha256: str,
    progress: Progress,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Download ``url`` to ``path``, which nobody else may be writing, and hash it on the way.

    Args:
        url: an ``http`` or ``https`` address.
        path: where the bytes go; removed again unless every one of them is right.
        size: the promised size in bytes.
        sha256: the promised SHA-256, in lower-case hexadecimal.
        progress: told of every chunk; the caller starts and finishes it.
        headers: sent along; ``Authorization`` goes to the host of ``url`` only, not where it redirects to.

    Raises:
        DownloadError: the server cannot be reached, refused, or kept breaking off.
        IntegrityError: it sent a file of another size or hash.
        OSError: ``path`` cannot be written.
    """
    try:
        with path.open("wb") as file:
            transfer = _Transfer(url, file, size, headers or {}, progress)
            retrying(transfer.attempt)
        if (received := transfer.digest.hexdigest()) != sha256:
            raise IntegrityError(
                f"{url_label(url)} is not the promised file: SHA-256 {received}, not {sha256}. {_DELETED}"
            )
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class _Transfer:
    """What has arrived of one file so far, and how to get the rest."""

    def __init__(
        self, url: str, file: BinaryIO, size: int, headers: Mapping[str, str], progress: Progress
    ) -> None:
        self.url, self.file, self.size, self.headers, self.progress = url, file, size, headers, progress
        self.received = 0
        self.digest = hashlib.sha256()

    def attempt(self) -> None:
        """Ask for the bytes still missing and append them."""
        resume = {"Range": f"bytes={self.received}-"} if self.received else {}
        with open_url(self.url, {**self.headers, **resume}) as response:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {self.received}-")
            if self.received and not resumed:
                self._rewind()
            self._check_length(response.length)
            while chunk := read_chunk(response, self.url):
                self._append(chunk)
        if self.received < self.size:
            raise _PassingError(
                f"{url_label(self.url)} broke off after {self.received:,} of {self.size:,} bytes. {_ADVICE}"
            )

    def _check_length(self, announced: int | None) -> None:
        """Refuse a file of another size before its bytes are fetched, where the server announces the size."""
        if announced is not None and self.received + announced != self.size:
            self._refuse_size(f"{self.received + announced:,}")

    def _append(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self.received > self.size:
            self._refuse_size(f"more than {self.size:,}")
        self.file.write(chunk)
        self.digest.update(chunk)
        self.progress.advance(len(chunk))

    def _refuse_size(self, found: str) -> None:
        raise IntegrityError(
            f"{url_label(self.url)} is not the promised file: {found} bytes, not {self.size:,}. {_DELETED}"
        )

    def _rewind(self) -> None:
        self.file.seek(0)
        self.progress.advance(-self.received)
        self.received = 0
        self.digest = hashlib.sha256()


def retrying(action: Callable[[], T]) -> T:
    """Call ``action`` until it succeeds, fails for good, or has had ``len(RETRY_DELAYS_S) + 1`` attempts."""
    for delay in RETRY_DELAYS_S:
        try:
            return action()
        except _PassingError:
            time.sleep(delay)
    return action()


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """Open ``url``; of ``headers``, redirects carry all but ``Authorization`` on.

    Raises:
        DownloadError: the text names the host, the cause, and what to do.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {url_label(url)}: only http and https addresses are supported")
    request = urllib.request.Request(url, headers={"User-Agent": "refengine"})
    for name, value in headers.items():
        add = request.add_unredirected_header if name == "Authorization" else request.add_header
        add(name, value)
    with _network_errors(url):
        # A new opener, so that certificates and proxies are those of the environment now.
        response: http.client.HTTPResponse = urllib.request.build_opener().open(request, timeout=TIMEOUT_S)
    return response


def read_chunk(response: http.client.HTTPResponse, url: str) -> bytes:
    """Read up to ``CHUNK_BYTES`` of an answer; empty at its end. Raises DownloadError."""
    with _network_errors(url):
        return response.read(CHUNK_BYTES)


def url_label(url: str) -> str:
    """``host/path`` of ``url``, for messages: without credentials or a signed query."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path


class _PassingError(DownloadError):
    """A failure that another attempt may not meet."""


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Turn what the network raises into a DownloadError, and tell passing failures from lasting ones."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        kind = _PassingError if error.code in _PASSING_STATUS else DownloadError
        raise kind(f"{url_label(url)}: the server answered {error.code} {error.reason}. {_ADVICE}") from error
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        kind = DownloadError if isinstance(cause, _LASTING_CAUSES) else _PassingError
        certificate = isinstance(cause, ssl.SSLCertVerificationError)
        raise kind(
            f"cannot reach {url_label(url)}: {cause}. {_CERTIFICATE_ADVICE if certificate else _ADVICE}"
        ) from error
