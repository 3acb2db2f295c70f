"""The shapes of real models: everything about them but their weights and their words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType

from refengine.errors import RequestError

MAX_LAYERS, MAX_COUNT, MAX_VOCABULARY = 4096, 2**31 - 1, 2**22
"""No model comes near these."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes and constants.

    Attributes:
        name: what a user calls it.
        title: the model whose shape it is.
        architecture: GGUF's name for the family.
        layers, hidden_size, ffn_size: as in ``refengine.models.ModelSpec``.
        heads, kv_heads, head_size: of every layer's attention.
        vocabulary_size: number of tokens.
        vocabulary: which kind, a name in ``vocabulary.VOCABULARIES``.
        context_length: positions the model was made for.
        rope_base: RoPE's base.
        norm_epsilon: what RMS norm adds.
        tied_embeddings: whether the embedding is the output matrix as well.
        window: positions that a local layer sees, or ``None``.
    """

    name: str
    title: str
    architecture: str
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    vocabulary: str
    context_length: int
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    window: int | None = None

    def resized(
        self,
        *,
        layers: int | None = None,
        context_length: int | None = None,
        vocabulary_size: int | None = None,
    ) -> Shape:
        """The shape with other sizes, where they are given.

        Raises:
            RequestError: a size is not positive, or beyond what the format holds.
        """

        def chosen(what: str, given: int | None, own: int, most: int) -> int:
            if given is not None and not 0 < given <= most:
                raise RequestError(f"{what} must be between 1 and {most:,}, but is {given:,}")
            return own if given is None else given

        return replace(
            self,
            layers=chosen("the number of layers", layers, self.layers, MAX_LAYERS),
            context_length=chosen("the context", context_length, self.context_length, MAX_COUNT),
            vocabulary_size=chosen("the vocabulary", vocabulary_size, self.vocabulary_size, MAX_VOCABULARY),
        )


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            # meta-llama/Llama-2-7b-hf and Llama-2-13b-hf, config.json; arXiv:2307.09288
            Shape("llama-2-7b", "Llama 2 7B", "llama", 32, 4096, 11008, 32, 32, 128, 32000, "llama", 4096),
            Shape("llama-2-13b", "Llama 2 13B", "llama", 40, 5120, 13824, 40, 40, 128, 32000, "llama", 4096),
            # meta-llama/Meta-Llama-3-8B, config.json; arXiv:2407.21783
            Shape(
                "llama-3-8b", "Llama 3 8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, "llama-3", 8192,
                rope_base=500000.0,
            ),
            # no model of its own: Llama 3.2 1B's layers (meta-llama/Llama-3.2-1B, config.json) with Llama 2's
            # vocabulary and an output matrix, 1.1 billion weights as TinyLlama has
            Shape(
                "llama-1b", "a llama of 1.1 billion weights", "llama", 16, 2048, 8192, 32, 8, 64, 32000,
                "llama", 4096,
            ),
            # TinyLlama/TinyLlama-1.1B-Chat-v1.0, config.json; arXiv:2401.02385
            Shape(
                "tinyllama-1.1b", "TinyLlama 1.1B", "llama", 22, 2048, 5632, 32, 4, 64, 32000, "llama", 2048,
            ),
            # mistralai/Mistral-7B-v0.3, config.json (no sliding window from v0.2 on); arXiv:2310.06825
            Shape(
                "mistral-7b", "Mistral 7B v0.3", "llama", 32, 4096, 14336, 32, 8, 128, 32768, "llama", 32768,
                rope_base=1000000.0,
            ),
            # HuggingFaceTB/SmolLM2-135M-Instruct, config.json; arXiv:2502.02737
            Shape(
                "smollm2-135m", "SmolLM2 135M", "llama", 30, 576, 1536, 9, 3, 64, 49152, "smollm", 8192,
                rope_base=100000.0, tied_embeddings=True,
            ),
            # Qwen/Qwen3-0.6B, config.json; arXiv:2505.09388
            Shape(
                "qwen3-0.6b", "Qwen3 0.6B", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, "qwen", 40960,
                rope_base=1000000.0, norm_epsilon=1e-6, tied_embeddings=True,
            ),
            # google/gemma-3-270m, config.json; arXiv:2503.19786
            Shape(
                "gemma3-270m", "Gemma 3 270M", "gemma3", 18, 640, 2048, 4, 1, 256, 262144, "gemma", 32768,
                rope_base=1000000.0, norm_epsilon=1e-6, tied_embeddings=True, window=512,
            ),
        )
    }
)  # fmt: skip
"""By name; above each, the published configuration that its numbers are from."""


def shape(name: str) -> Shape:
    """The shape called ``name``.

    Raises:
        RequestError: no shape has this name; the text lists near matches and all names.
    """
    if name in SHAPES:
        return SHAPES[name]
    near = get_close_matches(name.lower(), SHAPES)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise RequestError(f"there is no shape {name!r}{hint} (there are {', '.join(SHAPES)})")
