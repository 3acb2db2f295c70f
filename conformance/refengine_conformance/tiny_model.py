"""Tiny random models made in memory, for whoever needs a model and not a file."""

from __future__ import annotations

import numpy as np

from refengine.models import LayerSpec, Model, ModelSpec, RopeSpec
from refengine.models.model import OPTIONAL, expected_shapes
from refengine.quantizer import LazyTensor


def tiny_model(family: str = "llama", *, layers: int = 3, vocabulary_size: int = 97, seed: int = 0) -> Model:
    """A random model: ``llama`` plain, ``gemma3`` with windows, norms of every kind and caps."""
    gemma = family == "gemma3"
    rope = RopeSpec((1.0, 0.3, 0.1, 0.03), "halves" if gemma else "interleaved")
    spec = ModelSpec(
        architecture=family,
        vocabulary_size=vocabulary_size,
        hidden_size=24,
        context_length=256,
        layers=tuple(
            LayerSpec(
                heads=4,
                kv_heads=2,
                head_size=8,
                ffn_size=40,
                rope=rope,
                attention_scale=8**-0.5,
                window=5 if gemma and i % 3 != 2 else None,
                attention_softcap=20.0 if gemma else None,
            )
            for i in range(layers)
        ),
        norm_epsilon=1e-5,
        activation="gelu_tanh" if gemma else "silu",
        embedding_scale=24**0.5 if gemma else 1.0,
        logit_softcap=30.0 if gemma else None,
        tied_embeddings=gemma,
    )
    rng = np.random.default_rng(seed)
    weights = {}
    for role, shape in expected_shapes(spec).items():
        kind = role.rpartition(".")[2]
        if kind in OPTIONAL and not (gemma and kind.endswith("norm")):
            continue
        values = rng.standard_normal(shape) * (0.3 if len(shape) == 2 else 0.1) + ("norm" in kind)
        weights[role] = LazyTensor(role, shape, "f32", values.astype("<f4").view(np.uint8))
    return Model(spec, weights)
