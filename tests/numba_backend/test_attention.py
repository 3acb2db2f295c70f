"""Attention: right, the same bits in every schedule, and blind to what is not seen."""

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
from numba_backend.attention_cases import Case, attend, case, expected, whole

from refengine.errors import UnsupportedError
from refengine.ops import LayerCache
from refengine_numba import entries, isa
from refengine_numba.attention_arguments import attention_arguments
from refengine_numba.attention_sizes import workspace_bytes

Run = Callable[..., None]


def check(case: Case, results: list[np.ndarray], positions: list[range]) -> None:
    for sequence, (y, wanted) in enumerate(zip(results, positions, strict=True)):
        for row, position in zip(y, wanted, strict=True):
            mean, bound = expected(case, sequence, position)
            assert (np.abs(row - mean) <= bound).all(), (sequence, position)


SHAPES = [(9, 3, 64), (4, 4, 16), (8, 1, 80), (7, 1, 13), (2, 2, 1), (6, 2, 128), (1, 1, 256), (110, 1, 20)]
"""H, G, D: groups of one, some, and more than are treated at once; D of whole vectors and others."""


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_results_are_the_softmax_means(heads: int, kv_heads: int, size: int, dtype: type, call: Run) -> None:
    """Against a float64 loop, within the bound of the clauses; windows, softcaps and block sizes of every kind."""
    for kws in (
        {"block_size": 16},
        {"block_size": 7, "window": 70},
        {"block_size": 1, "softcap": 0.7},
        {"block_size": 300, "window": 1, "softcap": 20.0},
    ):
        drawn = case([40, 1, 140], heads, kv_heads, size, dtype, **kws)
        check(drawn, attend(drawn, whole(drawn), call), [range(40), range(1), range(140)])


@pytest.mark.parametrize("window", [None, 300, 700])
def test_long_contexts_are_folded(window: int | None, call: Run) -> None:
    """Single rows around every place where partitions and stretches end, by one thread and shared out by many."""
    drawn = case([4400], 3, 1, 16, window=window)
    for position in (255, 256, 1023, 1024, 1279, 2047, 4095, 4096, 4399):
        piece = [(0, position, position + 1)]
        (y,) = attend(drawn, piece, call)
        check(drawn, [y], [range(position, position + 1)])
        for threads in (2, 7):
            assert attend(drawn, piece, call, threads=threads)[0].tobytes() == y.tobytes()


@pytest.mark.parametrize("window", [None, 100, 260])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (2, 1, 24)])
def test_a_rows_bits_depend_on_its_own_context(
    heads: int, kv_heads: int, size: int, window: int | None, call: Run
) -> None:
    """Prompts at once, in random chunks, row by row, in any company, by any threads, in blocks anywhere."""
    drawn = case([600, 90, 31], heads, kv_heads, size, window=window, softcap=3.0)
    together = attend(drawn, whole(drawn), call)
    rng = np.random.default_rng(size)
    for trial in range(6):
        cuts = [sorted({0, len(q), *rng.integers(0, len(q), 2 * trial)}) for q in drawn.q]
        chunks = [(s, a, b) for s, ends in enumerate(cuts) for a, b in pairwise(ends)]
        rng.shuffle(chunks)
        while chunks:
            count = int(rng.integers(1, 5))
            pieces, chunks = [tuple(chunk) for chunk in chunks[:count]], chunks[count:]
            threads = int(rng.choice([1, 2, 3, 16]))
            results = attend(
                replace(drawn, block_size=int(rng.choice([1, 16, 37]))),
                pieces,
                call,
                threads=threads,
                seed=trial,
            )
            for (sequence, start, stop), y in zip(pieces, results, strict=True):
                assert y.tobytes() == together[sequence][start:stop].tobytes(), (pieces, threads)
    for position in range(0, 600, 23):
        for threads in (1, 4):
            (y,) = attend(drawn, [(0, position, position + 1)], call, threads=threads)
            assert y.tobytes() == together[0][position : position + 1].tobytes()


def test_threads_at_once_give_the_bits_of_threads_in_turn(call: Run) -> None:
    """Items are taken while others are computed, and no thread writes what another reads."""
    drawn = case([3000, 200], 9, 3, 64)
    for pieces in ([(0, 2999, 3000)], [(0, 2900, 3000), (1, 0, 200)], [(0, 2999, 3000), (1, 199, 200)]):
        alone = attend(drawn, pieces, call)
        for threads in (2, 5):
            for a, b in zip(attend(drawn, pieces, call, threads=threads, at_once=True), alone, strict=True):
                assert a.tobytes() == b.tobytes()


