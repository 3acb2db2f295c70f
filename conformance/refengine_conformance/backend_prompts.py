"""Prompts for tiny models of every family, as properties of backends draw them."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import strategies as st

from refengine.models import Model
from refengine.models.families import FAMILIES
from refengine.quantizer import LazyTensor
from refengine_conformance.prompts import Prompts
from refengine_conformance.tiny_model import tiny_model


@cache
def _tiny(family: str, seed: int) -> Model:
    return tiny_model(family, layers=3, seed=seed)


MODELS = st.builds(_tiny, st.sampled_from(sorted(FAMILIES)), st.integers(0, 4))


@cache
def _stored(family: str, seed: int, vocabulary_size: int) -> Model:
    """A tiny model, half of whose weights are stored in 16 bits."""
    model = tiny_model(family, layers=2, seed=seed, vocabulary_size=vocabulary_size)
    weights = dict(model.weights)
    for role in sorted(weights)[::2]:
        half = weights[role].decode().astype("<f2").view(np.uint8)
        weights[role] = LazyTensor(weights[role].name, weights[role].shape, "f16", half)
    return Model(model.spec, weights)


STORED_MODELS = st.builds(
    _stored, st.sampled_from(sorted(FAMILIES)), st.integers(0, 1), st.sampled_from([97, 90_001])
)
"""Some with embeddings of more than one tile of ``linear``."""

LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=3)


@st.composite
def prompts(
    draw: st.DrawFn,
    lengths: st.SearchStrategy[list[int]] = LENGTHS,
    models: st.SearchStrategy[Model] = MODELS,
) -> Prompts:
    """Prompts of random tokens, in blocks of any size and order."""
    model = draw(models)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = tuple(tuple(rng.integers(0, model.spec.vocabulary_size, n).tolist()) for n in draw(lengths))
    return Prompts(model, ids, draw(st.sampled_from([1, 4, 5, 16])), order=draw(st.integers(0, 9)))
