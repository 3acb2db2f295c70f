"""Tiny random models of every family give Transformers' logits, through the engine and its paged cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference.rounding import UNIT_ROUNDOFF, decoded_weights, deviation
from reference.tiny_checkpoints import VARIANTS, TinyModel, make_tiny, reference_logits

from refengine import Engine, EngineConfig
from refengine.backend import load
from refengine.loader import read_gguf
from refengine.models import Model, build

TOKENS = 48
"""Long enough to leave the windows (8 tokens) of the tiny models far behind."""


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Model]:
    made = make_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return made, build(read_gguf(made.gguf_path))


@pytest.mark.parametrize("policy", ["float64", "float32"])
def test_logits_are_those_of_transformers(tiny: tuple[TinyModel, Model], policy: str) -> None:
    """Engine and Transformers differ by no more than rounding in the policy's precision explains."""
    made, model = tiny
    ids = np.random.default_rng(1).integers(0, made.vocabulary_size, TOKENS).tolist()
    _, float32_deviation = deviation(model, ids, range(TOKENS), decoded_weights(model))
    bound = 2 * float32_deviation * (UNIT_ROUNDOFF[policy] / UNIT_ROUNDOFF["float32"])

    engine = Engine(model, load("numpy"), EngineConfig(policy=policy, token_budget=20, block_size=4))
    ours = engine.prompt_logits(ids)
    theirs = reference_logits(made.model, ids, getattr(torch, policy))
    worst = np.abs(ours - theirs).max(axis=1) / bound
    assert worst.max() <= 1, f"row {worst.argmax()} is off by {worst.max():.3g} of its bound"


def test_a_wrong_constant_exceeds_the_bound(tmp_path: Path) -> None:
    """The bound is tight enough to tell: one RoPE frequency off by a thousandth breaks it."""
    made = make_tiny(VARIANTS[0], tmp_path)
    model = build(read_gguf(made.gguf_path))
    ids = np.random.default_rng(1).integers(0, made.vocabulary_size, TOKENS).tolist()
    exact, float32_deviation = deviation(model, ids, range(TOKENS), decoded_weights(model))
    rope = model.spec.layers[0].rope
    object.__setattr__(rope, "frequencies", (rope.frequencies[0] * 1.001, *rope.frequencies[1:]))
    wrong = Engine(Model(model.spec, model.weights), load("numpy")).prompt_logits(ids)
    assert (np.abs(wrong - exact).max(axis=1) / (2 * float32_deviation)).max() > 1
