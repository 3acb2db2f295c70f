"""Where a package index keeps a file: the Simple API, as JSON (PEP 691) or HTML (PEP 503).

The index is PyPI, or the address in ``REFENGINE_INDEX_URL``; without that, the one pip or uv was given in
``PIP_INDEX_URL``, ``UV_DEFAULT_INDEX`` or ``UV_INDEX_URL``.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from refengine.errors import DownloadError
from refengine.loader.download import open_url, read_chunk, retrying, url_label

DEFAULT_INDEX_URL = "https://pypi.org/simple"
INDEX_URL_VARIABLES = ("REFENGINE_INDEX_URL", "PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


@dataclass(frozen=True)
class PackageIndex:
    """A package index.

    Attributes:
        url: its address, without credentials and without a slash at the end.
        authorization: the value of the ``Authorization`` header for its host, where it wants one.
    """

    url: str
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> PackageIndex:
        """Return the index named by the first of ``INDEX_URL_VARIABLES`` that is set, or else PyPI.

        A name and password in the address (``https://name:password@host/simple``) become a header.
        """
        set_values = (os.environ.get(variable) for variable in INDEX_URL_VARIABLES)
        url = next(filter(None, set_values), DEFAULT_INDEX_URL).rstrip("/")
        parts = urlsplit(url)
        credentials, at, host = parts.netloc.rpartition("@")
        if not at:
            return cls(url)
        encoded = base64.b64encode(unquote(credentials).encode()).decode()
        return cls(urlunsplit(parts._replace(netloc=host)), f"Basic {encoded}")

    def file_url(self, project: str, file_name: str) -> str:
        """Find the address of ``file_name`` among the files of ``project`` (a normalised name, PEP 503).

        Raises:
            DownloadError: the index cannot be reached, or lacks the project or the file.
        """
        page_url = f"{self.url}/{project}/"
        links = retrying(lambda: self._links(page_url))
        if (link := links.get(file_name)) is None:
            raise DownloadError(
                f"the package index has no {file_name} at {url_label(page_url)}. "
                f"Set REFENGINE_INDEX_URL to one that has it, such as {DEFAULT_INDEX_URL}."
            )
        return link

    def headers(self, url: str) -> dict[str, str]:
        """Return the headers to send with ``url``: credentials go to the index's own host only."""
        own_host = urlsplit(url)[:2] == urlsplit(self.url)[:2]
        return {"Authorization": self.authorization} if self.authorization and own_host else {}

    def _links(self, page_url: str) -> dict[str, str]:
        """Read a project's page: the absolute address of each file, by file name."""
        with open_url(page_url, {"Accept": _ACCEPT, **self.headers(page_url)}) as response:
            page = b"".join(iter(lambda: read_chunk(response, page_url), b"")).decode("utf-8", "replace")
            base_url, content_type = response.url, response.headers.get_content_type()
        if content_type.endswith("json"):
            return _json_links(page, base_url)
        parser = _LinkParser(base_url)
        parser.feed(page)
        return parser.links


def _json_links(page: str, base_url: str) -> dict[str, str]:
    try:
        return {file["filename"]: urljoin(base_url, file["url"]) for file in json.loads(page)["files"]}
    except (ValueError, LookupError, TypeError) as error:
        raise DownloadError(
            f"{url_label(base_url)} does not answer the Simple API of a package index (PEP 691): {error!r}"
        ) from error


class _LinkParser(HTMLParser):
    """Collects the anchors of a project's HTML page."""

    def __init__(self, base_url: str) -> None:
        super().__init__()
        self.base_url = base_url
        self.links: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the file that an anchor points at."""
        href = dict(attrs).get("href")
        if tag == "base" and href:
            self.base_url = urljoin(self.base_url, href)
        elif tag == "a" and href:
            url = urljoin(self.base_url, href)
            self.links[PurePosixPath(unquote(urlsplit(url).path)).name] = url
