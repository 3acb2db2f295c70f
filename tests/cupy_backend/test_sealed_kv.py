"""Sealed keys and values on the device: bytes of the golden op, and attention over what they open to."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedRuntime
from numpy.typing import NDArray

from refengine import ops
from refengine.ops import LayerCache, SealedLayerCache
from refengine.program import POLICIES
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES
from refengine_conformance.naive_model import Sealing
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.properties.p05_attention import softmax_means
from refengine_conformance.sequences import Attending, Piece, Sequences
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy.backend import CupyBackend
from refengine_cupy.kv import LayerPlace
from refengine_cupy.launches import launch
from refengine_cupy.sealed import SEALED_TILE_BYTES, reads_words
from refengine_cupy.source import Kernel, formats_name, text_of
from refengine_cupy.step_arrays import shape_of

PAIRS = [("int8", "int8"), ("int8", "int4"), ("int4", "int8"), ("float16", "int4"), ("int4", "float32")]

AWKWARD = [np.nan, np.inf, -np.inf, 3e38, 6e5, 65519.0, 65520.0, 5e4, 1e-45, -0.0, 0.0, 2.0**-21]
"""Not numbers, beyond every step, beyond float16, and below the least step."""


class Device:
    """Starts the backend, and remembers the devices."""

    def __init__(self) -> None:
        self.subject = Subject(self._start)
        self.runtimes: list[EmulatedRuntime] = []

    def launched(self, part: str) -> set[str]:
        return {name for runtime in self.runtimes for name in runtime.launched if part in name}

    def _start(self) -> CupyBackend:
        self.runtimes.append(EmulatedRuntime())
        return CupyBackend(self.runtimes[-1])


def sequences(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    sealed: tuple[str, str],
    block_size: int,
    window: int | None = None,
    softcap: float | None = None,
    dtype: type[np.floating] = np.float32,
) -> Sequences:
    """Sequences whose keys have channels to one side of zero; exact copies are of a dtype that holds them."""
    rng = np.random.default_rng((sum(lengths), *heads, block_size))
    query_heads, kv_heads, size = heads
    q, k, v = (
        rng.standard_normal((sum(lengths), count, size)).astype(np.float32)
        for count in (query_heads, kv_heads, kv_heads)
    )
    k += rng.standard_normal(k.shape[1:]).astype(np.float32) * 3
    k, v = (x.astype(dtype).astype(np.float32) for x in (k, v))
    return Sequences(lengths, q, k, v, block_size, size**-0.5, window, softcap, sealed, np.dtype(dtype))


def pieces(case: Sequences, size: int) -> list[list[Piece]]:
    return [
        [Piece(s, start, min(start + size, length)) for start in range(0, length, size)]
        for s, length in enumerate(case.lengths)
    ]


def copies(rng: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> NDArray[np.floating]:
    """Exact copies of six blocks, [6, P, G, D]: channels of all sizes, equal numbers, middles, awkward ones."""
    _, heads, size = shape
    x = rng.standard_normal((6, *shape)) * 10.0 ** rng.integers(-7, 4, (6, 1, heads, size))
    x += rng.standard_normal((6, 1, heads, size)) * rng.choice([0, 1, 300], (6, 1, 1, 1))
    x[0] = np.round(x[0] * 4) / 8  # quotients in the middle of two codes
    x[1, :, :, ::2] = x[1, :1, :, :1]
    x[2] = 0
    for channel, reached in enumerate(
        (2159, 134)
    ):  # what a centre reaches by steps of 1, and the next number
        x[2, :, :, 2 * channel] = reached
        x[2, :, :, 2 * channel + 1] = np.nextafter(np.float32(reached), np.float32(np.inf))
    for awkward in AWKWARD:
        x[rng.integers(3, 5), *rng.integers(0, shape)] = awkward
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def contents(cache: SealedLayerCache) -> list[bytes]:
    """What blocks hold; NaN has many forms."""
    held = []
    for stored, form in zip(cache[:2], cache.formats, strict=True):
        content = np.ascontiguousarray(stored)
        if form.name.startswith("float"):
            content = content.view(form.name).copy()
            content[np.isnan(content)] = np.nan
        held.append(content.tobytes())
    return held


@pytest.mark.parametrize("stretch", [1, 3, 16])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sealed", [*PAIRS, ("float32", "float16")])
def test_sealed_blocks_have_the_golden_bytes(sealed: tuple[str, str], dtype: str, stretch: int) -> None:
    """And nothing else is written, however a step's tokens are shared out."""
    rng = np.random.default_rng(len(dtype))
    forms = SEALED_KEYS[sealed[0]], SEALED_VALUES[sealed[1]]
    for positions, heads, size in [(1, 1, 5), (3, 2, 33), (16, 2, 80)]:
        exact = LayerCache(
            copies(rng, (positions, heads, size), dtype), copies(rng, (positions, heads, size), dtype)
        )
        ours, golden = (
            SealedLayerCache(
                *(np.full((7, form.nbytes(positions, heads, size)), 0xA5, np.uint8) for form in forms), forms
            )
            for _ in range(2)
        )
        # Two sequences: one has two and a half blocks before the step, the other begins; and no block is filled
        # by the tokens at the end of either.
        lengths, ends = (
            [3 * positions, 2 * positions - 1],
            [3 * positions + positions // 2, 2 * positions - 1],
        )
        if positions == 1:
            lengths, ends = [3, 1], [3, 1]
        starts = np.array([0, *np.cumsum(lengths)], np.int32)
        tables = np.array([[6, 0, 5, 2], [3, 1, -1, -1]], np.int32)
        exact_tables = np.array([[0, 1, 2, 5], [3, 4, -1, -1]], np.int32)
        ops.kv_seal(golden, exact, tables, exact_tables, starts, np.array(ends))
        runtime = EmulatedRuntime()
        rows = np.repeat([0, 1], lengths).astype(np.int32)
        at = np.concatenate([np.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)]).astype(
            np.int32
        )
        stored = exact.keys.nbytes // 6
        both = np.concatenate([ours.keys, ours.values], axis=1)
        together = np.stack([exact.keys, exact.values], axis=1)
        kernel = Kernel("seal", "kv_seal", "Seal", 128, formats_name(*sealed, dtype, even=False))
        runtime.launch([
            launch(
                kernel, (-(-len(at) // stretch), heads, 2), exact_keys=together.ctypes.data,
                exact_values=together.ctypes.data + stored, keys=both.ctypes.data,
                values=both.ctypes.data + ours.keys.shape[1], exact_tables=exact_tables.ctypes.data,
                tables=tables.ctypes.data, sequences=rows.ctypes.data, positions=at.ctypes.data,
                exact_block_bytes=2 * stored, block_bytes=both.shape[1], tokens=len(at), blocks=4,
                kv_heads=heads, size=size, block_size=positions, stretch=stretch,
            )
        ])  # fmt: skip
        cut = ours.keys.shape[1]
        written = ours._replace(keys=both[:, :cut], values=both[:, cut:])
        assert contents(written) == contents(golden)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("sealed", PAIRS)
def test_a_prompt_has_the_same_bits_however_it_is_cut(
    sealed: tuple[str, str], dtype: type[np.floating]
) -> None:
    """By tiles of queries, in chunks, and token by token, with the context cut up and not."""
    device, case = Device(), sequences((150,), (4, 2, 32), sealed, 16, dtype=dtype)
    (whole,) = Attending(device.subject, case).step(case.whole)
    for size in (40, 5, 1):
        (parts,) = Attending(device.subject, case).steps(pieces(case, size))
        assert np.isfinite(parts).all()
        assert parts.tobytes() == whole.tobytes(), size
    assert device.launched("attention") >= {
        "attention_sealed", "attention_sealed_split", "attention_sealed_tiles",
    }  # fmt: skip


SHAPES = [
    ((140, 3), (2, 1, 16), 16, None, None),
    ((270,), (1, 1, 64), 48, 100, None),
    ((200,), (2, 2, 128), 160, None, 2.0),
    ((200, 30), (4, 1, 32), 16, 20, None),
    ((40,), (2, 1, 256), 16, None, None),
    ((150,), (2, 2, 24), 7, 50, 3.0),
    ((30, 9), (3, 3, 5), 3, None, None),
]
"""Lengths, heads and their size, block size, window and cap."""


@pytest.mark.parametrize(("lengths", "heads", "block_size", "window", "softcap"), SHAPES)
@pytest.mark.parametrize(
    ("sealed", "dtype"), [(("int8", "int8"), np.float16), (("int4", "int4"), np.float32)]
)
def test_attention_over_a_sealed_cache_is_that_over_what_it_opens_to(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    sealed: tuple[str, str],
    dtype: type[np.floating],
) -> None:
    """Within the bound of a loop in float64; and the same bits by chunks of 60 and of 7."""
    device, case = Device(), sequences(lengths, heads, sealed, block_size, window, softcap, dtype)
    found = Attending(device.subject, case).step(case.whole)
    for size in (60, 7):
        parts = Attending(device.subject, case).steps(pieces(case, size))
        assert [y.tobytes() for y in parts] == [y.tobytes() for y in found]
    sealing = Sealing(sealed, block_size)
    for number, y in enumerate(found):
        k, v = (a[case.rows(number)].astype(np.float64) for a in (case.k, case.v))
        read = sealing.read("keys", k), sealing.read("values", v)
        expected, bound = softmax_means(case, number, 2.0**-24 + 2.0**-53, read)
        assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("sealed", [("int8", "float32"), ("int4", "float16"), ("float16", "float32")])
def test_floats_may_lie_at_any_byte(sealed: tuple[str, str]) -> None:
    """Behind keys of an odd number of bytes, or of halves: the played device refuses misaligned reads and writes."""
    device, case = Device(), sequences((12,), (1, 1, 5), sealed, 3)
    keys = SEALED_KEYS[sealed[0]].nbytes(positions=3, kv_heads=1, head_size=5)
    assert keys % np.dtype(sealed[1]).itemsize
    y = Attending(device.subject, case).step(case.whole)[0]
    sealing = Sealing(sealed, 3)
    read = sealing.read("keys", case.k.astype(np.float64)), sealing.read("values", case.v.astype(np.float64))
    expected, bound = softmax_means(case, 0, 2.0**-24 + 2.0**-53, read)
    assert (np.abs(y - expected) <= bound).all()


def test_plain_and_sealed_caches_give_the_same_bits_where_sealing_changes_nothing() -> None:
    """Sealed float32, read beside exact copies, against attention over a plain cache."""
    device, case = Device(), sequences((150, 20), (4, 2, 32), ("float32", "float32"), 16)
    sealed = Attending(device.subject, case).step(case.whole)
    plain = Attending(device.subject, replace(case, sealed=None)).step(case.whole)
    assert [y.tobytes() for y in sealed] == [y.tobytes() for y in plain]


@pytest.mark.parametrize("policy", ["mixed8", "mixed16"])
@pytest.mark.parametrize("sealed", [("int8", "int8"), ("int4", "int4")])
def test_a_models_logits_do_not_depend_on_the_schedule(sealed: tuple[str, str], policy: str) -> None:
    """A prompt alone in one step, and in pieces with another's beside them."""
    rng = np.random.default_rng(0)
    ids = tuple(tuple(rng.integers(0, 97, length).tolist()) for length in (70, 5))
    prompts = Prompts(tiny_model(vocabulary_size=97), ids, block_size=16, sealed=sealed)
    subject = Subject(Device().subject.start, policy=POLICIES[policy])
    whole = Prompting(subject, prompts).step(prompts.whole[:1])[0]
    running, parts = Prompting(subject, replace(prompts, order=1)), []
    for number, (start, stop) in enumerate(pairwise((0, 1, 30, 31, 33, 70))):
        parts.append(running.step([Chunk(1, number, number + 1), Chunk(0, start, stop)])[1])
    assert np.isfinite(whole).all()
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_a_step_that_fills_no_block_seals_nothing() -> None:
    device = Device()
    prompts = Prompts(tiny_model(), (tuple(range(1, 10)),), block_size=4, sealed=("int8", "int8"))
    prompting, layers = Prompting(device.subject, prompts), len(prompts.model.spec.layers)
    counts = []
    for position in range(9):
        prompting.step([Chunk(0, position, position + 1)])
        counts.append(device.runtimes[0].launched.count("kv_seal"))
    assert np.diff([0, *counts]).tolist() == [0, 0, 0, layers, 0, 0, 0, layers, 0]
    layout = prompts.layout(POLICIES["float32"])
    assert [shape_of(prompts.batch([Chunk(0, p, p + 1)]), layout).fills for p in (2, 3, 4)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("block_size", "size", "formats", "even"),
    [
        (16, 64, ("int8", "int4"), True),
        (48, 24, ("int8", "int8"), True),
        (48, 24, ("int8", "int4"), False),
        (8, 64, ("int8", "int8"), False),
        (16, 36, ("int8", "int8"), False),
    ],
)
def test_words_are_read_where_nothing_is_cut(
    block_size: int, size: int, formats: tuple[str, str], even: bool
) -> None:
    sealed, exact = LayerPlace(1024, 2048, 4096, 1, size, formats), LayerPlace(0, 4096, 8192, 1, size)
    assert reads_words(sealed, exact, block_size) is even
    assert not reads_words(replace(sealed, values=2052), exact, block_size)
    assert not reads_words(sealed, replace(exact, block_bytes=8200), block_size)


def test_a_tile_of_queries_takes_the_shared_memory_that_is_asked_for(tmp_path: Path) -> None:
    header, source, program = Path(__file__).with_name("emulation.h"), tmp_path / "s.cpp", tmp_path / "s"
    text = text_of("attention_sealed_tiles", formats_name("int8", "int4", "float16", even=True))
    source.write_text(
        f'#include "{header}"\n{text}\n#include <cstdio>\n'
        'int main() { printf("%zu", sizeof(SealedTileMemory)); }\n'
    )
    subprocess.run(
        ["g++", "-std=c++17", "-w", "-fno-strict-aliasing", str(source), "-o", str(program)], check=True
    )
    needed = int(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)
    assert needed <= SEALED_TILE_BYTES < needed + 16
