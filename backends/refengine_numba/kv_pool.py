"""Where one layer's keys and values lie in a pool of the KV cache, as kernels see it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from refengine.errors import UnsupportedError
from refengine.ops import LayerCache

KINDS: Mapping[np.dtype[Any], str] = MappingProxyType(
    {np.dtype(np.float16): "f16", np.dtype(np.float32): "f32"}
)
"""Numbers that kernels read and write in place."""


class Pool(NamedTuple):
    """One layer's blocks of keys, and in the same way of values.

    Attributes:
        kind: of numbers, one of :data:`KINDS`.
        nbytes: from the first block's first byte to the last block's end.
        stride: bytes from one block to the next.
        block_size: P.
        kv_heads: G.
        head_size: D.
    """

    kind: str
    nbytes: int
    stride: int
    block_size: int
    kv_heads: int
    head_size: int


def pool_of(cache: LayerCache) -> Pool:
    """The layout of a layer's keys and values, each [B, P, G, D].

    Raises:
        UnsupportedError: their dtype is not one of :data:`KINDS`.
        ValueError: they are not alike, or the numbers of a block do not lie one after the other.
    """
    keys, values = cache
    if keys.dtype not in KINDS:
        raise UnsupportedError(
            f"a KV cache of {keys.dtype.name} has no kernels; choose kv_precision float16 or float32"
        )
    if (keys.shape, keys.strides, keys.dtype) != (values.shape, values.strides, values.dtype):
        raise ValueError("keys and values of a layer lie differently")
    blocks, block_size, kv_heads, head_size = keys.shape
    row = head_size * keys.itemsize
    inner = (kv_heads * row, row, keys.itemsize)
    block_bytes = block_size * kv_heads * row
    if keys.strides[1:] != inner or keys.strides[0] < block_bytes:
        raise ValueError(f"blocks {list(keys.shape)} have strides {list(keys.strides)}")
    nbytes = (blocks - 1) * keys.strides[0] + block_bytes
    return Pool(KINDS[keys.dtype], nbytes, keys.strides[0], block_size, kv_heads, head_size)
