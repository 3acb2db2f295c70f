"""From a checkpoint to a Model: names become roles, and what is missing, wrong or unknown is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.errors import FormatError, UnsupportedError
from refengine.loader import Checkpoint, Metadata
from refengine.models import build
from refengine.models.rope import YarnScaling, linear_frequencies, plain_frequencies, yarn_frequencies
from refengine.quantizer import LazyTensor

HYPER: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}

SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (32, 16), "output_norm.weight": (16,)} | {
    f"blk.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {
        "attn_norm": (16,),
        "attn_q": (16, 16),
        "attn_k": (8, 16),
        "attn_v": (8, 16),
        "attn_output": (16, 16),
        "ffn_norm": (16,),
        "ffn_gate": (24, 16),
        "ffn_up": (24, 16),
        "ffn_down": (16, 24),
    }.items()
}


def checkpoint(hyper: dict[str, Any] = HYPER, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Checkpoint:
    tensors = {
        name: LazyTensor(name, shape, "f32", np.zeros((*shape[:-1], shape[-1] * 4), np.uint8))
        for name, shape in shapes.items()
    }
    offsets = {key: 100 + i for i, key in enumerate(hyper)}
    return Checkpoint(Path("tiny.gguf"), "gguf", Metadata(hyper, offsets=offsets), tensors, 0)


def test_a_plain_llama() -> None:
    """Defaults: head size from the width, RoPE over whole heads with base 10,000, scores over √size, tied."""
    spec = build(checkpoint()).spec
    layer = spec.layers[1]
    assert (layer.heads, layer.kv_heads, layer.head_size, layer.ffn_size) == (4, 2, 4, 24)
    assert layer.rope.frequencies == (1.0, 0.01)
    assert layer.rope.pairing == "interleaved"
    assert layer.attention_scale == 0.5
    assert (spec.vocabulary_size, spec.tied_embeddings, len(spec.kv_groups)) == (32, True, 1)


def test_head_counts_may_differ_by_layer() -> None:
    """Counts given as arrays are taken layer by layer."""
    hyper = HYPER | {"llama.attention.head_count_kv": np.array([2, 4], "<u4")}
    shapes = SHAPES | {"blk.1.attn_k.weight": (16, 16), "blk.1.attn_v.weight": (16, 16)}
    assert [layer.kv_heads for layer in build(checkpoint(hyper, shapes)).spec.layers] == [2, 4]


BROKEN: dict[str, tuple[Callable[[dict, dict], Any], type[Exception], str]] = {
    "unknown architecture": (lambda h, s: h.update({"general.architecture": "lama"}), UnsupportedError, "'llama'"),
    "no architecture": (lambda h, s: h.pop("general.architecture"), FormatError, "general.architecture"),
    "no block count": (lambda h, s: h.pop("llama.block_count"), FormatError, "block_count"),
    "zero layers": (lambda h, s: h.update({"llama.block_count": 0}), FormatError, "block_count"),
    "a billion layers": (lambda h, s: h.update({"llama.block_count": 10**9}), FormatError, "block_count"),
    "text for a number": (lambda h, s: h.update({"llama.block_count": "2"}), FormatError, "an integer"),
    "zero heads": (lambda h, s: h.update({"llama.attention.head_count": 0}), FormatError, "head_count"),
    "heads that leave a rest": (lambda h, s: h.update({"llama.attention.head_count": 3}), FormatError, "divide"),
    "kv heads that leave a rest": (lambda h, s: h.update({"llama.attention.head_count_kv": 3}), FormatError, "divide"),
    "NaN epsilon": (
        lambda h, s: h.update({"llama.attention.layer_norm_rms_epsilon": float("nan")}), FormatError, "finite"),
    "odd rotary size": (lambda h, s: h.update({"llama.rope.dimension_count": 3}), FormatError, "even"),
    "rotary size beyond the head": (lambda h, s: h.update({"llama.rope.dimension_count": 6}), FormatError, "at most"),
    "unknown scaling": (lambda h, s: h.update({"llama.rope.scaling.type": "longrope"}), UnsupportedError, "longrope"),
    "scaling without factor": (lambda h, s: h.update({"llama.rope.scaling.type": "yarn"}), FormatError, "factor"),
    "a key nobody reads": (lambda h, s: h.update({"llama.expert_count": 8}), UnsupportedError, "expert_count"),
    "counts of the wrong length": (
        lambda h, s: h.update({"llama.feed_forward_length": np.array([24], "<u4")}), FormatError, "2 of them"),
    "missing tensor": (lambda h, s: s.pop("blk.1.ffn_up.weight"), FormatError, r"layers\.1\.up"),
    "missing embedding": (lambda h, s: s.pop("token_embd.weight"), FormatError, "token_embd"),
    "wrong shape": (lambda h, s: s.update({"blk.0.attn_k.weight": (16, 16)}), FormatError, r"\[8, 16\]"),
    "unknown tensor": (lambda h, s: s.update({"blk.0.ffn_gate_exps.weight": (24, 16)}), UnsupportedError, "exps"),
    "layer too many": (lambda h, s: s.update({"blk.2.attn_norm.weight": (16,)}), UnsupportedError, "beyond"),
    "rope factors of the wrong length": (lambda h, s: s.update({"rope_freqs.weight": (3,)}), FormatError, "rope_freqs"),
    "rope factors of zero": (lambda h, s: s.update({"rope_freqs.weight": (2,)}), FormatError, "positive"),
    "qwen2 without biases": (
        lambda h, s: (h.update({k.replace("llama.", "qwen2."): v for k, v in list(h.items())}),
                      h.update({"general.architecture": "qwen2"})), FormatError, "bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named(name: str) -> None:
    """Each is one clear error that names the key or the tensor."""
    breaking, error, text = BROKEN[name]
    hyper, shapes = dict(HYPER), dict(SHAPES)
    breaking(hyper, shapes)
    with pytest.raises(error, match=text):
        build(checkpoint(hyper, shapes))


def test_an_error_about_a_key_knows_its_offset() -> None:
    """The byte offset of the value that is wrong comes along."""
    with pytest.raises(FormatError) as caught:
        build(checkpoint(HYPER | {"llama.attention.head_count": 3}))
    assert caught.value.offset == 100 + list(HYPER).index("llama.attention.head_count")


def test_scaled_frequencies() -> None:
    """Linear scaling divides all; YaRN leaves the fast ones alone, divides the slow, and is between elsewhere."""
    plain = plain_frequencies(10000.0, 64)
    assert np.array_equal(linear_frequencies(10000.0, 64, 4.0), plain / 4)
    scaling = YarnScaling(factor=4.0, original_context=2048)
    ratio = yarn_frequencies(10000.0, 64, scaling) / plain
    rotations = 2048 * plain / (2 * np.pi)
    assert np.array_equal(ratio[rotations > 40], np.ones((rotations > 40).sum()))
    assert np.array_equal(ratio[rotations < 0.7], np.full((rotations < 0.7).sum(), 0.25))
    assert (np.diff(ratio) <= 0).all()
