"""Families: how a checkpoint's hyper-parameters become a ModelSpec. A family is a mapping, not a copy.

The keys are those of the GGUF document (ggml, ``docs/gguf.md``) and of llama.cpp's converters.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from refengine.errors import UnsupportedError
from refengine.loader.metadata import Metadata
from refengine.models.hyperparameters import HyperParameters
from refengine.models.rope import YarnScaling, linear_frequencies, plain_frequencies, yarn_frequencies
from refengine.models.spec import LayerSpec, ModelSpec, RopeSpec
from refengine.ops import Activation, Pairing

Adjust = Callable[[ModelSpec, HyperParameters], ModelSpec]


@dataclass(frozen=True)
class Family:
    """What tells one architecture from another.

    Attributes:
        pairing: which elements of a head RoPE rotates together, as the converter laid the weights out.
        activation: of the feed-forward network.
        layer_weights: optional roles (see ``model.LAYER_WEIGHTS``) that this family must have.
        adjust: what remains to be said, as a function of the spec built so far.
    """

    pairing: Pairing
    activation: Activation = "silu"
    layer_weights: frozenset[str] = field(default_factory=frozenset)
    adjust: Adjust = lambda spec, hyper: spec


def build_spec(
    metadata: Metadata, *, vocabulary_size: int, tied_embeddings: bool, rope_factors: np.ndarray | None
) -> ModelSpec:
    """The ModelSpec of a checkpoint.

    Args:
        metadata: its key-values.
        vocabulary_size: rows of the embedding tensor.
        tied_embeddings: whether there is no output tensor.
        rope_factors: the tensor ``rope_freqs.weight`` (Llama 3.1 and later), or ``None``.

    Raises:
        UnsupportedError: an architecture or a hyper-parameter that refengine does not implement.
        FormatError: a hyper-parameter is missing, of the wrong type, or impossible.
    """
    hyper = HyperParameters(metadata)
    family = family_of(hyper.architecture)
    layers = _layer_specs(hyper, family, rope_factors)
    spec = ModelSpec(
        architecture=hyper.architecture,
        vocabulary_size=vocabulary_size,
        hidden_size=hyper.count("embedding_length"),
        context_length=hyper.count("context_length"),
        layers=layers,
        norm_epsilon=hyper.positive("attention.layer_norm_rms_epsilon"),
        activation=family.activation,
        tied_embeddings=tied_embeddings,
    )
    spec = family.adjust(spec, hyper)
    hyper.refuse_unread({"expert_count": 0, "expert_used_count": 0, "rope.scaling.finetuned": True})
    return spec


def family_of(architecture: str) -> Family:
    """The family of an architecture's name; unknown names are refused with near matches."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; refengine runs {', '.join(FAMILIES)}.{hint}"
        )
    return FAMILIES[architecture]


