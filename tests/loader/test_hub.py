"""Ids of the Hugging Face Hub: their form, the file they mean, and ``huggingface_hub`` with a local hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refengine
from refengine.errors import DownloadError, ModelNotFoundError, UnsupportedError
from refengine.loader.catalogue import resolve
from refengine.loader.hub import HubId, choose_file

COMMIT = "a" * 40

# The form of an id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/repo", HubId("owner/repo")),
        ("owner/repo:Q8_0", HubId("owner/repo", choice="Q8_0")),
        ("owner/repo:sub/a.gguf", HubId("owner/repo", choice="sub/a.gguf")),
        ("owner/repo@refs/pr/1", HubId("owner/repo", revision="refs/pr/1")),
        ("o-w.n_er/Llama-3.1_8B-GGUF@v1:Q8_0", HubId("o-w.n_er/Llama-3.1_8B-GGUF", "v1", "Q8_0")),
    ],
)
def test_an_id_is_read_and_written(text, expected):
    """The parts of an id are found, and its text is what was read."""
    assert HubId.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "repo",
            "a/b/c",
            "./repo",
            "../repo",
            "~/repo",
            "/repo",
            "/owner/repo",
            "C:/repo",
            "owner\\repo",
        ),
        *(
            "owner/",
            "owner/repo:",
            "owner/repo@",
            "owner/repo:a:b",
            "owner/re po",
            "owner/repö",
            "owner/repo\n",
        ),
        "owner/model.gguf",
    ],
)
def test_other_texts_are_no_ids(text):
    """Paths, names and misspelt ids are told from ids."""
    assert HubId.parse(text) is None


# The choice of a file

USUAL = [
    "README.md",
    "config.json",
    "m-Q2_K.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-Q8_0.gguf",
    "m-BF16.gguf",
]


@pytest.mark.parametrize(
    ("choice", "files", "expected"),
    [
        (None, USUAL, "m-Q4_K_M.gguf"),
        (None, ["m.q4_k_m.gguf", "m.q8_0.gguf"], "m.q4_k_m.gguf"),
        (None, ["b.gguf", "a.gguf", "a.safetensors"], "a.gguf"),
        (None, ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf"], "b.gguf"),
        (None, ["mmproj-m-f16.gguf", "m.imatrix.gguf", "z.gguf"], "z.gguf"),
        ("Q8_0", USUAL, "m-Q8_0.gguf"),
        ("q8_0", USUAL, "m-Q8_0.gguf"),
        ("Q4_K_S", USUAL, "m-Q4_K_S.gguf"),
        ("Q4_K", ["m-IQ4_K.gguf", "m-Q4_K.gguf", "m-Q4_K_M.gguf"], "m-Q4_K.gguf"),
        ("BF16", ["m-F16.gguf", "BF16/m.gguf"], "BF16/m.gguf"),
        ("F16", ["m-F16.gguf", "BF16/m.gguf"], "m-F16.gguf"),
        ("Q4_K_XL", ["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "m-UD-Q4_K_XL.gguf"),
        ("Q8_0", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        ("m-Q2_K.gguf", USUAL, "m-Q2_K.gguf"),
        ("sub/m.gguf", ["m.gguf", "sub/m.gguf"], "sub/m.gguf"),
    ],
)
def test_the_file_that_is_meant(progress, choice, files, expected):
    """A file by name; a quantization as a whole word, in any case; else Q4_K_M; else the first by name."""
    assert choose_file(HubId("owner/repo", choice=choice), files, progress) == expected


@pytest.mark.parametrize(
    ("choice", "files", "error", "text"),
    [
        (None, ["README.md", "model.safetensors"], ModelNotFoundError, "owner/repo has no GGUF file"),
        ("Q3_K_M", USUAL, ModelNotFoundError, r"no such file.*m-Q2_K\.gguf.*m-Q8_0\.gguf"),
        ("Q4_K", USUAL, ModelNotFoundError, "no such file"),
        ("other.gguf", USUAL, ModelNotFoundError, "no such file"),
        (
            "Q8_0",
            ["a-Q8_0.gguf", "b-Q8_0.gguf"],
            ModelNotFoundError,
            r"ambiguous.* a-Q8_0\.gguf, b-Q8_0\.gguf",
        ),
        (None, ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], ModelNotFoundError, "ambiguous"),
        ("F16", ["F16-00001-of-00002.gguf", "F16-00002-of-00002.gguf"], UnsupportedError, "split model"),
        (None, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], UnsupportedError, "split model"),
    ],
)
def test_no_single_file_is_an_error(progress, choice, files, error, text):
    """Nothing is guessed: the text lists what there is."""
    with pytest.raises(error, match=text):
        choose_file(HubId("owner/repo", choice=choice), files, progress)


@pytest.mark.parametrize(
    ("choice", "files", "n_notices"),
    [
        (None, ["a-Q8_0.gguf", "b-Q8_0.gguf"], 1),
        (None, ["a-Q8_0.gguf"], 0),
        (None, USUAL, 0),
        ("Q8_0", USUAL, 0),
    ],
)
def test_a_choice_made_for_the_user_is_told(progress, choice, files, n_notices):
    """Taking the first of several files is a notice; what was asked for, or documented, is none."""
    file = choose_file(HubId("owner/repo", choice=choice), files, progress)
    assert len(progress.notices) == n_notices
    assert all(file in notice for notice in progress.notices)


# The library


def test_without_the_library_the_extra_is_named(monkeypatch):
    """The text is the command that installs what is missing."""
    for module in ("huggingface_hub", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DownloadError, match=r"pip install 'refengine\[hub\]'"):
        resolve("owner/repo")


def test_the_library_is_imported_only_for_an_id(cache_folder, tmp_path):
    """Resolving a path leaves ``huggingface_hub`` alone."""
    (tmp_path / "a.gguf").touch()
    script = (
        "import sys; from refengine.loader.catalogue import resolve; resolve(sys.argv[1]);"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(refengine.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.gguf"], env=environment, check=True)


@pytest.fixture
def resolve_all(server, answer, cache_folder, tmp_path):
    """Resolve names in one process whose hub is the local server; an answer is a path or an error."""
    pytest.importorskip("huggingface_hub")
    script = (
        "import json, sys\n"
        "from refengine.errors import RefengineError\n"
        "from refengine.loader.catalogue import resolve\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(json.dumps(['path', str(resolve(name))]))\n"
        "    except RefengineError as error: print(json.dumps([type(error).__name__, str(error)]))"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "PYTHONPATH": str(Path(refengine.__file__).parents[1]),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def run(*names: str, **variables: str) -> list[list[str]]:
        command = [sys.executable, "-c", script, *names]
        result = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=60, check=True
        )
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


@pytest.fixture
def repository(server, answer):
    """A repository with three GGUF files at one commit, which is its main branch and its tag ``v1``."""
    files = {"m-Q4_K_M.gguf": b"GGUF four", "sub/m-Q8_0.gguf": b"GGUF eight", "m-F16.gguf": b"GGUF sixteen"}
    tree = [
        {"type": "file", "path": path, "size": len(body), "oid": "b" * 40} for path, body in files.items()
    ]
    tree += [{"type": "file", "path": "run_me.py", "size": 1, "oid": "c" * 40}]
    for revision in ("main", "v1"):
        server.answer(
            f"/api/models/owner/repo/tree/{revision}",
            answer(json.dumps(tree).encode(), headers={"Content-Type": "application/json"}),
        )
        for number, (path, body) in enumerate(files.items()):
            headers = {"ETag": f'"{number:040x}"', "X-Repo-Commit": COMMIT}
            server.answer(f"/owner/repo/resolve/{revision}/{path}", answer(body, headers=headers))
    return files


def test_one_gguf_file_is_downloaded_and_found_again_offline(server, repository, resolve_all):
    """Default, quantization, file and revision lead to their files, of which only those are fetched."""
    names = ["owner/repo", "owner/repo:q8_0", "owner/repo@v1:m-F16.gguf"]
    online = resolve_all(*names[:2]) + resolve_all(names[2])
    for (kind, path), (file, body) in zip(online, repository.items(), strict=True):
        assert kind == "path", path
        assert path.endswith(f"snapshots/{COMMIT}/{file}")
        assert Path(path).read_bytes() == body
    fetched = {path for path, headers in server.requests if "/resolve/" in path}
    assert fetched == {
        "/owner/repo/resolve/main/m-Q4_K_M.gguf",
        "/owner/repo/resolve/main/sub/m-Q8_0.gguf",
        "/owner/repo/resolve/v1/m-F16.gguf",
    }
    asked = len(server.requests)
    assert resolve_all(*names, f"owner/repo@{COMMIT}", HF_HUB_OFFLINE="1") == [*online, online[0]]
    assert resolve_all(*names, REFENGINE_OFFLINE="1") == online
    assert len(server.requests) == asked


def test_offline_what_is_not_cached_is_a_download_error(server, repository, resolve_all):
    """Offline mode is named as the reason, for a repository, a revision and a file alike."""
    (not_cached,) = resolve_all("owner/repo", REFENGINE_OFFLINE="1")
    (_,) = resolve_all("owner/repo")
    asked = len(server.requests)
    others = resolve_all("owner/repo@v2", "owner/repo:Q8_0", "owner/other", REFENGINE_OFFLINE="1")
    for kind, text in (not_cached, *others):
        assert kind == "DownloadError"
        assert "offline" in text.lower()
    assert len(server.requests) == asked


def test_refusals_of_the_hub_are_told_apart(server, answer, repository, resolve_all):
    """Missing, gated and broken repositories are errors that say what to do; others list what there is."""
    refusals = {
        "missing/repo": answer(status=404, headers={"X-Error-Code": "RepoNotFound"}),
        "gated/repo": answer(status=403, headers={"X-Error-Code": "GatedRepo"}),
        "broken/repo": answer(status=400),
    }
    for repo, refusal in refusals.items():
        server.answer(f"/api/models/{repo}/tree/main", refusal)
    server.answer(
        "/api/models/owner/repo/tree/v9", answer(status=404, headers={"X-Error-Code": "RevisionNotFound"})
    )
    names = [*refusals, "owner/repo@v9", "owner/repo:Q5_0", "owner/re..po"]
    missing, gated, broken, revision, quant, invalid = resolve_all(*names)
    assert missing[0] == "ModelNotFoundError"
    assert "HF_TOKEN" in missing[1]
    assert gated[0] == "DownloadError"
    assert "https://huggingface.co/gated/repo" in gated[1]
    assert "HF_TOKEN" in gated[1]
    assert broken[0] == "DownloadError"
    assert "HF_HUB_OFFLINE=1" in broken[1]
    assert revision == ["ModelNotFoundError", "owner/repo@v9: owner/repo has no revision v9"]
    assert quant[0] == "ModelNotFoundError"
    assert "m-F16.gguf, m-Q4_K_M.gguf, sub/m-Q8_0.gguf" in quant[1]
    assert invalid[0] == "ModelNotFoundError"


def test_the_token_is_the_library_s_own_affair(server, repository, resolve_all):
    """``HF_TOKEN`` reaches the hub without passing through refengine."""
    resolve_all("owner/repo", HF_TOKEN="hf_secret")
    (request, *_) = server.requests_for("/owner/repo/resolve/main/m-Q4_K_M.gguf")
    assert request["Authorization"] == "Bearer hf_secret"
