"""Attention over sealed caches: right numbers read by every query, and the same bits in every schedule."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numba_backend.attention_cases import Case, case, expected, whole

from refengine.ops import LayerCache, SealedLayerCache
from refengine.ops.scratch import Scratch
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES
from refengine_numba import entries, isa
from refengine_numba.attention_arguments import sealed_attention_arguments
from refengine_numba.attention_sizes import workspace_bytes

Run = Callable[..., None]

FORMS = [("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("float16", "float32")]


def sealed_and_opened(drawn: Case, forms: tuple[str, str]) -> tuple[list[np.ndarray], ...]:
    """Of each sequence all whole blocks' bytes [blocks, nbytes], keys and values, and the numbers they open to."""
    size, scratch, results = drawn.block_size, Scratch(), []
    for form, numbers in zip(
        (SEALED_KEYS[forms[0]], SEALED_VALUES[forms[1]]), (drawn.k, drawn.v), strict=True
    ):
        stored, opened = [], []
        for x in numbers:
            blocks = x[: len(x) // size * size].reshape(-1, size, *x.shape[1:])
            data = np.zeros((len(blocks), form.nbytes(size, *x.shape[1:])), np.uint8)
            read = np.zeros(blocks.shape, np.float32)
            if len(blocks):
                form.seal(blocks.astype(np.float32), data, scratch)
                form.open(data, read, scratch)
            stored.append(data)
            opened.append(
                np.concatenate([read.reshape(-1, *x.shape[1:]), x[len(read) * size :].astype(np.float32)])
            )
        results += [stored, opened]
    return tuple(results)


def attend(
    drawn: Case,
    forms: tuple[str, str],
    pieces: list[tuple[int, int, int]],
    call: Run,
    threads: int = 1,
    seed: int = 0,
) -> list[np.ndarray]:
    """One step; blocks lie at random, and what no query may read is NaN, or no block."""
    rng, size, first = np.random.default_rng(seed), drawn.block_size, drawn.k[0]
    keys, _, values, _ = sealed_and_opened(drawn, forms)
    columns = max(-(-stop // size) for _, _, stop in pieces)
    count = len(pieces) * columns + 2
    exact_pool = np.full((count, 2, size, *first.shape[1:]), np.nan, first.dtype)
    exact = LayerCache(exact_pool[:, 0], exact_pool[:, 1])
    widths = keys[0].shape[1], values[0].shape[1]
    pool = np.full((count, sum(widths) + 8), 0xFF, np.uint8)
    form = SEALED_KEYS[forms[0]], SEALED_VALUES[forms[1]]
    cache = SealedLayerCache(pool[:, : widths[0]], pool[:, widths[0] : sum(widths)], form)
    places, exact_places = iter(rng.permutation(count)), iter(rng.permutation(count))
    tables, exact_tables = (np.full((len(pieces), c), -(2**31), np.int32) for c in (columns, columns + 1))
    for row, exact_row, (sequence, start, stop) in zip(tables, exact_tables, pieces, strict=True):
        seen = 0 if drawn.window is None else max(0, start - drawn.window + 1)
        for block in range(seen // size, -(-stop // size)):
            row[block] = next(places)
            if block < len(keys[sequence]):
                cache.keys[row[block]], cache.values[row[block]] = (
                    keys[sequence][block],
                    values[sequence][block],
                )
            if block == 0 or (block + 1) * size > start:
                exact_row[block] = next(exact_places)
                for position in range(block * size, min(stop, (block + 1) * size)):
                    exact.keys[exact_row[block], position % size] = drawn.k[sequence][position]
                    exact.values[exact_row[block], position % size] = drawn.v[sequence][position]
    starts = np.cumsum([0] + [stop - start for _, start, stop in pieces]).astype(np.int32)
    contexts = np.array([stop for _, _, stop in pieces], np.int32)
    q = np.concatenate([drawn.q[sequence][start:stop] for sequence, start, stop in pieces])
    y = np.full_like(q, np.nan)
    words = workspace_bytes(len(q), q.shape[1], first.shape[1], q.shape[2], threads) // 4
    arguments = sealed_attention_arguments(
        q, cache, exact, tables, exact_tables, starts, contexts, y,
        np.full(words, np.nan, np.float32).view(np.uint8), isa=isa.choose(), threads=threads,
        scale=drawn.scale, window=drawn.window, softcap=drawn.softcap,
    )  # fmt: skip
    call(entries.entry("attention_entry.attention"), arguments, threads)
    call(entries.entry("attention_entry.merge"), arguments, threads)
    return [y[a:b] for a, b in pairwise(starts)]


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 64), (4, 2, 13)])
def test_every_query_reads_the_first_and_its_own_block_exactly(
    heads: int, kv_heads: int, size: int, forms: tuple[str, str], call: Run
) -> None:
    """Against a float64 loop over the numbers that each query should read, within the clauses' bound."""
    for kws in ({"block_size": 16}, {"block_size": 7, "window": 30}, {"block_size": 70, "softcap": 2.0}):
        drawn = case([150, 5], heads, kv_heads, size, **kws)
        _, keys, _, values = sealed_and_opened(drawn, forms)
        results = attend(drawn, forms, whole(drawn), call)
        for sequence, y in enumerate(results):
            for position, row in enumerate(y):
                block = np.arange(len(drawn.q[sequence])) // drawn.block_size
                exact = ((block == 0) | (block == position // drawn.block_size))[:, None, None]
                read = [
                    [np.where(exact, x[sequence], opened[sequence]).astype(np.float32)] * len(drawn.q)
                    for x, opened in ((drawn.k, keys), (drawn.v, values))
                ]
                mean, bound = expected(replace(drawn, k=read[0], v=read[1]), sequence, position)
                assert (np.abs(row - mean) <= bound).all(), (sequence, position)


@pytest.mark.parametrize("window", [None, 100])
def test_a_rows_bits_depend_on_its_own_context(window: int | None, call: Run) -> None:
    """At once, in random chunks, row by row, by any threads, in blocks anywhere."""
    drawn = case([400, 90], 6, 2, 32, window=window, block_size=16)
    together = attend(drawn, ("int8", "int4"), whole(drawn), call)
    rng = np.random.default_rng(5)
    for trial in range(4):
        cuts = [sorted({0, len(q), *rng.integers(0, len(q), 3)}) for q in drawn.q]
        chunks = [(s, a, b) for s, ends in enumerate(cuts) for a, b in pairwise(ends)]
        rng.shuffle(chunks)
        for pieces in ([tuple(chunk) for chunk in chunks[i : i + 2]] for i in range(0, len(chunks), 2)):
            threads = int(rng.choice([1, 2, 16]))
            results = attend(drawn, ("int8", "int4"), pieces, call, threads, seed=trial)
            for (sequence, start, stop), y in zip(pieces, results, strict=True):
                assert y.tobytes() == together[sequence][start:stop].tobytes(), (pieces, threads)
    for position in (0, 15, 16, 255, 256, 399):
        (y,) = attend(drawn, ("int8", "int4"), [(0, position, position + 1)], call, threads=4)
        assert y.tobytes() == together[0][position : position + 1].tobytes()


CHECKED = """
import sys
sys.path.insert(0, {folder!r})
from numba_backend.conftest import run
from numba_backend.test_attention_sealed import attend, case, whole
for size in (64, 13):
    drawn = case([70, 130], 4, 2, size, window=90, block_size=16)
    attend(drawn, ("int8", "int4"), whole(drawn), run, threads=2)
print("done")
"""


def test_no_kernel_leaves_its_arrays() -> None:
    """Compiled with bounds checking, every access is inside."""
    code = CHECKED.format(folder=str(Path(__file__).parents[1]))
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, "Error" in done.stderr) == (0, "done\n", False), done.stderr


def test_only_arrays_of_the_right_kind_reach_a_kernel() -> None:
    """Sealed blocks of other sizes than the exact copies' are refused."""
    pool = np.zeros((3, 2, 16, 2, 32), np.float16)
    form = SEALED_KEYS["int8"], SEALED_VALUES["int8"]
    widths = [f.nbytes(16, 2, 32) for f in form]
    rest = (
        LayerCache(pool[:, 0], pool[:, 1]), np.zeros((1, 4), np.int32), np.zeros((1, 4), np.int32),
        np.zeros(2, np.int32), np.zeros(1, np.int32), np.zeros((1, 4, 32), np.float32),
        np.zeros(workspace_bytes(1, 4, 2, 32, 1), np.uint8),
    )  # fmt: skip
    q, options = np.zeros((1, 4, 32), np.float32), {"isa": isa.choose(), "threads": 1, "scale": 1.0}
    keys, values = (np.zeros((3, width), np.uint8) for width in widths)
    arguments = sealed_attention_arguments(q, SealedLayerCache(keys, values, form), *rest, **options)
    assert sorted(arguments.symbols.values()) == ["M", "N", "S", "T"]
    for wrong in (keys[:, :-1], keys.view(np.int8)):
        with pytest.raises(ValueError, match="must be blocks of int8"):
            sealed_attention_arguments(q, SealedLayerCache(wrong, values, form), *rest, **options)