def _layer_specs(
    hyper: HyperParameters, family: Family, rope_factors: np.ndarray | None
) -> tuple[LayerSpec, ...]:
    layers = hyper.count("block_count")
    if layers > 4096:
        raise hyper.error("block_count", f"is {layers}: no model has so many layers")
    heads = hyper.counts("attention.head_count", layers)
    kv_heads = (
        hyper.counts("attention.head_count_kv", layers) if "attention.head_count_kv" in hyper else heads
    )
    ffn_sizes = hyper.counts("feed_forward_length", layers)
    hidden = hyper.count("embedding_length")
    if "attention.key_length" not in hyper and hidden % heads[0]:
        raise hyper.error("attention.head_count", f"is {heads[0]}, which does not divide the width {hidden}")
    size = hyper.count("attention.key_length", hidden // heads[0])
    if hyper.count("attention.value_length", size) != size:
        raise UnsupportedError(f"heads with keys of {size} and values of another size are not supported")
    for query, shared in zip(heads, kv_heads, strict=True):
        if query % shared:
            raise hyper.error("attention.head_count_kv", f"is {shared}, which does not divide {query} heads")
    rope = _rope(hyper, family.pairing, size, rope_factors)
    scale = hyper.positive("attention.scale", 1.0 / math.sqrt(size))
    window = hyper.count("attention.sliding_window") if "attention.sliding_window" in hyper else None
    return tuple(
        LayerSpec(
            heads=heads[i],
            kv_heads=kv_heads[i],
            head_size=size,
            ffn_size=ffn_sizes[i],
            rope=rope,
            attention_scale=scale,
            window=window,
        )
        for i in range(layers)
    )


def _rope(hyper: HyperParameters, pairing: Pairing, head_size: int, factors: np.ndarray | None) -> RopeSpec:
    dims = hyper.count("rope.dimension_count", head_size)
    if dims % 2 or dims > head_size:
        raise hyper.error("rope.dimension_count", f"is {dims}: it must be even and at most {head_size}")
    base = hyper.positive("rope.freq_base", 10000.0)
    kind = hyper.string("rope.scaling.type", "linear" if "rope.scaling.factor" in hyper else "none")
    magnitude = 1.0
    if "rope.scale_linear" in hyper:  # before the key rope.scaling.type existed
        frequencies = linear_frequencies(base, dims, hyper.positive("rope.scale_linear"))
    elif kind == "none":
        frequencies = plain_frequencies(base, dims)
    elif kind == "linear":
        frequencies = linear_frequencies(base, dims, hyper.positive("rope.scaling.factor"))
    elif kind == "yarn":
        scaling = YarnScaling(
            factor=hyper.positive("rope.scaling.factor"),
            original_context=hyper.count("rope.scaling.original_context_length"),
            beta_fast=hyper.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=hyper.positive("rope.scaling.yarn_beta_slow", 1.0),
            magnitude=hyper.positive("rope.scaling.attn_factor", 1.0),
        )
        frequencies, magnitude = yarn_frequencies(base, dims, scaling), scaling.attention_factor()
    else:
        raise UnsupportedError(f"RoPE scaling {kind!r} is not supported; there are none, linear and yarn")
    if factors is not None:
        if factors.shape != (dims // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
            raise hyper.error("rope.dimension_count", f"asks for {dims // 2} positive numbers in rope_freqs")
        frequencies = frequencies / factors
    return RopeSpec(tuple(frequencies.tolist()), pairing, magnitude)


def _gemma3(spec: ModelSpec, hyper: HyperParameters) -> ModelSpec:
    """Gemma 3 (arXiv:2503.19786): scaled embeddings, and five local layers to each global one.

    Local layers see a window and rotate with a base of their own, unscaled; only global layers have the
    file's base and scaling. The pattern and the local base are the architecture's constants unless the
    file says otherwise. The 27B model, known by its 62 layers, scales scores by its width per head.
    """
    count = len(spec.layers)
    if "attention.sliding_window" not in hyper:
        local = (False,) * count
    elif isinstance(hyper.metadata.get(f"{hyper.architecture}.attention.sliding_window_pattern"), np.ndarray):
        local = hyper.flags("attention.sliding_window_pattern", count)
    else:
        period = hyper.count("attention.sliding_window_pattern", 6)
        local = tuple((i + 1) % period != 0 for i in range(count))
    base = hyper.positive("rope.freq_base_swa", 10000.0)
    rope = spec.layers[0].rope
    local_rope = RopeSpec(tuple(plain_frequencies(base, 2 * len(rope.frequencies)).tolist()), rope.pairing)
    layers = tuple(
        replace(layer, rope=local_rope) if is_local else replace(layer, window=None)
        for layer, is_local in zip(spec.layers, local, strict=True)
    )
    if "attn_logit_softcapping" in hyper:
        cap = hyper.positive("attn_logit_softcapping")
        layers = tuple(replace(layer, attention_softcap=cap) for layer in layers)
    if count == 62 and "attention.scale" not in hyper:
        layers = tuple(
            replace(layer, attention_scale=math.sqrt(layer.heads / spec.hidden_size)) for layer in layers
        )
    return replace(
        spec,
        layers=layers,
        embedding_scale=math.sqrt(spec.hidden_size),
        logit_softcap=(
            hyper.positive("final_logit_softcapping") if "final_logit_softcapping" in hyper else None
        ),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(pairing="interleaved"),
        "mistral": Family(pairing="interleaved"),
        "mistral3": Family(pairing="interleaved"),
        "qwen2": Family(pairing="halves", layer_weights=frozenset({"q_bias", "k_bias", "v_bias"})),
        "qwen3": Family(pairing="halves", layer_weights=frozenset({"q_norm", "k_norm"})),
        "gemma3": Family(
            pairing="halves",
            activation="gelu_tanh",
            layer_weights=frozenset({"q_norm", "k_norm", "post_attention_norm", "post_ffn_norm"}),
            adjust=_gemma3,
        ),
    }
)
"""Architectures by the name that ``general.architecture`` gives them."""
