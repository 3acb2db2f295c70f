"""What every loader returns: a model file, opened but not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refengine.loader.metadata import Metadata
from refengine.quantizer.tensor import LazyTensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model file: hyper-parameters and tokenizer data, and tensors nobody has read yet.

    Attributes:
        path: the file.
        format: the container's name, ``"gguf"``.
        metadata: the file's key-values.
        tensors: immutable mapping from a tensor's name in the file to its bytes, in file order.
        file_bytes: size of the file.
    """

    path: Path
    format: str
    metadata: Metadata
    tensors: Mapping[str, LazyTensor]
    file_bytes: int
