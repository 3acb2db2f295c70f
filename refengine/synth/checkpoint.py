"""From a shape and an encoding to a checkpoint with random weights, ready to be written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.errors import RequestError, UnsupportedError
from refengine.loader.gguf_writer import OutgoingTensor, WritableValue
from refengine.loader.metadata import Metadata, Value
from refengine.models.families import build_spec, family_of
from refengine.models.model import LAYER_WEIGHTS, MODEL_WEIGHTS, OPTIONAL, expected_shapes
from refengine.quantizer import ENCODINGS
from refengine.quantizer.encodings import unknown_encoding
from refengine.synth.blocks import RandomWeights
from refengine.synth.mixture import FILE_TYPES, Mixture
from refengine.synth.shapes import Shape
from refengine.synth.vocabulary import tokenizer_metadata

NAMES: Mapping[str, str] = MappingProxyType(
    {role: name for names in (MODEL_WEIGHTS, LAYER_WEIGHTS) for name, role in names.items()}
)
"""A weight's role -> its name in GGUF; of a layer's weights, what follows ``blk.N.``."""

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, eq=False)
class SyntheticCheckpoint:
    """What ``write_gguf`` writes: the metadata, and tensors whose bytes are made when it asks for them."""

    metadata: Mapping[str, WritableValue]
    tensors: tuple[OutgoingTensor, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(tensor.size for tensor in self.tensors)


def synthesize(shape: Shape, encoding: str, *, seed: int = 0, uniform: bool = False) -> SyntheticCheckpoint:
    """A model of this shape with random weights, as a real file of this encoding stores them.

    Matrices have mean 0 and the standard deviation 1 / sqrt(row length), so that a row times a normalized
    vector is about 1 whatever the width, and logits are too; norms are 1. The metadata is complete: the file
    can be inspected, tokenized with and run like any other. The same arguments give the same bytes.

    Args:
        shape: of the model.
        encoding: of its matrices, one of ``FILE_TYPES``, mixed as ``mixture`` says; vectors are f32.
        seed: 0 to 2 ** 64 - 1.
        uniform: give every matrix this encoding, where its rows are whole blocks.

    Raises:
        UnsupportedError: GGUF has no encoding of this name, or rows of the shape are not whole blocks of it.
        RequestError: the seed is out of range, or the vocabulary too small to cover every text.
        FormatError: the shape contradicts itself.
    """
    if encoding not in FILE_TYPES:
        raise _not_written(encoding)
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"the seed must be between 0 and {MAX_SEED}, but is {seed}")
    metadata = _metadata(shape, encoding, seed)
    mixture = Mixture(
        encoding, shape.layers, shape.heads // shape.kv_heads, shape.tied_embeddings, uniform=uniform
    )
    pools = _Pools(seed)
    tensors = []
    for role, size in _shapes(shape, metadata).items():
        name = _name(role)
        if len(size) == 1:  # norms are 1, biases 0
            tensors.append(OutgoingTensor(name, size, "f32", [np.full(size, "norm" in role, "<f4")]))
            continue
        stored = mixture.of(role, size[-1])
        tensors.append(OutgoingTensor(name, size, stored, _Matrix(pools, name, size, stored)))
    return SyntheticCheckpoint(metadata, tuple(tensors))


def _not_written(encoding: str) -> UnsupportedError:
    if encoding in ENCODINGS:
        return UnsupportedError(
            f"GGUF files have no type for {encoding}; choose one of {', '.join(FILE_TYPES)}"
        )
    return unknown_encoding(encoding, FILE_TYPES)


class _Pools:
    """The sources of random weights, one for each encoding and row length, made when they are needed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._sources: dict[tuple[str, int], RandomWeights] = {}

    def source(self, encoding: str, columns: int) -> RandomWeights:
        key = encoding, columns
        if key not in self._sources:
            self._sources[key] = RandomWeights(encoding, 1 / math.sqrt(columns), self.seed)
        return self._sources[key]


@dataclass(frozen=True)
class _Matrix:
    """The bytes of a matrix, made anew each time they are asked for."""

    pools: _Pools
    name: str
    shape: tuple[int, ...]
    encoding: str

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        rows, columns = self.shape
        source = self.pools.source(self.encoding, columns)
        n_bytes = rows * ENCODINGS[self.encoding].row_bytes(columns)
        return source.chunks(n_bytes, source.place(self.name, self.pools.seed))


def _shapes(shape: Shape, metadata: Mapping[str, WritableValue]) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights that the family has, by role."""
    spec = build_spec(
        Metadata({key: _as_read(value) for key, value in metadata.items()}),
        vocabulary_size=shape.vocabulary_size,
        tied_embeddings=shape.tied_embeddings,
        rope_factors=None,
    )
    left_out = OPTIONAL - family_of(shape.architecture).layer_weights
    shapes = expected_shapes(spec)
    return {role: size for role, size in shapes.items() if role.rpartition(".")[2] not in left_out}


def _as_read(value: WritableValue) -> Value:
    """A scalar as a reader of the file has it; arrays, which only the tokenizer needs, become text."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    return value if isinstance(value, str | bool) else "an array"


def _name(role: str) -> str:
    if role in NAMES:
        return NAMES[role]
    _, layer, kind = role.split(".")
    return f"blk.{layer}.{NAMES[kind]}"


def _metadata(shape: Shape, encoding: str, seed: int) -> dict[str, WritableValue]:
    sizes: dict[str, WritableValue] = {
        "vocab_size": np.uint32(shape.vocabulary_size),
        "context_length": np.uint32(shape.context_length),
        "embedding_length": np.uint32(shape.hidden_size),
        "block_count": np.uint32(shape.layers),
        "feed_forward_length": np.uint32(shape.ffn_size),
        "attention.head_count": np.uint32(shape.heads),
        "attention.head_count_kv": np.uint32(shape.kv_heads),
        "attention.key_length": np.uint32(shape.head_size),
        "attention.value_length": np.uint32(shape.head_size),
        "attention.layer_norm_rms_epsilon": np.float32(shape.norm_epsilon),
        "rope.dimension_count": np.uint32(shape.head_size),
        "rope.freq_base": np.float32(shape.rope_base),
    }
    if shape.window is not None:
        sizes["attention.sliding_window"] = np.uint32(shape.window)
    return {
        "general.architecture": shape.architecture,
        "general.type": "model",
        "general.name": f"Random weights in the shape of {shape.title}",
        "general.description": f"Synthetic: weights are random (refengine synth, seed {seed}), tokens are "
        "made up. It is there to measure memory and speed; what it says means nothing.",
        "general.file_type": np.uint32(FILE_TYPES[encoding]),
        "general.quantization_version": np.uint32(2),
        "refengine.synth.shape": shape.name,
        "refengine.synth.seed": np.uint64(seed),
        **{f"{shape.architecture}.{key}": value for key, value in sizes.items()},
        **tokenizer_metadata(shape.vocabulary, shape.vocabulary_size),
    }
