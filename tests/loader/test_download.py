"""One download: what arrives is what was promised, or nothing is left."""

from __future__ import annotations

import hashlib
import random
import shutil
import ssl
import subprocess
import threading
from http.server import HTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refengine.errors import DownloadError, IntegrityError
from refengine.loader.download import RETRY_DELAYS_S, download
from refengine.loader.progress import QuietProgress

BODY = random.Random(1).randbytes(300_000)  # several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()
ATTEMPTS = len(RETRY_DELAYS_S) + 1

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def test_a_download_writes_the_promised_bytes_and_counts_them(server, answer, path, progress):
    """The file holds what the server sent, and progress saw each byte once."""
    url = server.answer("/file", answer(BODY))
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert path.read_bytes() == BODY
    assert sum(progress.advances) == len(BODY)
    assert len(progress.advances) > 1


@given(
    cuts=st.lists(st.integers(0, len(BODY) - 1), max_size=ATTEMPTS - 1),
    ranges=st.lists(st.booleans(), min_size=ATTEMPTS, max_size=ATTEMPTS),
    announced=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_download_is_resumed_or_started_again(server, answer, path, cuts, ranges, announced):
    """Wherever transfers break off, and whether or not ranges are served, all bytes arrive."""
    answers = [
        answer(BODY, send=cut, ranges=ranged, announce_length=announced)
        for cut, ranged in zip([*cuts, None], ranges, strict=False)
    ]
    counts: list[int] = []
    counter = QuietProgress()
    counter.advance = counts.append
    download(server.answer("/file", *answers), path, size=len(BODY), sha256=SHA256, progress=counter)
    assert path.read_bytes() == BODY
    assert sum(counts) == len(BODY)


def test_a_resumed_download_asks_only_for_what_is_missing(server, answer, path, progress):
    """The second request names the first byte that the first transfer did not bring."""
    url = server.answer("/file", answer(BODY, send=100_000), answer(BODY, ranges=True))
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    first, second = server.requests_for("/file")
    assert first["Range"] is None
    assert second["Range"] == "bytes=100000-"
    assert min(progress.advances) > 0


def test_a_server_without_ranges_takes_the_count_back(server, answer, path, progress):
    """Starting again is told as a negative advance."""
    url = server.answer("/file", answer(BODY, send=100_000), answer(BODY))
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert -100_000 in progress.advances


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_of_the_server_is_tried_again(server, answer, path, progress, status):
    """Statuses that speak of the moment are retried."""
    url = server.answer("/file", answer(status=status), answer(status=status), answer(BODY))
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert path.read_bytes() == BODY


def test_retries_are_bounded(server, answer, path, progress):
    """A server that stays broken is given up, with its host, its answer and some advice in the text."""
    url = server.answer("/file", answer(status=503))
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{server.server_port}/file.*503.*HTTPS_PROXY"):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert len(server.requests) == ATTEMPTS
    assert not path.exists()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_lasting_refusal_is_not_tried_again(server, answer, path, progress, status):
    """Statuses that will not change end the download at once."""
    url = server.answer("/file", answer(status=status))
    with pytest.raises(DownloadError, match=str(status)):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert len(server.requests) == 1
    assert not path.exists()


def test_a_body_that_always_breaks_off_fails(server, answer, path, progress):
    """Too few bytes every time are an error that says how many came."""
    url = server.answer("/file", answer(BODY, send=1_000))
    with pytest.raises(DownloadError, match="broke off after 1,000 of 300,000 bytes") as raised:
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert not isinstance(raised.value, IntegrityError)
    assert not path.exists()


def test_a_refused_connection_fails_at_once(path, progress, monkeypatch):
    """Nobody listens: the text names the host and says so; no delay is waited for."""
    with HTTPServer(("127.0.0.1", 0), None) as closed:
        port = closed.server_port
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited before trying again"))
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{port}/file: .*refused"):
        download(f"http://127.0.0.1:{port}/file", path, size=1, sha256=SHA256, progress=progress)
    assert not path.exists()


def test_a_silent_server_times_out(server, answer, path, progress, monkeypatch):
    """A server that stops in the middle does not hold the download for ever."""
    monkeypatch.setattr("refengine.loader.download.TIMEOUT_S", 0.05)
    released = threading.Event()
    url = server.answer("/file", answer(BODY, meanwhile=lambda: released.wait(10)))
    with pytest.raises(DownloadError, match="timed out"):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    released.set()
    assert len(server.requests) == ATTEMPTS
    assert not path.exists()


def test_a_wrong_hash_leaves_nothing(server, answer, path, progress):
    """One changed byte is an IntegrityError that names both hashes, and the file is gone."""
    changed = bytes([BODY[0] ^ 1]) + BODY[1:]
    url = server.answer("/file", answer(changed))
    with pytest.raises(IntegrityError, match=f"{hashlib.sha256(changed).hexdigest()}, not {SHA256}"):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert not path.exists()
    assert len(server.requests) == 1


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_wrong_announced_size_is_refused_before_the_bytes(server, answer, path, progress, extra):
    """A file announced shorter or longer than promised is not fetched at all."""
    url = server.answer("/file", answer(bytes(len(BODY) + extra)))
    with pytest.raises(IntegrityError, match=f"{len(BODY) + extra:,} bytes, not 300,000"):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert progress.advances == []
    assert not path.exists()


def test_an_endless_body_is_cut_off(server, answer, path, progress):
    """Without an announced length, no more than the promised bytes are kept."""
    url = server.answer("/file", answer(BODY * 3, announce_length=False))
    with pytest.raises(IntegrityError, match="more than 300,000 bytes"):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert sum(progress.advances) <= len(BODY)
    assert not path.exists()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/file", "/etc/hostname"])
def test_only_web_addresses_are_opened(path, progress, url):
    """An index cannot point a download at a local file."""
    with pytest.raises(DownloadError, match="only http and https"):
        download(url, path, size=1, sha256=SHA256, progress=progress)


def test_a_redirect_is_followed_without_the_credentials(server, answer, path, progress):
    """``Authorization`` goes to the first host only; other headers go on."""
    target = server.answer("/target", answer(BODY)).replace("127.0.0.1", "localhost")
    url = server.answer("/file", answer(status=302, headers={"Location": target}))
    headers = {"Authorization": "Basic c2VjcmV0", "Accept": "a/b"}
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress, headers=headers)
    (first,), (second,) = server.requests_for("/file"), server.requests_for("/target")
    assert first["Authorization"] == "Basic c2VjcmV0"
    assert second["Authorization"] is None
    assert second["Accept"] == "a/b"


