"""ModelSpec: everything about a decoder that is not a weight, as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from refengine.ops import Activation, Pairing


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding.

    Attributes:
        frequencies: radians per position of each pair; twice their number is how many elements rotate.
        pairing: which elements form a pair.
        magnitude: factor on cosine and sine (YaRN's attention factor).
    """

    frequencies: tuple[float, ...]
    pairing: Pairing
    magnitude: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; divides ``heads``.
        head_size: elements of a head.
        ffn_size: width of the feed-forward network.
        rope: the rotary embedding of this layer.
        attention_scale: factor on ``q · k``.
        window: positions a query sees, itself included; ``None`` for all.
        attention_softcap: cap of the scores, ``None`` for none.
    """

    heads: int
    kv_heads: int
    head_size: int
    ffn_size: int
    rope: RopeSpec
    attention_scale: float
    window: int | None = None
    attention_softcap: float | None = None


@dataclass(frozen=True)
class KVGroup:
    """Layers that share block tables, because they see the same window.

    Attributes:
        window: their window.
        layers: their numbers, ascending.
    """

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        architecture: the family's name in the checkpoint.
        vocabulary_size: rows of the embedding, and length of the logits.
        hidden_size: width of the residual stream.
        context_length: positions the model was made for.
        layers: one spec per layer.
        norm_epsilon: inside the root of every RMS norm.
        activation: of the gated feed-forward network.
        embedding_scale: factor on token embeddings.
        logit_softcap: cap of the logits, ``None`` for none.
        tied_embeddings: whether the output projection is the embedding table.
    """

    architecture: str
    vocabulary_size: int
    hidden_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    norm_epsilon: float
    activation: Activation
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    tied_embeddings: bool = False

    @cached_property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The layers by window, in order of first appearance."""
        windows = dict.fromkeys(layer.window for layer in self.layers)
        return tuple(
            KVGroup(w, tuple(i for i, layer in enumerate(self.layers) if layer.window == w)) for w in windows
        )

    def group_of(self, layer: int) -> int:
        """The index of the KV group that a layer belongs to."""
        return next(g for g, group in enumerate(self.kv_groups) if layer in group.layers)
