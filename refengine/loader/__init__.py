"""Loader: from a name or a path to a Checkpoint, whose tensors nobody has read yet."""

from __future__ import annotations

from refengine.loader.catalogue import resolve
from refengine.loader.checkpoint import Checkpoint
from refengine.loader.gguf import read_gguf
from refengine.loader.metadata import Metadata
from refengine.loader.progress import Progress


def open(name: str, *, progress: Progress | None = None, offline: bool = False) -> Checkpoint:
    """Open a model by catalogue name, path or hub id; see ``resolve`` and ``read_gguf``."""
    return read_gguf(resolve(name, progress=progress, offline=offline))


__all__ = ["Checkpoint", "Metadata", "Progress", "open", "read_gguf", "resolve"]