def test_arguments_serve_one_step_after_the_other(call: Run) -> None:
    """The sizes of a smaller step are written over those of the largest; the rest of the buffers stays."""
    drawn = case([50, 20], 4, 2, 32)
    pool = np.zeros((8, 2, 16, 2, 32), np.float16)
    cache = LayerCache(pool[:, 0], pool[:, 1])
    for sequence, blocks in ((0, [0, 1, 2, 3]), (1, [5, 6])):
        for position in range(len(drawn.q[sequence])):
            block = blocks[position // 16]
            cache.keys[block, position % 16] = drawn.k[sequence][position]
            cache.values[block, position % 16] = drawn.v[sequence][position]
    q, y = np.zeros((70, 4, 32), np.float32), np.zeros((70, 4, 32), np.float32)
    tables, starts, contexts = np.zeros((2, 9), np.int32), np.zeros(3, np.int32), np.zeros(2, np.int32)
    arguments = attention_arguments(
        q, cache, tables, starts, contexts, y, np.zeros(workspace_bytes(70, 4, 2, 32, 2), np.uint8),
        isa=isa.choose(), threads=2, scale=drawn.scale, columns="M3",
    )  # fmt: skip
    assert sorted(arguments.symbols.values()) == ["M3", "S", "T"]
    steps = [
        ([(0, 0, 50), (1, 0, 20)], [[0, 1, 2, 3], [5, 6, -1, -1]]),
        ([(1, 19, 20)], [[5, 6]]),
        ([(0, 48, 50)], [[0, 1, 2, 3]]),
        ([(0, 49, 50), (1, 19, 20)], [[0, 1, 2, 3], [5, 6, -1, -1]]),
    ]
    for pieces, rows in steps:
        alone = attend(drawn, pieces, call)
        count = sum(b - a for _, a, b in pieces)
        q[:count] = np.concatenate([drawn.q[s][a:b] for s, a, b in pieces])
        starts[: len(pieces) + 1] = np.cumsum([0] + [b - a for _, a, b in pieces])
        contexts[: len(pieces)] = [b for _, _, b in pieces]
        tables.reshape(-1)[: len(pieces) * len(rows[0])] = np.ravel(rows)
        for place, symbol in arguments.symbols.items():
            arguments.words[place] = {"T": count, "S": len(pieces), "M3": len(rows[0])}[symbol]
        for threads in (2, 1):
            y.fill(np.nan)
            call(entries.entry("attention_entry.attention"), arguments, threads)
            call(entries.entry("attention_entry.merge"), arguments, threads)
            assert y[:count].tobytes() == np.concatenate(alone).tobytes()
            assert np.isnan(y[count:]).all()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_only_who_sees_it(bad: float, window: int | None, call: Run) -> None:
    """A key or a value, in the middle of a tile and at its ends; with company on all sides."""
    drawn = case([150], 6, 2, 24, window=window)
    (clean,) = attend(drawn, whole(drawn), call)
    for position in (0, 63, 64, 100, 149):
        for keys, values in ((True, False), (False, True), (True, True)):
            k, v = drawn.k[0].copy(), drawn.v[0].copy()
            if keys:
                k[position] = bad
            if values:
                v[position] = bad
            spoilt = replace(drawn, k=[k], v=[v])
            last = 150 if window is None else min(150, position + window)
            (y,) = attend(spoilt, whole(spoilt), call)
            assert y[:position].tobytes() == clean[:position].tobytes()
            assert y[last:].tobytes() == clean[last:].tobytes()
            if values or np.isnan(bad):
                assert not np.isfinite(y[position:last]).any()
            pieces = [(0, 0, 40), (0, 40, 101), (0, 101, 150)]
            (again,) = (np.concatenate([attend(spoilt, [piece], call)[0] for piece in pieces]),)
            assert np.array_equal(again, y, equal_nan=True)


def test_memory_that_nobody_sees_may_hold_anything(call: Run) -> None:
    """Other memory of the pool and of the workspace, table entries before the window and after the context."""
    drawn = case([90, 70], 4, 2, 40, window=20)
    pieces = [(0, 60, 90), (1, 69, 70)]
    results = [
        attend(drawn, pieces, call, fill=fill, seed=seed) for seed, fill in enumerate((0, np.nan, np.inf))
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_scores_of_any_size_are_weighed(call: Run) -> None:
    """Far above what an exponential holds, and far below zero."""
    for depth in (-9000.0, 9000.0):
        drawn = case([300], 1, 1, 1, np.float32)
        k = np.full((300, 1, 1), depth, np.float32)
        k[77] += 2000
        drawn = replace(drawn, q=[np.ones((300, 1, 1), np.float32)], k=[k])
        (y,) = attend(drawn, whole(drawn), call)
        assert (y[77:, 0, 0] == drawn.v[0][77, 0, 0]).all()


def test_zero_has_one_sign(call: Run) -> None:
    """Products too small to be kept may leave -0 or nothing: what is folded with them must not show."""
    drawn = case([130], 1, 1, 1, np.float32)
    k, v = np.zeros((130, 1, 1), np.float32), np.full((130, 1, 1), -1e-45, np.float32)
    k[0], v[0] = 3, 0
    drawn = replace(drawn, q=[np.ones((130, 1, 1), np.float32)], k=[k], v=[v])
    (y,) = attend(drawn, whole(drawn), call)
    assert not y.any()
    assert not np.signbit(y).any()


@pytest.mark.parametrize("path", isa.available(isa.processor_features()))
def test_instruction_sets_give_the_same_bits(path: str, call: Run) -> None:
    """Wide blocks of sums and narrow ones."""
    drawn = case([130, 5], 9, 3, 80, softcap=5.0)
    best = attend(drawn, whole(drawn), call)
    for a, b in zip(attend(drawn, whole(drawn), call, path=path), best, strict=True):
        assert a.tobytes() == b.tobytes()


FORCED = """
import sys
sys.path.insert(0, {folder!r})
from numba_backend.attention_cases import attend, case, whole
from numba_backend.conftest import run
digest = b""
for kind in ("f2", "f4"):
    for heads, kv_heads, size in ((3, 1, 64), (2, 2, 13)):
        drawn = case([70, 300], heads, kv_heads, size, kind, window=200, softcap=4.0, block_size=7)
        digest += b"".join(y.tobytes() for y in attend(drawn, whole(drawn), run, threads=3))
        digest += b"".join(y.tobytes() for y in attend(drawn, [(1, 299, 300)], run, threads=3))
from hashlib import sha256
print(sha256(digest).hexdigest())
"""


def digest(**variables: str) -> str:
    code = FORCED.format(folder=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    return done.stdout


def test_no_kernel_leaves_its_arrays() -> None:
    """Compiled with bounds checking, every access is inside, and nothing else changes."""
    assert digest(NUMBA_BOUNDSCHECK="1") == digest()


def test_a_processor_with_less_gives_the_same_bits() -> None:
    """Without AVX-512 and without conversion of float16, as far as this processor has them."""
    less = ",".join(f"-{name}" for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c"))
    kept = ",".join(f"+{name}" for name in ("avx2", "fma") if name in isa.processor_features())
    if not kept:
        pytest.skip("not a processor of this kind")
    assert digest(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=f"{kept},{less}") == digest()


def test_only_arrays_of_the_right_kind_reach_a_kernel() -> None:
    """Shapes, dtypes, strides and sizes are checked before an address is formed."""
    pool = np.zeros((4, 2, 16, 2, 32), np.float16)
    right = {
        "q": np.zeros((3, 4, 32), np.float32),
        "cache": LayerCache(pool[:, 0], pool[:, 1]),
        "block_tables": np.zeros((2, 5), np.int32),
        "query_starts": np.zeros(3, np.int32),
        "context_lens": np.zeros(2, np.int32),
        "y": np.zeros((3, 4, 32), np.float32),
        "workspace": np.zeros(workspace_bytes(3, 4, 2, 32, 2), np.uint8),
    }
    options = {"isa": isa.choose(), "threads": 2, "scale": 1.0}
    attention_arguments(**right, **options)
    odd = np.zeros((4, 2, 16, 2, 33), np.float16)[..., :32]
    locked = np.zeros((3, 4, 32), np.float32)
    locked.flags.writeable = False
    for name, wrong in [
        ("q", right["q"].astype(np.float64)),
        ("q", np.zeros((3, 3, 32), np.float32)),
        ("q", np.zeros((3, 4, 16), np.float32)),
        ("y", np.zeros((2, 4, 32), np.float32)),
        ("y", locked),
        ("block_tables", np.zeros((3, 5), np.int32)),
        ("block_tables", np.zeros((2, 5), np.int64)),
        ("query_starts", np.zeros(2, np.int32)),
        ("workspace", right["workspace"][:-8]),
        ("cache", LayerCache(odd[:, 0], odd[:, 1])),
        ("cache", LayerCache(pool[:, 0], pool[:3, 1])),
    ]:
        with pytest.raises(ValueError, match=r"must|lie|strides|share|read-only"):
            attention_arguments(**{**right, name: wrong}, **options)
    with pytest.raises(UnsupportedError, match="choose"):
        attention_arguments(
            **{**right, "cache": LayerCache(*(x.astype(np.float64) for x in right["cache"]))}, **options
        )


def test_the_workspace_does_not_grow_with_the_context() -> None:
    """It is planned from rows, heads, their size and threads; more threads than rows can use add only scratch."""
    assert workspace_bytes(1, 9, 3, 64, 1) < workspace_bytes(1, 9, 3, 64, 2)
    scratch = workspace_bytes(1, 9, 3, 64, 1)
    assert workspace_bytes(1, 9, 3, 64, 9) - workspace_bytes(1, 9, 3, 64, 8) == scratch
    assert workspace_bytes(512, 9, 3, 64, 1) == scratch


def test_entries_are_compiled_once() -> None:
    """The same entry is the same address."""
    assert (
        entries.entry("attention_arithmetic.tile", isa.choose()).address
        == entries.entry("attention_arithmetic.tile", isa.choose()).address
    )
