"""What attention is called with: the only door from arrays to its kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine.ops import LayerCache, SealedLayerCache
from refengine.quantizer.sealed_kv import Floats, Integers
from refengine_numba.arguments import Arguments, check, float32_word
from refengine_numba.attention_sizes import OWN, workspace_bytes
from refengine_numba.entries import Entry, entry
from refengine_numba.kv_pool import pool_of

EVERYTHING = 2**40
"""A window that shows all positions."""

COUNTER_WORDS = 16
"""Words beside the counter of items, so that nothing else shares its cache line."""


def attention_arguments(
    q: NDArray[np.float32],
    cache: LayerCache,
    block_tables: NDArray[np.int32],
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    y: NDArray[np.float32],
    workspace: NDArray[np.uint8],
    *,
    isa: str,
    threads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    rows: str = "T",
    sequences: str = "S",
    columns: str = "M",
) -> Arguments:
    """Arguments of ``attention_entry.attention`` and ``attention_entry.merge``.

    Args:
        q: float32 [T, H, D].
        cache: the layer's blocks.
        block_tables: int32 [S, M], one row after the other with the step's own M. What is in it and in the
            next two is the step's own, and must have been checked.
        query_starts: int32 [S + 1].
        context_lens: int32 [S].
        y: float32 [T, H, D], the result.
        workspace: :func:`workspace_bytes` of it.
        isa: the instruction set to compile for.
        threads: that share the work at most.
        scale: of scores.
        window: positions that a query sees, or all.
        softcap: of scores, or none.
        rows: the symbol of T.
        sequences: the symbol of S.
        columns: the symbol of M.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or the workspace too small.
        UnsupportedError: there are no kernels for the cache's dtype.
    """
    pool = pool_of(cache)
    check("block_tables", block_tables, np.int32, (len(context_lens), block_tables.shape[-1]))
    common = common_arguments(
        q,
        (pool.kv_heads, pool.head_size),
        query_starts,
        context_lens,
        y,
        workspace,
        columns=block_tables.shape[1],
        load=entry("attention_loading.load", pool.kind),
        cut=0,
        isa=isa,
        threads=threads,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    own = (cache.keys, cache.values, pool.nbytes, pool.stride, pool.block_size, block_tables)
    return Arguments.of(*common, *own, symbols={2: rows, 3: sequences, 4: columns})


def common_arguments(
    q: NDArray[np.float32],
    kv_shape: tuple[int, int],
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    y: NDArray[np.float32],
    workspace: NDArray[np.uint8],
    *,
    columns: int,
    load: Entry,
    cut: int,
    isa: str,
    threads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[NDArray[Any] | int, ...]:
    """The arguments of both entries, whatever tiles are loaded from; see :func:`attention_arguments`.

    Args:
        kv_shape: key heads, and elements of a head.
        columns: of the block tables.
        load: the entry that loads tiles.
        cut: see ``Sizes``.
    """
    rows, heads, size = q.shape
    kv_heads = kv_shape[0]
    check("q", q, np.float32, (rows, heads, kv_shape[1]))
    check("y", y, np.float32, q.shape, written=True)
    check("context_lens", context_lens, np.int32, (len(context_lens),))
    check("query_starts", query_starts, np.int32, (len(context_lens) + 1,))
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} key heads evenly")
    needed = workspace_bytes(rows, heads, kv_heads, size, threads)
    check("workspace", workspace, np.uint8, (workspace.size,), written=True)
    if workspace.size < needed or workspace.ctypes.data % 8:
        raise ValueError(
            f"the workspace has {workspace.size} bytes; it must have {needed}, at a multiple of 8"
        )
    return (
        q,
        y,
        rows,
        len(context_lens),
        columns,
        cut,
        query_starts,
        context_lens,
        heads,
        kv_heads,
        size,
        EVERYTHING if window is None else window,
        float32_word(scale),
        float32_word(softcap or 0.0),
        workspace,
        workspace.size // 4,
        np.zeros(COUNTER_WORDS, np.int64),
        entry("attention_arithmetic.tile", isa).address,
        load.address,
    )


def sealed_attention_arguments(
    q: NDArray[np.float32],
    cache: SealedLayerCache,
    exact: LayerCache,
    block_tables: NDArray[np.int32],
    exact_tables: NDArray[np.int32],
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    y: NDArray[np.float32],
    workspace: NDArray[np.uint8],
    *,
    isa: str,
    threads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    rows: str = "T",
    sequences: str = "S",
    columns: str = "M",
    exact_columns: str = "N",
) -> Arguments:
    """The same for a sealed cache; what is not named here is as for :func:`attention_arguments`.

    Args:
        cache: the layer's sealed blocks.
        exact: its exact copies.
        exact_tables: int32 [S, N], of the pool of exact copies, row after row with the step's own N.
        exact_columns: the symbol of N.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or the workspace too small.
        UnsupportedError: there are no kernels for the exact copies' dtype, or the formats.
    """
    pool = pool_of(exact)
    block = pool.block_size, pool.kv_heads, pool.head_size
    sealed: list[NDArray[np.uint8] | int] = []
    names = []
    for stored, form in zip(cache[:2], cache.formats, strict=True):
        if not isinstance(form, Floats | Integers):
            raise UnsupportedError(f"there are no kernels for sealed blocks of the format {form}")
        blocks, nbytes = stored.shape
        if stored.dtype != np.uint8 or nbytes != form.nbytes(*block) or stored.strides[1] != 1:
            raise ValueError(
                f"{stored.dtype.name} {list(stored.shape)} must be blocks of {form.name} {block}"
            )
        sealed += [stored, (blocks - 1) * stored.strides[0] + nbytes, stored.strides[0]]
        names.append(form.name)
    check("block_tables", block_tables, np.int32, (len(context_lens), block_tables.shape[-1]))
    check("exact_tables", exact_tables, np.int32, (len(context_lens), exact_tables.shape[-1]))
    common = common_arguments(
        q,
        (pool.kv_heads, pool.head_size),
        query_starts,
        context_lens,
        y,
        workspace,
        columns=block_tables.shape[1],
        load=entry("attention_sealed.sealed_load", pool.kind, *names),
        cut=pool.block_size,
        isa=isa,
        threads=threads,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    own = (exact.keys, exact.values, pool.nbytes, pool.stride, pool.block_size, block_tables, exact_tables)
    return Arguments.of(
        *common,
        *sealed,
        *own,
        exact_tables.shape[1],
        symbols={2: rows, 3: sequences, 4: columns, OWN + 13: exact_columns},
    )