def test_errors_hide_what_an_address_keeps_secret(server, path, progress):
    """Neither a password nor a signature in the query appears in an error's text."""
    url = f"http://name:password@127.0.0.1:{server.server_port}/file?signature=abc"
    with pytest.raises(DownloadError) as raised:
        download(url, path, size=1, sha256=SHA256, progress=progress)
    assert "/file" in str(raised.value)
    assert "password" not in str(raised.value)
    assert "signature" not in str(raised.value)


def test_the_proxy_variables_are_honoured(server, answer, path, progress, monkeypatch):
    """With ``HTTP_PROXY`` set, the proxy is asked for the whole address."""
    server.answer("http://models.invalid/file", answer(BODY))
    monkeypatch.setenv("HTTP_PROXY", server.url)
    url = "http://models.invalid/file"
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert path.read_bytes() == BODY


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificates_are_checked_and_ssl_cert_file_is_honoured(
    server, answer, path, progress, tmp_path, monkeypatch
):
    """A certificate nobody vouches for is refused with a way out, which is ``SSL_CERT_FILE``."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}",
        shell=True,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.answer("/file", answer(BODY)).replace("http:", "https:")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited before trying again"))
    with pytest.raises(DownloadError, match=r"certificate verify failed.*SSL_CERT_FILE"):
        download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    download(url, path, size=len(BODY), sha256=SHA256, progress=progress)
    assert path.read_bytes() == BODY


def test_a_quiet_download_still_shows_notices(caplog):
    """Without a progress display, notices such as licences reach the log as warnings."""
    QuietProgress().notice("These terms apply: 100 %s")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("refengine", "WARNING", "These terms apply: 100 %s")
    ]
