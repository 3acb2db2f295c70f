"""The tiny checkpoints hold what they say they hold, as gguf, Transformers and naive loops see it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from reference.tiny_checkpoints import VARIANTS, TinyModel, make_tiny, reference_logits
from reference.transformers_reference import Lifted
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TOKENS = [7, 300, 41, 41, 12, 255, 99, 180, 263, 8, 301, 77, 5, 290, 31, 44, 160, 2, 270, 19]
FLOAT32_ROUNDOFF = 2.0**-24

# What Transformers' GGUF loader silently leaves out of the config, so that its model computes something else.
LOST: Mapping[str, set[str]] = {
    "llama-bias": {"attention_bias", "mlp_bias"},
    "llama-linear": {"rope_parameters"},
    "llama-llama3": {"rope_parameters"},  # rope_freqs.weight is dropped
    "llama-yarn": {"rope_parameters"},
    "mistral-window": {"sliding_window"},
    "qwen2-yarn": {"rope_parameters"},
    "qwen3": {"head_dim"},
    "qwen3-tied": {"head_dim"},
    "qwen3-q8_0": {"head_dim"},
    "gemma3": {"query_pre_attn_scalar"},  # always 256, the config class's default
    "gemma3-pattern": {"query_pre_attn_scalar", "layer_types", "rope_parameters"},
    "gemma3-layers": {"query_pre_attn_scalar", "layer_types"},
    "gemma3-linear": {"query_pre_attn_scalar", "rope_parameters"},
    "gemma3-softcap": {"query_pre_attn_scalar", "final_logit_softcapping"},
    "gemma3-full": {"query_pre_attn_scalar", "layer_types", "sliding_window"},
    "gemma3-27b": {"query_pre_attn_scalar"},
}
# Architectures it doesn't load at all.
REFUSED = {"mistral-named", "mistral3"}
# Without head_count_kv it leaves the rows of q and k permuted.
LEFT_PERMUTED = {"llama-mha"}
# Its search for tensor names takes a minute with 62 layers.
TOO_SLOW = {"gemma3-27b"}

# What a config says about computing; the rest names, dates and special tokens.
MEANINGFUL = {
    "attention_bias",
    "final_logit_softcapping",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
}

# GGUF stem -> Transformers stem.
STEMS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_name(gguf_name: str, family: str) -> str:
    *block, stem, suffix = gguf_name.split(".")
    if stem == "ffn_norm":  # the norm before the feed-forward, which only Gemma calls so
        translated = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    else:
        translated = STEMS[stem]
    return ".".join([f"model.layers.{block[1]}" if block else "", translated, suffix]).lstrip(".")


def in_transformers_order(stored: np.ndarray, heads: int) -> np.ndarray:
    """Rows 2i and 2i + 1 of each head become rows i and i + d/2."""
    held, size = np.empty_like(stored), len(stored) // heads
    for head in range(heads):
        for i in range(size // 2):
            held[head * size + i] = stored[head * size + 2 * i]
            held[head * size + i + size // 2] = stored[head * size + 2 * i + 1]
    return held


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_in_the_file_is_the_models(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """What GGUFReader reads and gguf decodes is, bit for bit, what the Transformers model holds."""
    checkpoint = tiny(variant)
    config = checkpoint.model.config
    parameters = {name: value.detach().numpy() for name, value in checkpoint.model.named_parameters()}
    for tensor in gguf.GGUFReader(checkpoint.gguf_path).tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        stored = gguf.dequantize(tensor.data, tensor.tensor_type)
        if checkpoint.family in ("llama", "mistral") and ".attn_q." in tensor.name:
            stored = in_transformers_order(stored, config.num_attention_heads)
        if checkpoint.family in ("llama", "mistral") and ".attn_k." in tensor.name:
            stored = in_transformers_order(stored, config.num_key_value_heads)
        held = parameters.pop(transformers_name(tensor.name, checkpoint.family))
        if checkpoint.family == "gemma3" and tensor.name.endswith("norm.weight"):
            held = np.float32(1) + held
        np.testing.assert_array_equal(stored, held, err_msg=tensor.name, strict=True)
    assert not parameters, "parameters that the file lacks"


@pytest.mark.parametrize("variant", VARIANTS)
def test_encodings_are_those_of_the_name(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """A variant named after an encoding has its linear weights in it, another in F32; vectors are F32."""
    named = variant.rpartition("-")[2].upper()
    encodings = gguf.GGMLQuantizationType.__members__
    linear = encodings[named] if named in encodings else encodings["F32"]
    for tensor in gguf.GGUFReader(tiny(variant).gguf_path).tensors:
        if tensor.name != "token_embd.weight":
            assert tensor.tensor_type == (linear if len(tensor.shape) == 2 else encodings["F32"]), tensor.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_key_is_one_of_ggufs(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Every metadata key is spelled as in the gguf package's list."""
    reader = gguf.GGUFReader(tiny(variant).gguf_path)
    architecture = reader.fields["general.architecture"].contents()
    known = {key.replace("{arch}", architecture) for key in every_string(gguf.Keys)}
    written = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert written <= known


