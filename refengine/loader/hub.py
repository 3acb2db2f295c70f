"""GGUF files of the Hugging Face Hub, through the optional package ``huggingface_hub``.

That package keeps its own cache and reads its own variables: ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HUB_OFFLINE``. It is imported only when a hub id is resolved, and it draws its own progress bar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from refengine.errors import DownloadError, ModelNotFoundError, UnsupportedError
from refengine.loader.progress import Progress

DEFAULT_QUANT = "Q4_K_M"

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(?:@(?P<revision>[^\s:@]+))?"
    r"(?::(?P<choice>[^\s:]+))?",
    re.ASCII,
)
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class HubId:
    """A place on the hub: ``owner/repo[@revision][:quant-or-file.gguf]``.

    Attributes:
        repo: ``owner/repo``.
        revision: a branch, tag or commit; ``None`` is the main branch.
        choice: the name of a quantization such as ``Q8_0``, or a file of the repository; or ``None``.
    """

    repo: str
    revision: str | None = None
    choice: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Read an id, or return ``None`` for a text of another form; ``owner/x.gguf`` is a path."""
        match = _ID.fullmatch(text)
        if match is None or (text.lower().endswith(".gguf") and match["choice"] is None):
            return None
        return cls(match["repo"], match["revision"], match["choice"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f':{self.choice}' if self.choice else ''}"


def download_from_hub(hub_id: HubId, *, progress: Progress, offline: bool) -> Path:
    """Return the local path of the GGUF file that ``hub_id`` means, downloading that one file where needed.

    Offline, only files already in the hub's cache are looked at.

    Raises:
        ModelNotFoundError: no such repository, revision or file, or several files of that quantization.
        UnsupportedError: the model is split into parts.
        DownloadError: ``huggingface_hub`` is missing; the hub cannot be reached or refused; or ``offline``
            holds and its cache has no such file.
    """
    hub = _import_hub(hub_id)
    if offline:
        cached = _cached_files(hub, hub_id)
        try:
            return cached[choose_file(hub_id, list(cached), progress)]
        except ModelNotFoundError as error:
            raise DownloadError(f"{error}. Offline, only what the hub's cache holds was looked at") from error
    with _hub_errors(hub, hub_id):
        files = hub.list_repo_files(hub_id.repo, revision=hub_id.revision)
    file = choose_file(hub_id, files, progress)
    with _hub_errors(hub, hub_id):
        return Path(hub.hf_hub_download(hub_id.repo, file, revision=hub_id.revision))


def choose_file(hub_id: HubId, files: Sequence[str], progress: Progress) -> str:
    """Choose the file of a repository that ``hub_id`` means.

    The file named, or the one of the quantization named. Where neither is named, as with llama.cpp's
    ``-hf``: the file of ``Q4_K_M``, else the first GGUF file by name, with a notice if there are others.
    Files of vision projectors (``mmproj``) and importance matrices (``imatrix``) are no models.

    Raises:
        ModelNotFoundError: nothing fits, or several files do.
        UnsupportedError: the model is split into parts.
    """
    models = sorted(file for file in files if _is_model(file))
    if not models:
        raise ModelNotFoundError(f"{hub_id}: {hub_id.repo} has no GGUF file")
    if hub_id.choice and hub_id.choice.lower().endswith(".gguf"):
        fitting = [file for file in models if file == hub_id.choice]
    else:
        fitting = _of_quant(models, hub_id.choice or DEFAULT_QUANT)
    if not fitting and hub_id.choice is None:
        fitting = sorted(models, key=_is_part)[:1]
        if len(models) > 1:
            progress.notice(
                f"{hub_id} has no {DEFAULT_QUANT} file: taking {fitting[0]}, one of {len(models)}"
            )
    if not fitting:
        raise ModelNotFoundError(f"{hub_id}: no such file. There are {', '.join(models)}")
    whole = [file for file in fitting if not _is_part(file)]
    if not whole:
        raise UnsupportedError(f"{hub_id}: {fitting[0]} is one part of a split model; merge the parts first")
    if len(whole) > 1:
        raise ModelNotFoundError(f"{hub_id} is ambiguous: name one of {', '.join(whole)}")
    return whole[0]


def _is_model(file: str) -> bool:
    lower = file.lower()
    return lower.endswith(".gguf") and "mmproj" not in lower and "imatrix" not in lower


def _is_part(file: str) -> bool:
    return _PART.search(file) is not None


def _of_quant(files: Sequence[str], quant: str) -> list[str]:
    """Return the files with ``quant`` as a whole word of their path: ``Q4_K`` is not ``Q4_K_M``."""
    word = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?=[-./])", re.IGNORECASE)
    return [file for file in files if word.search(file)]


def _import_hub(hub_id: HubId) -> ModuleType:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise DownloadError(
            f"{hub_id} is an id of the Hugging Face Hub, which needs a package that is not installed. "
            "Install it with: pip install 'refengine[hub]'"
        ) from error
    return huggingface_hub


def _cached_files(hub: ModuleType, hub_id: HubId) -> dict[str, Path]:
    """Map the files of one revision of a repository in the hub's cache to their paths."""
    try:
        repos = hub.scan_cache_dir().repos
    except hub.errors.CacheNotFound:
        repos = frozenset()
    wanted = hub_id.revision or "main"
    named = [repo for repo in repos if (repo.repo_type, repo.repo_id) == ("model", hub_id.repo)]
    for revision in [revision for repo in named for revision in repo.revisions]:
        if wanted in revision.refs or wanted == revision.commit_hash:
            root = revision.snapshot_path
            return {file.file_path.relative_to(root).as_posix(): file.file_path for file in revision.files}
    raise DownloadError(f"{hub_id} is not in the hub's cache, and offline mode is on: no download was tried")


@contextmanager
def _hub_errors(hub: ModuleType, hub_id: HubId) -> Iterator[None]:
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id.repo}, "
            "then set HF_TOKEN to a token of yours"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{hub_id}: neither a file here nor a repository on the Hugging Face Hub. "
            "If the repository is private, set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{hub_id}: {hub_id.repo} has no revision {hub_id.revision}") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{hub_id} is not a valid id of the Hugging Face Hub: {error}") from error
    except Exception as error:  # its transport, and with it the rest of what it raises, differs by version
        raise DownloadError(
            f"cannot download {hub_id} from the Hugging Face Hub: {error}. If this machine is offline, "
            "set HF_HUB_OFFLINE=1 to use what is cached; to use a mirror, set HF_ENDPOINT"
        ) from error
