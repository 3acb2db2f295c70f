"""The reference is Transformers, its float64 has no float32 in it, and files load into it whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from reference.tiny_checkpoints import TinyModel
from reference.transformers_reference import (
    Lifted,
    lift,
    load_gguf_reference,
    reference_greedy,
    reference_logits,
)
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = [7, 300, 41, 41, 12, 255, 99, 180, 263, 8, 301, 77, 5, 290, 31, 44, 160, 2, 270, 19]


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-tied", "qwen3", "gemma3"])
def test_greedy_is_generate(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """`reference_greedy` continues as Transformers' `generate` does with its KV cache."""
    model = tiny(variant).model
    prompt = torch.tensor([TOKENS])
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert reference_greedy(model, TOKENS, 8) == generated[0, len(TOKENS) :].tolist()


class _Float32Spotter(TorchDispatchMode):
    """Fails at the first operation that makes a float32 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                raise AssertionError(f"{func} makes float32")
        return result


PRECISE = [
    "llama",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "mistral-window",
    "qwen2-yarn",
    "qwen3",
    "gemma3-linear",
]


@pytest.mark.parametrize("variant", PRECISE)
def test_float64_has_no_float32_in_it(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """A float64 run makes no float32 tensor on its way; Transformers' own `double()` does."""
    lifted = lift(tiny(variant).model)
    with Lifted(), _Float32Spotter(), torch.no_grad():
        lifted(torch.tensor([TOKENS]), use_cache=False)
    plain = copy.deepcopy(tiny(variant).model).double()
    with _Float32Spotter(), torch.no_grad(), pytest.raises(AssertionError, match="makes float32"):
        plain(torch.tensor([TOKENS]), use_cache=False)


@pytest.mark.parametrize("variant", ["llama", "llama-llama3", "mistral", "qwen2", "qwen3"])
def test_float64_frequencies_are_float64(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """RoPE's frequencies are base^(-2i/d), over the file's factors if it has any, to a few float64 roundings.

    The exponent is rounded once, which the power multiplies by ln base < 14 on either side; the two powers
    and the divisions add one or two each: 34 roundings of 2⁻⁵³ cover them.
    """
    lifted = lift(tiny(variant).model)
    base, size = lifted.config.rope_parameters["rope_theta"], 2 * len(lifted.model.rotary_emb.inv_freq)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tiny(variant).gguf_path).tensors}
    factors = tensors.get("rope_freqs.weight", np.ones(size // 2)).astype(np.float64)
    expected = [base ** (-2 * i / size) for i in range(size // 2)] / factors
    frequencies = lifted.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(frequencies, expected, rtol=34 * 2.0**-53, atol=0)


@pytest.mark.parametrize("variant", PRECISE)
def test_precision_shrinks_the_error(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """float32 arithmetic is at least 2⁸ times nearer to float64 than weights rounded to bfloat16 are.

    To first order an error is its roundoff, 2⁻²⁴ or 2⁻⁹, times sensitivities, and arithmetic rounds what
    became of a weight a few times where bfloat16 rounds the weight once: 2¹⁵ less the cost of those few. A
    float64 run that computed another function would stop float32's error from shrinking so.
    """
    model = tiny(variant).model
    exact = reference_logits(model, TOKENS, torch.float64)
    assert exact.dtype == np.float64
    error = np.linalg.norm(reference_logits(model, TOKENS) - exact)
    coarse_error = np.linalg.norm(reference_logits(copy.deepcopy(model).bfloat16().float(), TOKENS) - exact)
    assert 0 < error < coarse_error * 2.0**-8


@pytest.mark.parametrize(
    "variant", ["llama", "llama-mha", "llama-q4_1", "mistral", "qwen2", "qwen3-tied", "gemma3", "gemma3-27b"]
)
def test_a_loaded_file_is_the_model(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """`load_gguf_reference` gives exactly the logits of the model that the file was made with."""
    loaded = load_gguf_reference(tiny(variant).gguf_path)
    for precision in (torch.float32, torch.float64):
        expected = reference_logits(tiny(variant).model, TOKENS, precision)
        np.testing.assert_array_equal(reference_logits(loaded, TOKENS, precision), expected)


@pytest.mark.parametrize(
    "variant",
    ["llama-bias", "llama-linear", "llama-llama3", "mistral-window", "gemma3-pattern", "gemma3-linear"],
)
def test_a_file_that_says_more_is_refused(tiny: Callable[[str], TinyModel], variant: str) -> None:
    """`load_gguf_reference` refuses what it doesn't understand instead of leaving it out."""
    with pytest.raises(ValueError, match="doesn't know"):
        load_gguf_reference(tiny(variant).gguf_path)