def every_string(namespace: type) -> Iterator[str]:
    for name, value in vars(namespace).items():
        if isinstance(value, type):
            yield from every_string(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in REFUSED | TOO_SLOW | LEFT_PERMUTED])
def test_transformers_loads_the_same_model(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Transformers' own GGUF loader finds the same weights and config but for LOST, and then the same logits.

    The logits are equal exactly: the same code runs on the same float32 numbers, with the same alignment.
    """
    checkpoint = tiny(variant)
    directory, file = checkpoint.gguf_path.parent, checkpoint.gguf_path.name
    config = AutoConfig.from_pretrained(directory, gguf_file=file)
    said, expected = config.to_dict(), checkpoint.model.config.to_dict()
    lost = {key for key in MEANINGFUL & said.keys() & expected.keys() if said[key] != expected[key]}
    lost |= {key for key in MEANINGFUL & (expected.keys() - said.keys()) if expected[key] is not None}
    assert lost == LOST.get(variant, set())

    if lost and checkpoint.family != "mistral":  # which it reads as a llama, and can't read as a mistral
        config = checkpoint.model.config
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=file, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    weights = checkpoint.model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    loaded.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    same = np.array_equal(reference_logits(loaded, TOKENS), reference_logits(checkpoint.model, TOKENS))
    assert same == (variant != "mistral-window")


@pytest.mark.parametrize("variant", sorted(REFUSED))
def test_transformers_refuses_mistral_architectures(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Neither `mistral` nor `mistral3` loads: the day one does, it belongs in the test above."""
    path = tiny(variant).gguf_path
    with pytest.raises((NotImplementedError, ValueError), match=r"gguf|GGUF"):
        AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("variant", sorted(LEFT_PERMUTED))
def test_transformers_leaves_rows_permuted(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Without head_count_kv, q and k keep the file's row order: the day they don't, it's the test above."""
    checkpoint = tiny(variant)
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.gguf_path.parent, gguf_file=checkpoint.gguf_path.name, dtype=torch.float32
    )
    weights = checkpoint.model.state_dict()
    different = {name.split(".")[-2] for name, v in loaded.state_dict().items() if not v.equal(weights[name])}
    assert different == {"q_proj", "k_proj"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_spread(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Logits have a standard deviation between one and four, and every position its own."""
    logits = reference_logits(tiny(variant).model, TOKENS)
    assert logits.shape == (len(TOKENS), tiny(variant).vocabulary_size)
    assert logits.dtype == np.float32
    assert 1 < logits.std() < 4
    assert len(np.unique(logits, axis=0)) == len(TOKENS)


@pytest.mark.parametrize("variant", ["mistral-window", "gemma3", "gemma3-pattern", "gemma3-layers"])
def test_the_window_is_crossed(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Twice the window changes nothing before position 8 and everything from it on."""
    model = tiny(variant).model
    wider = copy.deepcopy(model)
    wider.config.sliding_window = 16
    changed = (reference_logits(model, TOKENS) != reference_logits(wider, TOKENS)).any(axis=1)
    assert changed.tolist() == [position >= 8 for position in range(len(TOKENS))]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """A file depends on the variant and the seed only."""
    files = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / folder).mkdir()
        files.append(make_tiny("qwen3", tmp_path / folder, seed).gguf_path.read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("variant", ["llama", "qwen2", "mistral", "gemma3"])
def test_text_survives_the_vocabulary(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """Transformers' tokenizer for the file gives back any text, in ids below the vocabulary's size."""
    path = tiny(variant).gguf_path
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "the thing in the town. Then 12 ants,\n\n    ok! สวัสดี 😀 é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tiny(variant).vocabulary_size
    assert len(ids) < len(text.encode()), "merges apply"


def test_llama3_factors_are_transformers(tiny: Callable[[str], TinyModel]) -> None:
    """rope_freqs.weight is what Transformers divides the plain frequencies by, rounded to float32."""
    checkpoint = tiny("llama-llama3")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(checkpoint.gguf_path).tensors}
    config = checkpoint.model.config
    with Lifted():
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    size = config.head_dim
    plain = np.array([config.rope_parameters["rope_theta"] ** (-2 * i / size) for i in range(size // 2)])
    factors = tensors["rope_freqs.weight"].astype(np.float64)
    np.testing.assert_allclose(factors, plain / scaled.numpy(), rtol=1.001 * FLOAT32_ROUNDOFF, atol=0)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert ((factors > 1) & (factors < 8)).any()
