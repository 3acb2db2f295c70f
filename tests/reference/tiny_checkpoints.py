"""Random tiny checkpoints of every family, each held twice: as a Transformers model and as a GGUF file.

Both hold exactly the same weights: a matrix is drawn, encoded with `gguf.quants` and written, and what it
decodes to goes into the Transformers model. Numbers that a file stores in float32 (epsilon, RoPE base,
factors) are float32 numbers in the config too. Whatever differs between refengine on the file and
Transformers on the model is therefore arithmetic, or a bug. What the reference's arithmetic is: see
`transformers_reference`.

Matrices this small are multiplied faster by one thread (`torch.set_num_threads(1)`) than by two.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from reference import tiny_vocabularies
from reference.gguf_conventions import (
    FAMILIES,
    gemma_rope,
    hyperparameters,
    rope_factors,
    row_order,
    stored_names,
)
from reference.transformers_reference import load_gguf_reference, reference_greedy, reference_logits
from transformers import AutoModelForCausalLM, PreTrainedModel

__all__ = [
    "VARIANTS",
    "TinyModel",
    "load_gguf_reference",
    "make_tiny",
    "reference_greedy",
    "reference_logits",
]


@dataclass(frozen=True)
class TinyModel:
    """One checkpoint: `model` (float32, eval mode, eager attention) and `gguf_path` hold the same weights."""

    name: str
    family: str
    model: PreTrainedModel
    gguf_path: Path
    vocabulary_size: int
    notes: str


@dataclass(frozen=True)
class _Variant:
    """One row of the table."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)  # for the family's config class, over _SIZES
    keys: Mapping[str, Any] = field(default_factory=dict)  # over the converter's keys; None leaves one out
    encoding: str = "F32"  # of the matrices
    embedding: str | None = None  # of token_embd, where it isn't `encoding`
    architecture: str | None = None  # general.architecture, where it isn't the family's
    notes: str = ""


def _float32(number: float) -> float:
    """The number as a float32 in a file gives it back."""
    return float(np.float32(number))


_SIZES: Mapping[str, Any] = {
    "hidden_size": 48,  # no multiple of 32, nor is its root a float32
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": _float32(1e-6),
    "tie_word_embeddings": False,
}
_BLOCKS = {"hidden_size": 64, "intermediate_size": 96}  # rows of whole 32-weight blocks, heads of 16 and 32
_GEMMA = {
    "tie_word_embeddings": True,
    "num_hidden_layers": 7,  # by sixes: five sliding, one full, one sliding
    "sliding_window": 8,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
}
_SLIDING_LAYERS = [False, True, True, False, False, True, True]

