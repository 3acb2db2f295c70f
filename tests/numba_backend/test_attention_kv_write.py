"""Keys and values go to their slots as the golden op puts them there, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refengine.ops import LayerCache, kv_write
from refengine.quantizer.finite import TOO_LARGE
from refengine_numba import entries
from refengine_numba.kv_arguments import kv_write_arguments
from refengine_numba.kv_pool import pool_of

Run = Callable[..., None]


def written(
    cache: LayerCache, k: np.ndarray, v: np.ndarray, slots: np.ndarray, call: Run, threads: int = 1
) -> None:
    call(
        entries.entry("kv_write.kv_write", pool_of(cache).kind),
        kv_write_arguments(cache, k, v, slots),
        threads,
    )


def pools(blocks: int, block_size: int, kv_heads: int, size: int, dtype: type) -> list[np.ndarray]:
    """Two alike, full of bytes that should stay."""
    content = np.random.default_rng(size).integers(0, 60, (blocks, 3, block_size, kv_heads, size))
    return [content.astype(dtype), content.astype(dtype)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("kv_heads", "size"), [(3, 64), (2, 13), (1, 1), (1, 40)])
def test_slots_hold_what_the_golden_op_writes(
    kv_heads: int, size: int, dtype: type, threads: int, call: Run
) -> None:
    """Bit for bit, at random slots of a strided pool; all other bytes stay."""
    rng = np.random.default_rng(threads)
    k, v = (rng.standard_normal((37, kv_heads, size)).astype(np.float32) * s for s in (1, 1e-6))
    slots = rng.permutation(9 * 7)[:37].astype(np.int32)
    pool, golden = pools(9, 7, kv_heads, size, dtype)
    written(LayerCache(pool[:, 0], pool[:, 2]), k, v, slots, call, threads)
    kv_write(LayerCache(golden[:, 0], golden[:, 2]), k, v, slots)
    assert pool.tobytes() == golden.tobytes()


def test_every_float16_rounding_is_the_nearest(call: Run) -> None:
    """All float16 numbers, the middles between them, and the neighbours of both: the bits NumPy rounds to.

    From 65,520 on, NumPy has infinity and the cache NaN.
    """
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 65536
    middles = (halves[1:] + halves[:-1]) / 2
    numbers = np.concatenate([halves, middles])
    numbers = np.concatenate(
        [numbers, np.nextafter(numbers, np.float32(0)), np.nextafter(numbers, np.float32(1e9))]
    )
    numbers = np.concatenate([numbers, -numbers, np.float32([1e30, -1e30, np.inf, -np.inf, np.nan])])
    numbers = np.resize(numbers, (-(-len(numbers) // 61), 1, 61))
    pool = np.zeros((len(numbers), 2, 1, 1, 61), np.float16)
    slots = np.arange(len(numbers), dtype=np.int32)
    written(LayerCache(pool[:, 0], pool[:, 1]), numbers, numbers, slots, call)
    with np.errstate(over="ignore"):
        rounded = numbers[:, None].astype(np.float16)
    lost = ~(np.abs(numbers[:, None]) < TOO_LARGE)
    assert np.array_equal(lost, ~np.isfinite(rounded))
    for stored in (pool[:, 0], pool[:, 1]):
        assert np.isnan(stored[lost]).all()
        assert stored[~lost].tobytes() == rounded[~lost].tobytes()


CHECKED = """
import sys
sys.path[:0] = {folders!r}
import numpy as np
from conftest import run
from test_attention_kv_write import LayerCache, pools, written
for kind in ("f2", "f4"):
    for size in (64, 13):
        pool, _ = pools(5, 16, 2, size, kind)
        k = np.ones((80, 2, size), np.float32)
        written(LayerCache(pool[:, 1], pool[:, 2]), k, k, np.arange(80, dtype=np.int32), run, 2)
print("done")
"""


def test_no_kernel_leaves_its_arrays() -> None:
    """Compiled with bounds checking, every access is inside."""
    code = CHECKED.format(folders=[str(Path(__file__).parents[i]) for i in (0, 1)])
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, "Error" in done.stderr) == (0, "done\n", False), done.stderr


def test_only_arrays_of_the_right_kind_reach_a_kernel() -> None:
    """Shapes, dtypes and strides are checked before an address is formed."""
    pool = np.zeros((4, 2, 16, 2, 32), np.float16)
    cache = LayerCache(pool[:, 0], pool[:, 1])
    k, slots = np.zeros((3, 2, 32), np.float32), np.zeros(3, np.int32)
    assert kv_write_arguments(cache, k, k, slots, rows="T").symbols == {6: "T"}
    locked = pool.copy()
    locked.flags.writeable = False
    for wrong in [
        (cache, k[:2], k, slots),
        (cache, k, k.astype(np.float64), slots),
        (cache, k[:, :, ::-1], k, slots),
        (cache, k, k, slots.astype(np.int64)),
        (LayerCache(locked[:, 0], locked[:, 1]), k, k, slots),
    ]:
        with pytest.raises(ValueError, match=r"must|read-only"):
            kv_write_arguments(*wrong)
