"""Transformers as the outside reference: logits, greedy continuations, and real GGUF files as models.

``reference_logits(model, ids)`` runs Transformers as it is, in float32, with eager attention, no KV cache:

- RoPE: inverse frequencies, angles (position × frequency), cos and sin are float32 whatever the model's
  dtype; an angle of position p is off by up to about 2u·p·frequency, u = 2⁻²⁴. YaRN's 0.1·ln(factor) + 1
  multiplies cos and sin afterwards.
- RMSNorm: the mean square, its reciprocal root and the product with x are float32 whatever the dtype. Gemma
  multiplies by (1 + weight) there, the others by weight in the model's dtype.
- The softmax of attention scores is float32 whatever the dtype. A masked score has the dtype's lowest
  number added, so that its weight is exactly zero.
- Gemma's embedding scale √hidden is rounded to float32, then to the weights' dtype. Attention scales are
  Python floats.
- Matrix products are MKL's and PyTorch's: sums in any order, fused or not, and not the same on every
  machine.

``model.double()`` is therefore no float64 reference: RoPE, norms and softmax stay float32, and logits are
off by 10⁻⁶ instead of 10⁻¹⁴. ``reference_logits(model, ids, torch.float64)`` runs the same code of
Transformers with all of these lifted to float64 (`Lifted`), frequencies and scales included. Frequencies
of llama3 are then the float64 ones divided by the float32 factors that a file stores.

Transformers' own GGUF loader (5.23) is right on both real files that the tests use (SmolLM2, Gemma 3 270M:
the logits equal `load_gguf_reference`'s exactly) and drops much of what other files say:
``test_tiny_checkpoints.LOST``. `load_gguf_reference` takes a fraction of its time and memory, and refuses
what it doesn't know.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from reference.gguf_conventions import (
    FAMILIES,
    Family,
    gemma_rope,
    rope_factors,
    row_order,
    stored_names,
)
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.initialization import no_init_weights


class Lifted(TorchFunctionMode):
    """Runs PyTorch code with each request for float32 turned into one for float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def lift(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(lift, args), **{key: lift(value) for key, value in (kwargs or {}).items()})


def lift(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with float64 weights (exact) and its RoPE frequencies and scales computed in float64."""
    with Lifted(), no_init_weights():
        lifted = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=torch.float64, attn_implementation="eager"
        )
    lifted.tie_weights()
    lifted.load_state_dict(model.state_dict())
    if (factors := rope_factors(model.config)) is not None:
        with Lifted():
            frequencies, _ = lifted.model.rotary_emb.compute_default_rope_parameters(model.config)
        lifted.model.rotary_emb.inv_freq = frequencies / torch.from_numpy(factors).double()
    return lifted.eval()


def reference_logits(
    model: PreTrainedModel, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> NDArray[Any]:
    """Logits [T, V] of one forward pass over `token_ids` [T] at positions 0…T-1, without a KV cache.

    float32 is Transformers as it is; float64 is the same code without its float32 islands (module docstring).
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"no reference in {dtype}")
    lifted = dtype == torch.float64
    with torch.no_grad(), Lifted() if lifted else nullcontext():
        runner = lift(model) if lifted else model
        return runner(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()


def reference_greedy(model: PreTrainedModel, token_ids: Sequence[int], n: int) -> list[int]:
    """The `n` ids that follow `token_ids`, each the most likely one (the lowest of equals), ends ignored."""
    ids = list(token_ids)
    for _ in range(n):
        ids.append(int(reference_logits(model, ids)[-1].argmax()))
    return ids[len(token_ids) :]


class _HeaderReader(gguf.GGUFReader):
    """A GGUFReader that steps over metadata arrays: a vocabulary costs it milliseconds instead of seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        end, raw = orig_offs + 12, memoryview(self.data)
        if item[0] == gguf.GGUFValueType.STRING:
            for _ in range(count[0]):
                end += 8 + int.from_bytes(raw[end : end + 8], "little")
        else:
            end += int(count[0]) * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(item[0])]).itemsize
        return end - orig_offs, [item, count], [], [gguf.GGUFValueType.ARRAY]


def load_gguf_reference(path: Path) -> PreTrainedModel:
    """A GGUF file as a float32 Transformers model in eval mode, with eager attention.

    `gguf.dequantize` decodes the weights; peak memory is the model's and a few thousand rows'. Raises
    KeyError where an architecture isn't known or a key or tensor is missing, and ValueError where the file
    says something that isn't understood here: an oracle must leave nothing out.
    """
    reader = _HeaderReader(path)
    architecture = reader.fields["general.architecture"].contents()
    family = FAMILIES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    keys = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{architecture}.")
    }
    tied = "output.weight" not in tensors
    config = _config_of(keys, family, vocabulary=int(tensors["token_embd.weight"].shape[-1]), tied=tied)
    if keys:
        raise ValueError(f"{path} has keys that this loader doesn't know: {sorted(keys)}")

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.tie_weights()
    names = stored_names(model, family)
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(names[name])
        order = torch.from_numpy(row_order(name, len(parameter), config, family))
        shift = family.norm_shift if name.endswith("norm.weight") else 0.0
        for start in range(0, len(parameter), 4096):
            rows = slice(start, start + 4096)
            decoded = gguf.dequantize(tensor.data[rows], tensor.tensor_type) - np.float32(shift)
            with torch.no_grad():
                parameter[order[rows]] = torch.from_numpy(decoded)
    if tensors:
        raise ValueError(f"{path} has tensors that this loader doesn't know: {sorted(tensors)}")
    return model.eval()


def _config_of(keys: dict[str, Any], family: Family, *, vocabulary: int, tied: bool) -> PretrainedConfig:
    """The config that a file's keys describe; takes out of `keys` what it understands."""
    values: dict[str, Any] = {
        "num_hidden_layers": keys.pop("block_count"),
        "max_position_embeddings": keys.pop("context_length"),
        "hidden_size": keys.pop("embedding_length"),
        "intermediate_size": keys.pop("feed_forward_length"),
        "num_attention_heads": keys["attention.head_count"],
        "num_key_value_heads": keys.pop("attention.head_count_kv", keys.pop("attention.head_count")),
        "rms_norm_eps": keys.pop("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    head_dim = keys.pop("attention.key_length", values["hidden_size"] // values["num_attention_heads"])
    for key, size in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("vocab_size", vocabulary),
    ):
        if keys.pop(key, size) != size:
            raise ValueError(f"{key} isn't {size}, and Transformers has no way to say so")
    if family.config is not Qwen2Config:  # the one that has no head_dim of its own
        values["head_dim"] = head_dim
    rope = {"rope_type": "default", "rope_theta": keys.pop("rope.freq_base", 10_000.0)}
    if family.config is not Gemma3TextConfig:
        return family.config(**values, rope_parameters=rope)
    is_27b = values["num_hidden_layers"] == 62
    return Gemma3TextConfig(
        **values,
        sliding_window=keys.pop("attention.sliding_window"),
        query_pre_attn_scalar=values["hidden_size"] // values["num_attention_heads"] if is_27b else head_dim,
        final_logit_softcapping=keys.pop("final_logit_softcapping", None),
        rope_parameters=gemma_rope(local=keys.pop("rope.freq_base_swa", 10_000.0), **rope),
    )