_TABLE: Mapping[str, _Variant] = {
    # -- llama
    "llama": _Variant(
        "llama", {"rms_norm_eps": _float32(1e-5)}, notes="grouped-query attention, 4 heads on 2"
    ),
    "llama-mha": _Variant(
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        # What files of 2023 leave out.
        keys={
            "llama.attention.head_count_kv": None,
            "llama.attention.key_length": None,
            "llama.attention.value_length": None,
            "llama.rope.freq_base": None,
            "llama.rope.dimension_count": None,
            "llama.vocab_size": None,
        },
        notes="multi-head attention; every optional key is absent",
    ),
    "llama-mqa": _Variant("llama", {"num_key_value_heads": 1, "head_dim": 40}, notes="one K/V head, size 40"),
    "llama-tied": _Variant(
        "llama", {"tie_word_embeddings": True}, notes="no output.weight: it is token_embd"
    ),
    "llama-bias": _Variant(
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        notes="biases on all seven linears; those of q and k are permuted like their rows",
    ),
    "llama-linear": _Variant(
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
        notes="positions divided by 4",
    ),
    "llama-llama3": _Variant(
        "llama",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        notes="rope_freqs.weight divides the frequencies: kept, smoothed and divided ones",
    ),
    "llama-yarn": _Variant(
        "llama",
        {
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        notes="YaRN with the default betas, 32 and 1; cos and sin times 0.1 ln 4 + 1",
    ),
    "llama-f16": _Variant("llama", encoding="F16"),
    "llama-bf16": _Variant("llama", encoding="BF16"),
    "llama-q4_1": _Variant(
        "llama",
        _BLOCKS | {"tie_word_embeddings": True},
        encoding="Q4_1",
        embedding="Q8_0",
        notes="the mixture of SmolLM2's file",
    ),
    "llama-q5_1": _Variant("llama", _BLOCKS, encoding="Q5_1"),
    # -- mistral
    "mistral": _Variant("mistral", {"sliding_window": None, "head_dim": 40}, notes="architecture `llama`"),
    "mistral-named": _Variant(
        "mistral",
        {"sliding_window": None},
        architecture="mistral",
        notes="architecture `mistral`: no converter writes it, llama.cpp refuses it",
    ),
    "mistral3": _Variant(
        "mistral",
        {"sliding_window": None},
        architecture="mistral3",
        notes="architecture `mistral3`, as Mistral3Model writes Mistral Small 3.1; otherwise as `llama`",
    ),
    "mistral-window": _Variant(
        "mistral",
        {"sliding_window": 8},
        keys={"llama.attention.sliding_window": 8},
        notes="every layer slides; no converter writes the key for `llama`, and llama.cpp ignores it there",
    ),
    "mistral-q4_0": _Variant("mistral", _BLOCKS | {"sliding_window": None, "head_dim": 32}, encoding="Q4_0"),
    # -- qwen2
    "qwen2": _Variant("qwen2", notes="biases on q, k and v"),
    "qwen2-tied": _Variant("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-yarn": _Variant(
        "qwen2",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
            },
        },
        notes="YaRN with betas in the file, which llama.cpp doesn't read for this architecture",
    ),
    "qwen2-q5_0": _Variant("qwen2", _BLOCKS, encoding="Q5_0"),
    # -- qwen3
    "qwen3": _Variant("qwen3", {"head_dim": 24}, notes="q and k norms; 4 heads of 24 on a width of 48"),
    "qwen3-tied": _Variant("qwen3", {"head_dim": 40, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3-q8_0": _Variant("qwen3", _BLOCKS | {"head_dim": 32}, encoding="Q8_0"),
    # -- gemma3
    "gemma3": _Variant(
        "gemma3",
        _GEMMA | {"rope_parameters": gemma_rope()},
        # Older files (the 270M of the tests, too) lack the local base, which is then 10000.
        keys={"gemma3.rope.freq_base_swa": None},
        notes="neither the layer pattern (6) nor the local RoPE base (10000) is in the file",
    ),
    "gemma3-pattern": _Variant(
        "gemma3",
        _GEMMA
        | {
            "sliding_window_pattern": 2,
            "head_dim": 40,
            "query_pre_attn_scalar": 40,
            "rope_parameters": gemma_rope(local=500.0),
        },
        # A period: layer i is full where i % period == period - 1 (llama_hparams::set_swa_pattern). For
        # gemma3 the key is read (llama_model_base::load_swa_pattern) but not written by the converter.
        keys={"gemma3.attention.sliding_window_pattern": 2},
        notes="every second layer full; local base 500",
    ),
    "gemma3-layers": _Variant(
        "gemma3",
        _GEMMA
        | {
            "layer_types": [f"{'sliding' if slides else 'full'}_attention" for slides in _SLIDING_LAYERS],
            "rope_parameters": gemma_rope(),
        },
        # One flag a layer, true where it slides, as gemma3n's converter writes it; load_swa_pattern reads
        # either kind.
        keys={"gemma3.attention.sliding_window_pattern": _SLIDING_LAYERS},
        notes="a pattern without a period",
    ),
    "gemma3-linear": _Variant(
        "gemma3",
        _GEMMA | {"rope_parameters": gemma_rope(rope_type="linear", factor=8.0)},
        notes="full layers divide positions by 8, as 4B and larger do; sliding layers don't",
    ),
    "gemma3-softcap": _Variant(
        "gemma3", _GEMMA | {"final_logit_softcapping": 3.0, "rope_parameters": gemma_rope()}
    ),
    "gemma3-full": _Variant(
        "gemma3",
        _GEMMA | {"sliding_window_pattern": 1, "num_hidden_layers": 2, "rope_parameters": gemma_rope()},
        keys={"gemma3.attention.sliding_window": None, "gemma3.rope.freq_base_swa": None},
        notes="pattern 1: no layer slides, and the file has no window",
    ),
    "gemma3-27b": _Variant(
        "gemma3",
        _GEMMA | {"num_hidden_layers": 62, "query_pre_attn_scalar": 12, "rope_parameters": gemma_rope()},
        notes="62 layers: llama.cpp knows the 27B by them and scales by √(hidden / heads), not √head_dim",
    ),
    "gemma3-q8_0": _Variant(
        "gemma3",
        _GEMMA
        | _BLOCKS
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "rope_parameters": gemma_rope(),
        },
        keys={"gemma3.rope.freq_base_swa": None},
        encoding="Q8_0",
        notes="heads of 256, as all released sizes but the 27B have them",
    ),
}

VARIANTS: tuple[str, ...] = tuple(_TABLE)

_VOCABULARIES: Mapping[str, Mapping[str, Any]] = {
    "llama": tiny_vocabularies.BYTE_LEVEL,
    "mistral": tiny_vocabularies.MISTRAL,
    "qwen2": tiny_vocabularies.BYTE_LEVEL,
    "qwen3": tiny_vocabularies.BYTE_LEVEL,
    "gemma3": tiny_vocabularies.GEMMA,
}


def make_tiny(variant: str, directory: Path, seed: int = 0) -> TinyModel:
    """Draw the weights of `variant` and write ``directory/<variant>.gguf``; a seed gives the same bytes."""
    row = _TABLE[variant]
    family, vocabulary = FAMILIES[row.family], _VOCABULARIES[row.family]
    size = len(vocabulary["tokenizer.ggml.tokens"])
    config = family.config(**{**_SIZES, **row.config, "vocab_size": size})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()

    path = directory / f"{variant}.gguf"
    architecture = row.architecture or family.architecture
    writer = gguf.GGUFWriter(path, architecture)
    file_type = "ALL_F32" if row.encoding == "F32" else f"MOSTLY_{row.encoding}"
    keys = {
        "general.type": "model",
        "general.name": f"tiny {variant}",
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        **hyperparameters(config, architecture),
        **row.keys,
        **vocabulary,
    }
    for key, value in keys.items():
        if value is not None:
            _add_key(writer, key, value)

    if (factors := rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = stored_names(model, family)
    rng = np.random.default_rng([seed, zlib.crc32(variant.encode())])
    for name, parameter in model.named_parameters():
        matrix = (row.embedding or row.encoding) if "embed_tokens" in name else row.encoding
        encoding = gguf.GGMLQuantizationType[matrix if parameter.ndim == 2 else "F32"]
        data = gguf.quantize(_draw(name, tuple(parameter.shape), rng), encoding)
        held = gguf.dequantize(data, encoding)
        if name.endswith("norm.weight"):
            held = held - np.float32(family.norm_shift)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(held))
        writer.add_tensor(names[name], data[row_order(name, len(data), config, family)], raw_dtype=encoding)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(variant, row.family, model, path, size, row.notes)


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Weights of a scale at which activations stay near one and logits spread over a few units."""
    noise = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        values = np.clip(1 + 0.25 * noise, 0.5, 2)  # where taking away one, as Gemma's does, is exact
    elif name.endswith(".bias") or "embed_tokens" in name:
        values = 0.35 * noise
    else:
        gain = 2.0 if "lm_head" in name else 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
        values = gain * noise / math.sqrt(shape[-1])
    return values.astype(np.float32)


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one key with the converter's value types: uint32, float32, bool, string or array."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
