"""How a GGUF file says what a Transformers model is: keys, tensor names, row orders and offsets.

These are the conventions of llama.cpp's ``convert_hf_to_gguf.py`` (its package ``conversion``); comments
name the method each comes from, and the default that llama.cpp's loader takes where a key is absent. Tensor
names come from the `gguf` package's own map.

Checked against llama.cpp as llama-cpp-python 0.3.36 has it: for every variant of `tiny_checkpoints` its
converter writes the same tensors bit for bit and the same keys, but for what the variant states, and
its engine gives the float64 logits to 2·10⁻⁵ where weights are float32 (Gemma's to 2·10⁻²: its GELU is
a table in float16). It ignores the sliding window of `mistral-window` and the betas of `qwen2-yarn`,
and refuses `mistral-named`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)


@dataclass(frozen=True)
class Family:
    """What sets a family's files apart."""

    config: type[PretrainedConfig]
    architecture: str  # general.architecture
    tensors: gguf.MODEL_ARCH  # whose tensor names
    interleaved: bool = (
        False  # q's and k's rows are permuted: RoPE's pairs are neighbours (LlamaModel.permute)
    )
    norm_shift: float = 0.0  # what is added to norm weights (Gemma3Model.norm_shift)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(LlamaConfig, "llama", gguf.MODEL_ARCH.LLAMA, interleaved=True),
    # MistralForCausalLM is converted by LlamaModel, as architecture `llama`.
    "mistral": Family(MistralConfig, "llama", gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(Qwen2Config, "qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(Qwen3Config, "qwen3", gguf.MODEL_ARCH.QWEN3),
    "gemma3": Family(Gemma3TextConfig, "gemma3", gguf.MODEL_ARCH.GEMMA3, norm_shift=1.0),
}


def hyperparameters(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The keys that the converter writes for a config, with None for those that it leaves out."""
    keys: dict[str, Any] = {
        # TextModel.set_gguf_parameters, for every architecture
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,  # default: head_count
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": getattr(config, "head_dim", None),  # default: embedding_length / head_count
        "attention.value_length": getattr(config, "head_dim", None),
    }
    # The same method, on RoPE: of the full layers, where sliding ones have their own.
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys["rope.freq_base"] = rope["rope_theta"]  # default: 10000
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]  # default: linear
        keys["rope.scaling.factor"] = rope["factor"]  # default: 1
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        # Default 32 and 1. llama.cpp reads them for mistral3 and grok only, and takes the defaults elsewhere.
        keys["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
        keys["rope.scaling.yarn_beta_slow"] = rope.get("beta_slow")
    if (local := config.rope_parameters.get("sliding_attention")) is not None:
        keys["rope.freq_base_swa"] = local["rope_theta"]  # default: 10000
    if architecture in ("llama", "mistral", "mistral3"):  # LlamaModel.set_gguf_parameters
        keys["vocab_size"] = config.vocab_size
        keys["rope.dimension_count"] = config.head_dim  # default: key_length; it has to equal it
    if architecture == "gemma3":  # Gemma3Model.set_gguf_parameters
        keys["attention.sliding_window"] = config.sliding_window  # default: no layer slides
        keys["final_logit_softcapping"] = config.final_logit_softcapping  # default: none
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def stored_names(model: PreTrainedModel, family: Family) -> dict[str, str]:
    """The GGUF name of each parameter: ``model.layers.0.mlp.up_proj.weight`` is ``blk.0.ffn_up.weight``."""
    names = gguf.get_tensor_name_map(family.tensors, model.config.num_hidden_layers)
    stems = {name: name.rpartition(".") for name, _ in model.named_parameters()}
    return {name: f"{names.get_name(stem)}.{suffix}" for name, (stem, _, suffix) in stems.items()}


def row_order(name: str, rows: int, config: PretrainedConfig, family: Family) -> NDArray[np.intp]:
    """Which row of Transformers' parameter `name` each stored row is.

    The same, but in q and k of an interleaved family: 0, d/2, 1, d/2 + 1, … within a head of size d.
    """
    order = np.arange(rows)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = name.split(".")[-2]
    if not family.interleaved or projection not in heads:
        return order
    return order.reshape(heads[projection], 2, -1).swapaxes(1, 2).ravel()


def rope_factors(config: PretrainedConfig) -> NDArray[np.float32] | None:
    """`rope_freqs.weight` of a llama3 config: what divides each of RoPE's frequencies. None for others.

    LlamaModel.generate_extra_tensors, which works in float32 and so may differ by a few roundings.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def gemma_rope(*, local: float = 10_000.0, **full: Any) -> dict[str, Any]:
    """Gemma's `rope_parameters`: on full layers base 10⁶ and `full`, on sliding ones base `local`."""
    return {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0} | full,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
