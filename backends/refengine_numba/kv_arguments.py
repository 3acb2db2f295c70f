"""What kernels that write the KV cache are called with: new keys and values, and blocks to be sealed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine.ops import LayerCache, SealedLayerCache
from refengine.quantizer.sealed_kv import Floats, Integers
from refengine_numba.arguments import Arguments, check
from refengine_numba.kv_pool import pool_of

Ids = NDArray[np.int32]


def kv_write_arguments(
    cache: LayerCache,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    slot_mapping: NDArray[np.int32],
    rows: str = "T",
) -> Arguments:
    """Arguments of :func:`kv_write_entry`; its kind is that of ``pool_of(cache)``.

    Args:
        cache: the layer's blocks.
        k: float32 [T, G, D].
        v: float32 [T, G, D].
        slot_mapping: int32 [T]; what a step puts there must have been checked.
        rows: the symbol of T.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
        UnsupportedError: there are no kernels for the cache's dtype.
    """
    pool = pool_of(cache)
    shape = (len(slot_mapping), pool.kv_heads, pool.head_size)
    check("k", k, np.float32, shape)
    check("v", v, np.float32, shape)
    check("slot_mapping", slot_mapping, np.int32, shape[:1])
    if not (cache.keys.flags.writeable and cache.values.flags.writeable):
        raise ValueError("the cache is read-only")
    count = pool.kv_heads * pool.head_size
    return Arguments.of(
        k,
        v,
        cache.keys,
        cache.values,
        pool.nbytes,
        slot_mapping,
        len(slot_mapping),
        count,
        pool.block_size,
        pool.stride,
        count * cache.keys.itemsize,
        symbols={6: rows},
    )


def kv_seal_arguments(
    cache: SealedLayerCache,
    exact: LayerCache,
    block_tables: Ids,
    exact_tables: Ids,
    query_starts: Ids,
    context_lens: Ids,
    *,
    sequences: str = "S",
    columns: str = "M",
    exact_columns: str = "N",
) -> Arguments:
    """Arguments of :func:`kv_seal_entry` for the cache's formats and the exact copies' dtype.

    Args:
        cache: the layer's sealed blocks.
        exact: its exact copies, float16 or float32.
        block_tables: int32 [S, M], of the sealed pool, one row after the other with the step's own M. What is
            in it and in the next three is the step's own, and must have been checked.
        exact_tables: int32 [S, N], of the pool of exact copies, in the same way.
        query_starts: int32 [S + 1].
        context_lens: int32 [S].
        sequences: the symbol of S.
        columns: the symbol of M.
        exact_columns: the symbol of N.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
        UnsupportedError: there are no kernels for the exact copies' dtype, or the formats.
    """
    pool, count = pool_of(exact), len(context_lens)
    sizes = pool.block_size, pool.kv_heads, pool.head_size
    sealed: list[NDArray[np.uint8] | int] = []
    for stored, form in zip(cache[:2], cache.formats, strict=True):
        if not isinstance(form, Floats | Integers):
            raise UnsupportedError(f"there are no kernels for sealed blocks of the format {form}")
        blocks, nbytes = stored.shape
        if stored.dtype != np.uint8 or nbytes != form.nbytes(*sizes) or stored.strides[1] != 1:
            raise ValueError(f"{stored.dtype.name} {list(stored.shape)} are no blocks of {form.name} {sizes}")
        if not stored.flags.writeable:
            raise ValueError("the cache is read-only")
        sealed += [stored, (blocks - 1) * stored.strides[0] + nbytes, stored.strides[0]]
    check("block_tables", block_tables, np.int32, (count, block_tables.shape[-1]))
    check("exact_tables", exact_tables, np.int32, (count, exact_tables.shape[-1]))
    check("query_starts", query_starts, np.int32, (count + 1,))
    check("context_lens", context_lens, np.int32, (count,))
    return Arguments.of(
        exact.keys,
        exact.values,
        pool.nbytes,
        pool.stride,
        *sealed,
        *sizes,
        block_tables,
        block_tables.shape[1],
        exact_tables,
        exact_tables.shape[1],
        query_starts,
        context_lens,
        count,
        symbols={14: columns, 16: exact_columns, 19: sequences},
    )
