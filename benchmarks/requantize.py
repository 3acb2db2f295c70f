"""A GGUF file with its matrices in another encoding: everything else as it was.

    python benchmarks/requantize.py MODEL TARGET --encoding q4_0 [--all]

For comparisons on the encodings that a peer serves best. The matrices of the layers are decoded (refengine's
loader) and quantized again by the ``gguf`` package, nobody's kernels of this project; metadata, tokenizer and
norms are copied. The embedding and the output matrix keep the encoding that they have, unless ``--all`` is
given: llama-quantize too leaves more bits to them (Q6_K, or Q8_0 where rows are not whole blocks of 256, as
in SmolLM2, whose tied embedding is Q8_0 already).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refengine import loader
from refengine.loader.gguf import NUMBERS
from refengine.loader.gguf_writer import OutgoingTensor, WritableValue, write_gguf
from refengine.quantizer import LazyTensor, encoding

FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}
"""``general.file_type`` of files with mostly this encoding; the encodings that ``gguf`` can write."""

WIDER = ("token_embd.weight", "output.weight")
"""Matrices that keep their encoding."""

ROWS = 4096
"""Rows quantized at once."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", help="a name in the catalogue, or a path")
    arguments.add_argument("target", type=Path)
    arguments.add_argument("--encoding", choices=FILE_TYPES, default="q4_0")
    arguments.add_argument("--all", action="store_true", help="the embedding and the output matrix too")
    arguments.add_argument("--force", action="store_true", help="replace TARGET where it exists")
    options = arguments.parse_args()
    source = loader.open(options.model)
    n_bytes = requantize(
        source, options.target, options.encoding, everything=options.all, overwrite=options.force
    )
    print(f"{options.target}: {n_bytes:,} bytes, from {source.file_bytes:,}")


def requantize(
    source: loader.Checkpoint, target: Path, name: str, *, everything: bool = False, overwrite: bool = False
) -> int:
    """Write ``source`` with its matrices in the encoding ``name``; returns the size of the file in bytes.

    Args:
        source: an opened file.
        target: where the new one goes.
        name: one of ``FILE_TYPES``.
        everything: whether the embedding and the output matrix are changed too.
        overwrite: whether a file that is there is replaced.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    metadata = stored_metadata(source) | {"general.file_type": np.uint32(FILE_TYPES[name])}
    kept = () if everything else WIDER
    tensors = [_outgoing(tensor, name, kept) for tensor in source.tensors.values()]
    return write_gguf(target, metadata, tensors, overwrite=overwrite)


def stored_metadata(source: loader.Checkpoint) -> dict[str, WritableValue]:
    """Key-values with the types that they have in the file, which tells them before each value."""
    values: dict[str, WritableValue] = {}
    with source.path.open("rb") as file:
        for key, value in source.metadata.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                values[key] = value
                continue
            file.seek((source.metadata.offset(key) or 0) - 4)
            values[key] = NUMBERS[int.from_bytes(file.read(4), "little")].type(value)
    return values


def _outgoing(tensor: LazyTensor, name: str, kept: tuple[str, ...]) -> OutgoingTensor:
    whole = tensor.shape[-1] % encoding(name).block_size == 0
    if len(tensor.shape) < 2 or tensor.name in kept or not whole:
        return OutgoingTensor(tensor.name, tensor.shape, tensor.encoding, [tensor.data])
    return OutgoingTensor(tensor.name, tensor.shape, name, _Chunks(partial(_quantized, tensor, name)))


class _Chunks:
    """Made when they are asked for, so that one tensor at a time is held decoded."""

    def __init__(self, make: partial[Iterator[NDArray[np.uint8]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return self._make()


def _quantized(tensor: LazyTensor, name: str) -> Iterator[NDArray[np.uint8]]:
    import gguf

    kind = gguf.GGMLQuantizationType[name.upper()]
    for start in range(0, tensor.shape[0], ROWS):
        rows = tensor[np.arange(start, min(start + ROWS, tensor.shape[0]))]
        yield np.ascontiguousarray(gguf.quants.quantize(rows, kind)).view(np.uint8)


if __name__ == "__main__":
    main()
