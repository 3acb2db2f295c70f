"""Sealed keys and values: what they cost, and names that select them. Their arithmetic: conformance, SKV."""

from __future__ import annotations

import numpy as np
import pytest

from refengine.errors import UnsupportedError
from refengine.memory import KVGroupLayout, KVLayout
from refengine.program import kv_formats, policy

KIB = 1024


@pytest.mark.parametrize(
    ("name", "kib"), [("float16", 512), ("int8", 280), ("int8/int4", 216), ("int4/int8", 216), ("int4", 152)]
)
def test_a_token_of_llama_2_7b_costs(name: str, kib: int) -> None:
    """In blocks of 16, steps and centres included."""
    dtype, sealed = kv_formats(name, policy("float32"))
    layers = tuple((layer, 32, 128) for layer in range(32))
    layout = KVLayout(16, dtype, (KVGroupLayout(None, layers, 1, sealed),))
    assert layout.block_bytes(0) / layout.block_size == kib * KIB


def test_a_cache_wider_than_its_policy_is_refused() -> None:
    """And the way out is named."""
    with pytest.raises(UnsupportedError, match="leave it out, or choose the policy float64"):
        kv_formats("float64", policy("float32"))


def test_exact_copies_have_the_policys_dtype() -> None:
    """Whatever the sealed blocks hold."""
    assert kv_formats("int4", policy("float64"))[0] == np.float64
