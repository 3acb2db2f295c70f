"""Sealed blocks: the golden formats' bytes, whatever is sealed, and the golden numbers, whatever bytes are opened.

The golden formats are held to the specification elsewhere; here steps and codes are computed once more, in
fractions, for numbers that lie next to the middle of two codes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine import ops
from refengine.errors import UnsupportedError
from refengine.ops import LayerCache, SealedLayerCache
from refengine.ops.scratch import Scratch
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES
from refengine_numba import entries
from refengine_numba.kernels.compilation import entry
from refengine_numba.kernels.entry import SIGNATURE, bytes_at, floats_at
from refengine_numba.kernels.unseal import FORMS, BlockSizes, open_rows
from refengine_numba.kv_arguments import kv_seal_arguments

Run = Callable[..., None]
Shape = tuple[int, int, int]

PAIRS = [("int8", "int4"), ("int4", "int8"), ("float16", "float32"), ("float32", "float16")]

shapes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 150))
threads = st.integers(1, 5)
quick = settings(max_examples=25, deadline=None)


@cache
def open_entry(role: str, form: str) -> object:
    """Arguments: data, its bytes, start, P, G, D, head, offset, count, out, its size, at, width."""

    @entry(SIGNATURE)
    def run(thread, threads, a):
        data, out, sizes = bytes_at(a[0], a[1]), floats_at(a[9], a[10]), BlockSizes(a[3], a[4], a[5])
        open_rows(role, form, data, a[2], sizes, a[6], a[7], a[8], out, a[11], a[12])

    return run


def opened(
    role: str,
    form: str,
    data: np.ndarray,
    start: int,
    shape: Shape,
    head: int,
    offset: int,
    count: int,
    call: Run,
) -> np.ndarray:
    """Rows [count, D], from the middle of an array of which nothing else changes."""
    width = shape[2] + 5
    out = np.full(3 + count * width, 1234.5, np.float32)
    numbers = [data.ctypes.data, data.size, start, *shape, head, offset, count]
    words = np.array([*numbers, out.ctypes.data, out.size, 3, width], np.int64)
    call(open_entry(role, form), SimpleNamespace(words=words))
    rows = out[3:].reshape(count, width)
    assert (out[:3] == 1234.5).all()
    assert (rows[:, shape[2] :] == 1234.5).all()
    return rows[:, : shape[2]]


def numbers(rng: np.random.Generator, dtype: str, *shape: int, bad: float = 0.0) -> np.ndarray:
    """Groups of many sizes, to one side of zero or around it, with zeros; some numbers are not finite."""
    spread = 30 if dtype == "float32" else 8
    sizes = np.exp2(rng.uniform(-spread, spread, (*shape[:2], 1, shape[3])))
    x = (rng.standard_normal(shape) + rng.integers(-3, 4, (*shape[:2], 1, 1))) * sizes
    x[rng.random(shape) < 0.05] = 0
    x[rng.random(shape) < bad] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def pools(rng: np.random.Generator, names: tuple[str, str], dtype: str, shape: Shape, bad: float) -> tuple:
    """Exact copies of five blocks, and six sealed ones, in pools that hold other things between them."""
    forms = SEALED_KEYS[names[0]], SEALED_VALUES[names[1]]
    exact = numbers(rng, dtype, 5, 3, *shape[:1], shape[1] * shape[2], bad=bad).reshape(5, 3, *shape)
    keys, values = (form.nbytes(*shape) for form in forms)
    sealed = rng.integers(0, 256, (6, 1 + keys + values), dtype=np.uint8)
    cache = SealedLayerCache(sealed[:, :keys], sealed[:, keys + 1 :], forms)
    return LayerCache(exact[:, 0], exact[:, 2]), cache, sealed


def sealed_bytes(cache: SealedLayerCache) -> list[bytes]:
    """What blocks hold; NaNs of floats are alike (CNV-1)."""
    contents = []
    for stored, form in zip(cache[:2], cache.formats, strict=True):
        content = np.ascontiguousarray(stored)
        if form.name.startswith("float"):
            content = content.view(form.name).copy()
            content[np.isnan(content)] = np.nan
        contents.append(content.tobytes())
    return contents


def seal(
    cache: SealedLayerCache, exact: LayerCache, places: tuple[np.ndarray, ...], call: Run, team: int = 1
) -> None:
    names = [form.name for form in cache.formats]
    call(
        entries.entry("seal.kv_seal", *names, exact.keys.dtype.name),
        kv_seal_arguments(cache, exact, *places),
        team,
    )


def step(*sequences: tuple[list[int], list[int], int, int]) -> tuple[np.ndarray, ...]:
    """Tables, exact tables, rows and contexts, as kernels take them."""
    tables, exact_tables, rows, contexts = zip(*sequences, strict=True)
    starts = np.cumsum([0, *rows])
    return tuple(np.array(x, np.int32) for x in (tables, exact_tables, starts, contexts))


@pytest.mark.parametrize("names", PAIRS, ids="/".join)
@given(st.integers(0, 2**32 - 1), shapes, threads, st.sampled_from(["float32", "float16"]), st.booleans())
@quick
def test_a_step_seals_the_golden_bytes(
    call: Run, names: tuple[str, str], seed: int, shape: Shape, team: int, dtype: str, bad: bool
) -> None:
    """SKV-1 to SKV-6, of blocks that are completed and no others; NaN and infinity, too.

    Entries of tables that the step does not need lie far outside of their pools.
    """
    rng = np.random.default_rng(seed)
    exact, cache, _ = pools(rng, names, dtype, shape, 0.02 * bad)
    size, wild = shape[0], 2**30
    places = step(
        ([4, 1, wild], [0, 3, wild], 2 * size, 2 * size),  # two blocks at once
        ([wild, 5, wild], [wild, 2, wild], 1, 2 * size),  # the last position of the second block
        ([wild] * 3, [wild] * 3, 0, size),  # no rows
        ([wild, wild, 0], [wild, wild, 4], 1, 3 * size),
    )
    golden = SealedLayerCache(cache.keys.copy(), cache.values.copy(), cache.formats)
    with np.errstate(all="ignore"):
        ops.kv_seal(golden, exact, *places)
    seal(cache, exact, places, call, team)
    assert sealed_bytes(cache) == sealed_bytes(golden)


@pytest.mark.parametrize("names", PAIRS, ids="/".join)
def test_a_step_that_fills_no_block_changes_nothing(call: Run, names: tuple[str, str]) -> None:
    """Not even what lies between the layer's blocks; when one is filled, nothing but that."""
    rng = np.random.default_rng(0)
    exact, cache, sealed = pools(rng, names, "float32", (4, 2, 20), 0)
    before = sealed.copy()
    seal(cache, exact, step(([0, 1], [0, 1], 2, 7), ([2, 3], [2, 3], 3, 3)), call, 3)
    assert np.array_equal(sealed, before)
    seal(cache, exact, step(([0, 1], [0, 1], 2, 8), ([2, 3], [2, 3], 3, 3)), call, 3)
    changed = (sealed != before).any(axis=1)
    assert changed.tolist() == [False, True, False, False, False, False]
    assert np.array_equal(sealed[:, cache.keys.shape[1]], before[:, cache.keys.shape[1]])


def least(name: str, low: Fraction, high: Fraction, spread: Fraction) -> int:
    """SKV-4: the byte of the step."""
    h = 128 if name == "int8" else 8
    u = h // 8
    for byte in range(255):
        d = (8 + byte % 8) * Fraction(2) ** (byte // 8 - 23)
        if (2 * h - u) * d >= spread and (127 * u + h - 1) * d >= max(abs(low), abs(high)):
            return byte
    return 255


def defined(name: str, x: np.ndarray) -> tuple[int, int, list[int]]:
    """SKV-4 in fractions: the bytes of step and centre, and codes, of numbers that share them."""
    h = 128 if name == "int8" else 8
    u = h // 8
    low, high = (Fraction(float(n)) for n in (x.min(), x.max()))
    byte = least(name, low, high, Fraction(float(x.max() - x.min())))
    if byte == 255:
        return 255, -128, [-h] * len(x)
    d = (8 + byte % 8) * Fraction(2) ** (byte // 8 - 23)
    centre = min(max((round(low / d) + h) // u, -128), 127)
    codes = [min(max(round(Fraction(float(n)) / d) - u * centre, -h), h - 1) for n in x]
    return byte, centre, codes


def sealed_one(names: tuple[str, str], x: np.ndarray, call: Run) -> SealedLayerCache:
    """A block whose keys and values are both ``x`` [1, P, 1, D]."""
    forms, (_, positions, _, size) = (SEALED_KEYS[names[0]], SEALED_VALUES[names[1]]), x.shape
    stored = [np.zeros((1, form.nbytes(positions, 1, size)), np.uint8) for form in forms]
    cache, exact = SealedLayerCache(*stored, forms), LayerCache(*np.ascontiguousarray([x, x]))
    seal(cache, exact, step(([0], [0], positions, positions)), call)
    return cache


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("byte", [0, 1, 83, 160, 167, 251, 254])
def test_numbers_next_to_the_middle_of_two_codes_go_to_the_right_one(call: Run, name: str, byte: int) -> None:
    """Middles, the float32 numbers on either side of them, and sizes at which the next step begins."""
    h = 128 if name == "int8" else 8
    u, d = h // 8, (8 + byte % 8) * 2.0 ** (byte // 8 - 23)
    rng = np.random.default_rng(byte)
    groups = []
    for base in (-127 * u - h + 1, -h, 0, 100 * u, 127 * u - h + u):
        middles = ((base + rng.integers(0, 2 * h - u, 27) + 0.5) * d).astype(np.float32)
        ends = np.array([base * d, (base + 2 * h - u) * d], np.float32)
        beside = np.concatenate(
            [middles[:9], np.nextafter(middles[9:18], np.inf), np.nextafter(middles[18:], 0)]
        )
        for nudge in (0, 1, -1):
            nudged = np.nextafter(ends, np.float32(nudge * np.inf)) if nudge else ends
            groups.append(np.concatenate([nudged[:1], beside, ends[1:], nudged[1:], beside[:2]]))
    x = np.array(groups, np.float32)
    count, other = len(x), {"int8": "int4", "int4": "int8"}[name]
    keys = sealed_one((name, other), x.T[None, :, None], call).keys[0]
    values = sealed_one((other, name), x[None, :, None], call).values[0]
    for i, row in enumerate(x):
        step_byte, centre, codes = defined(name, row)
        assert step_byte in {byte - 1, byte, byte + 1}
        for block in (keys, values):
            assert (int(block[i]), int(block[count + i].view(np.int8))) == (step_byte, centre)
        stored = keys[2 * count :].reshape(32, -1), values[2 * count :].reshape(count, -1)
        if name == "int8":
            assert stored[0][:, i].view(np.int8).tolist() == codes
            assert stored[1][i].view(np.int8).tolist() == codes
        else:
            half = -(-count // 2)
            nibbles = stored[0][:, i % half] >> (4 if i >= half else 0) & 15
            assert (nibbles.astype(int) - 8).tolist() == codes
            both = np.concatenate([stored[1][i] & 15, stored[1][i] >> 4])
            assert (both.astype(int) - 8).tolist() == codes


def test_float32_quotients_decide_as_exact_ones() -> None:
    """Of every middle of two codes, and of every step's multiple that counts; a power of two changes nothing."""
    middles = np.arange(1, 2 * (127 * 16 + 128), 2) / 2
    for d in range(8, 16):
        at = (middles * d).astype(np.float32)
        assert np.array_equal(at, middles * d)
        above, below = (np.nextafter(at, np.float32(end)) for end in (np.inf, 0))
        assert (above / np.float32(d) > middles).all()
        assert (below / np.float32(d) < middles).all()
    for multiple in (240, 2159, 15, 134):
        reached = np.nextafter(np.arange(8, 16, dtype=np.float32) * multiple, np.float32(np.inf))
        assert (reached / np.float32(multiple) > np.arange(8, 16)).all()


@pytest.mark.parametrize("names", PAIRS[:3], ids="/".join)
def test_every_head_is_sealed_by_one_thread(call: Run, names: tuple[str, str]) -> None:
    """What a thread writes is what no longer depends on what was there: no byte twice, none left out."""
    shape = 4, 3, 24
    forms = SEALED_KEYS[names[0]], SEALED_VALUES[names[1]]
    exact = LayerCache(*numbers(np.random.default_rng(0), "float32", 2, 3, 4, 72).reshape(2, 3, *shape))
    places = step(([4, 1], [0, 2], 8, 8), ([0, 5], [1, 1], 1, 8))
    compiled = entries.entry("seal.kv_seal", *names, "float32")
    for team in (1, 2, 5):
        times = [np.zeros((6, form.nbytes(*shape)), int) for form in forms]
        for thread in range(team):
            caches = [
                SealedLayerCache(*(np.full(t.shape, fill, np.uint8) for t in times), forms)
                for fill in (0x00, 0xFF)
            ]
            for filled in caches:
                words = kv_seal_arguments(filled, exact, *places).words
                compiled.function(thread, team, words.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
            for count, *stored in zip(times, *(filled[:2] for filled in caches), strict=True):
                count += stored[0] == stored[1]
        for count in times:
            assert (count[[1, 4, 5]] == 1).all()
            assert (count[[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("form", FORMS)
@given(st.integers(0, 2**32 - 1), shapes, st.data())
@quick
def test_any_bytes_open_as_the_golden_formats_open_them(
    call: Run, role: str, form: str, seed: int, shape: Shape, data: st.DataObject
) -> None:
    """SKV-1 to SKV-3, bit for bit (NaN is NaN): any head, and any positions of a block in a larger pool."""
    positions, heads, size = shape
    golden = (SEALED_KEYS if role == "keys" else SEALED_VALUES)[form]
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 256, 7 + golden.nbytes(*shape) + 5, dtype=np.uint8)
    pool[7 : 7 + golden.nbytes(*shape) : 41] = 255
    expected = np.empty((1, positions, heads, size), np.float32)
    golden.open(pool[None, 7:-5].copy(), expected, Scratch())
    head, offset = data.draw(st.integers(0, heads - 1)), data.draw(st.integers(0, positions - 1))
    count = data.draw(st.integers(0, positions - offset))
    rows = opened(role, form, pool, 7, shape, head, offset, count, call)
    right = expected[0, offset : offset + count, head]
    assert np.array_equal(np.isnan(rows), np.isnan(right))
    numbers = ~np.isnan(right)
    assert rows[numbers].tobytes() == right[numbers].tobytes()


def test_smaller_steps_write_over_the_sizes_they_name(call: Run) -> None:
    """Fewer sequences and columns than planned: tables are read with the step's own columns."""
    rng = np.random.default_rng(3)
    exact, cache, _ = pools(rng, ("int8", "int4"), "float32", (4, 2, 20), 0)
    planned = step(*[([0] * 5, [0] * 6, 0, 0)] * 3)
    arguments = kv_seal_arguments(cache, exact, *planned, sequences="S", columns="M0", exact_columns="M1")
    assert {symbol: int(arguments.words[at]) for at, symbol in arguments.symbols.items()} == {
        "S": 3,
        "M0": 5,
        "M1": 6,
    }
    smaller = step(([1, 2], [3, 4], 4, 8), ([5, 0], [0, 1], 8, 8))
    golden = SealedLayerCache(cache.keys.copy(), cache.values.copy(), cache.formats)
    ops.kv_seal(golden, exact, *smaller)
    for array, part in zip(planned, smaller, strict=True):
        array.reshape(-1)[: part.size] = part.reshape(-1)
    for at, symbol in arguments.symbols.items():
        arguments.words[at] = 2
        assert symbol in {"S", "M0", "M1"}
    call(entries.entry("seal.kv_seal", "int8", "int4", "float32"), arguments, 2)
    assert sealed_bytes(cache) == sealed_bytes(golden)


# Machines


def checksum(call: Run) -> int:
    """Of what is sealed, and what is opened again, in every format."""
    rng, total = np.random.default_rng(0), 0
    for names, dtype in (*((names, "float32") for names in PAIRS[:3]), (PAIRS[0], "float16")):
        for shape in ((3, 2, 37), (16, 1, 64)):
            exact, cache, _ = pools(rng, names, dtype, shape, 0)
            seal(cache, exact, step(([4, 1], [0, 3], 2 * shape[0], 2 * shape[0])), call, 2)
            for content in sealed_bytes(cache):
                total = zlib.crc32(content, total)
            for role, stored, name in zip(("keys", "values"), cache[:2], names, strict=True):
                rows = opened(role, name, stored[4].copy(), 0, shape, shape[1] - 1, 1, shape[0] - 1, call)
                total = zlib.crc32(np.nan_to_num(rows).tobytes(), total)
    return total


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from numba_backend.conftest import run
from numba_backend.test_seal import checksum
print(checksum(run))
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"NUMBA_BOUNDSCHECK": "1"},
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2,+sse4.1,+avx,+avx2,+fma,+f16c"},
    ],
    ids=["checked", "sse2", "avx2"],
)
def test_every_instruction_set_gives_the_same_bytes(variables: dict[str, str], call: Run) -> None:
    """With bounds checked and nothing found, and on lesser processors."""
    if "NUMBA_CPU_NAME" in variables and os.uname().machine != "x86_64":
        pytest.skip("these are names of x86 features")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(Path(__file__).parents[1]))],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{checksum(call)}\n"), done.stderr
    assert "Error" not in done.stderr  # of a kernel that leaves its arrays


# The door


def test_pools_that_do_not_fit_are_refused() -> None:
    """Dtypes, shapes, strides, formats that have no kernels, and memory that cannot be written."""
    exact, cache, _ = pools(np.random.default_rng(0), ("int8", "int4"), "float32", (4, 2, 20), 0)
    places = step(([0, 1], [0, 1], 2, 7))
    assert len(kv_seal_arguments(cache, exact, *places).words) == 20
    keys, values, forms = cache
    with pytest.raises(ValueError, match="are no blocks of int8"):
        kv_seal_arguments(SealedLayerCache(keys[:, :-1], values, forms), exact, *places)
    with pytest.raises(ValueError, match="are no blocks of int4"):
        kv_seal_arguments(SealedLayerCache(keys, values.astype(np.int16), forms), exact, *places)
    with pytest.raises(UnsupportedError, match="no kernels"):
        kv_seal_arguments(SealedLayerCache(keys, values, (object(), forms[1])), exact, *places)
    with pytest.raises(UnsupportedError, match="no kernels"):
        kv_seal_arguments(cache, LayerCache(*(x.astype(np.float64) for x in exact)), *places)
    for i in range(4):
        wrong = [*places]
        wrong[i] = wrong[i].astype(np.int64)
        with pytest.raises(ValueError, match="must be C-contiguous"):
            kv_seal_arguments(cache, exact, *wrong)
    keys.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        kv_seal_arguments(cache, exact, *places)
    with pytest.raises(KeyError):
        entries.entry("seal.kv_seal", "int8", "int2", "float32")
