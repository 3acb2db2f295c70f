"""Attention by matrix units: its bound, bits that no company changes, and numbers that spoil who sees them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedBackend, EmulatedRuntime, NarrowRuntime
from numpy.typing import NDArray

from refengine.program import POLICIES
from refengine_conformance.outcome import Task
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.properties.p05_attention import softmax_means
from refengine_conformance.registry import Property, all_properties
from refengine_conformance.runner import Worker
from refengine_conformance.sequences import Attending, Piece, Sequences
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy.attention import groups_bytes, halves_bytes
from refengine_cupy.backend import CupyBackend
from refengine_cupy.launches import launch
from refengine_cupy.source import Kernel, structures, text_of

HALF, U = np.dtype(np.float16), 2.0**-24 + 2.0**-53

SHAPES = [
    ((140,), (2, 2, 8), 16, None, None),
    ((150,), (3, 1, 16), 5, None, 2.0),
    ((141, 9), (2, 1, 20), 4, None, None),
    ((200,), (4, 1, 64), 16, 60, None),
    ((150,), (1, 1, 80), 16, None, 30.0),
    ((270, 33), (2, 2, 128), 16, 130, None),
    ((140,), (8, 1, 128), 48, None, None),
    ((131,), (20, 1, 24), 7, None, None),
    ((130,), (1, 1, 5), 3, 129, None),
]
"""Lengths, heads and their size, block size, window and cap."""


class OlderRuntime(EmulatedRuntime):
    """Of a device whose matrix units warps use by themselves."""

    warpgroups = False


TILES = {EmulatedRuntime: "attention_halves_groups", OlderRuntime: "attention_halves_tiles"}
"""What computes tiles of queries, by device."""


class Device:
    """Starts the backend, and remembers what it launched."""

    def __init__(self, runtime: type[EmulatedRuntime] = EmulatedRuntime, policy: str = "float32") -> None:
        self.runtimes: list[EmulatedRuntime] = []
        self._runtime = runtime
        self.subject = Subject(self._start, policy=POLICIES[policy])

    def launched(self) -> set[str]:
        names = (name for runtime in self.runtimes for name in runtime.launched)
        return {name for name in names if name.startswith("attention")}

    def _start(self) -> CupyBackend:
        self.runtimes.append(self._runtime())
        return CupyBackend(self.runtimes[-1])


def sequences(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
) -> Sequences:
    """Sequences whose keys and values are float16; some rows of queries are far larger than others."""
    rng = np.random.default_rng((sum(lengths), *heads, block_size))
    query_heads, kv_heads, size = heads
    q, k, v = (
        rng.standard_normal((sum(lengths), count, size)).astype(np.float32)
        for count in (query_heads, kv_heads, kv_heads)
    )
    q *= np.exp(rng.standard_normal((len(q), query_heads, 1))).astype(np.float32)
    k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
    return Sequences(lengths, q, k, v, block_size, size**-0.5, window, softcap, dtype=HALF)


def pieces(case: Sequences, sizes: Sequence[int]) -> list[list[Piece]]:
    """Each sequence in pieces of so many tokens, the last size again and again."""
    cut = []
    for s, length in enumerate(case.lengths):
        edges = [0]
        while edges[-1] < length:
            edges.append(min(length, edges[-1] + sizes[min(len(edges) - 1, len(sizes) - 1)]))
        cut.append([Piece(s, a, b) for a, b in pairwise(edges)])
    return cut


def bits(results: Sequence[NDArray[np.floating]]) -> list[bytes]:
    return [y.tobytes() for y in results]


@pytest.mark.parametrize("runtime", TILES)
@pytest.mark.parametrize(("lengths", "heads", "block_size", "window", "softcap"), SHAPES)
def test_results_keep_their_bound_and_a_query_its_bits(
    runtime: type[EmulatedRuntime],
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Those of a loop in float64; by tiles, by tokens, and by tokens whose contexts are cut up."""
    case, device = sequences(lengths, heads, block_size, window, softcap), Device(runtime)
    whole = Attending(device.subject, case).step(case.whole)
    padded = 64 if heads[2] <= 64 else 128
    assert device.launched() == {f"{TILES[runtime]}_{padded}"}
    for number, y in enumerate(whole):
        expected, bound = softmax_means(case, number, U)
        assert (np.abs(y - expected) <= bound).all()
    single = Device(runtime)
    for sizes in ((60, 7), (max(lengths) - 9, 1), (9, max(lengths))):
        assert bits(Attending(single.subject, case).steps(pieces(case, sizes))) == bits(whole)
    assert f"attention_halves_split_{padded}" in single.launched()


def test_company_of_many_sequences_changes_no_bit() -> None:
    """So many that contexts are not cut up."""
    lengths = (140, *[3] * 70)
    case, device = sequences(lengths, (8, 8, 16)), Device()
    attending = Attending(device.subject, case)
    attending.step([Piece(s, 0, length - 1) for s, length in enumerate(lengths)])
    last = [Piece(s, length - 1, length) for s, length in enumerate(lengths)]
    together = attending.step(last)
    assert "attention_halves_64" in device.launched()
    alone = [attending.step([piece])[0] for piece in last[:3]]
    assert "attention_halves_split_64" in device.launched()
    assert bits(together[:3]) == bits(alone)


def test_queries_of_any_size_are_weighed() -> None:
    """Keys are all alike, so that results are means of values; and a power of two changes nothing."""
    case, device = sequences((150,), (2, 1, 32)), Device()
    sizes = np.ones((150, 2, 1), np.float32)
    sizes[::3], sizes[1::3] = 1e30, 1e-30
    alike = replace(case, q=case.q * sizes, k=np.repeat(case.k[:1], 150, axis=0))
    (y,) = Attending(device.subject, alike).step(case.whole)
    counts = np.arange(1, 151)[:, None, None]
    means, reach = (np.cumsum(v.astype(np.float64), axis=0) / counts for v in (case.v, np.abs(case.v)))
    assert (np.abs(y - means) <= (20 * counts + 10) * U * reach).all()
    (plain,) = Attending(device.subject, case).step(case.whole)
    for power in (2.0**-90, 2.0**90):
        other = replace(case, q=case.q * np.float32(power), scale=case.scale / power)
        assert Attending(device.subject, other).step(case.whole)[0].tobytes() == plain.tobytes()


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tiles", [*TILES.values(), None])
def test_a_query_that_is_no_number_spoils_no_other(spoilt: float, tiles: str | None) -> None:
    """Of twenty query heads of one key head, one; of twenty queries, one."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((20, 20, 24)).astype(np.float32)
    kv = rng.standard_normal((2, 2, 16, 1, 24)).astype(np.float16)
    whole = attended(q, kv, tiles=tiles)
    q[7, 3, 5] = spoilt
    y = attended(q, kv, tiles=tiles)
    assert np.isnan(y[7, 3]).all()
    whole[7, 3] = np.nan
    assert np.array_equal(y, whole, equal_nan=True)


def attended(q: NDArray[np.float32], kv: NDArray[np.float16], *, tiles: str | None) -> NDArray[np.float32]:
    """The first tokens of one sequence, over keys and values ``[2, blocks, P, G, D]``, by a module of tiles."""
    tokens, heads = q.shape[:2]
    y, few, tile = np.zeros_like(q), *halves_bytes(64)
    arrays = {
        "sequences": np.zeros(tokens, np.int32),
        "positions": np.arange(tokens, dtype=np.int32),
        "query_starts": np.array([0, tokens], np.int32),
        "query_tiles": np.zeros(1, np.int32),
        "tables": np.arange(kv.shape[1], dtype=np.int32),
    }
    given = attention_arguments(q, kv, y, arrays)
    name, threads, shared = {
        None: ("attention_halves", 128, few),
        "attention_halves_tiles": ("attention_halves_tiles", 128, tile),
        "attention_halves_groups": ("attention_halves_groups", 384, groups_bytes(64)),
    }[tiles]
    kernel = Kernel(name, f"{name}_64", "Attention", threads, shared=shared)
    grid = (1, heads, 1) if tiles else (1, kv.shape[3], tokens)
    EmulatedRuntime().launch([launch(kernel, grid, **given)])
    return y


def attention_arguments(
    q: NDArray[np.float32],
    kv: NDArray[np.float16],
    y: NDArray[np.float32],
    arrays: dict[str, NDArray[Any]],
    **numbers: float,
) -> dict[str, float]:
    tokens, heads, size = q.shape
    block_size, kv_heads = kv.shape[2:4]
    arrays = {"q": q, "keys": kv[0], "values": kv[1], "y": y, **arrays}
    return {
        **dict.fromkeys(structures()["Attention"], 0),
        **{name: array.ctypes.data for name, array in arrays.items()},
        **{"block_bytes": kv[0, 0].nbytes, "tokens": tokens, "heads": heads, "scale": 0.2, "partitions": 1},
        **{"kv_heads": kv_heads, "size": size, "block_size": block_size},
        "blocks": arrays["tables"].shape[-1],
        **numbers,
    }


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "dims", "block_size", "window"),
    [
        ((2, 2, 8), 8, 16, 0),
        ((3, 1, 20), 12, 5, 0),
        ((20, 1, 64), 64, 16, 40),
        ((4, 2, 80), 80, 16, 0),
        ((2, 1, 128), 64, 7, 130),
        ((1, 1, 128), 128, 16, 0),
    ],
)
def test_turning_and_storing_on_the_way_changes_no_bit(
    heads: tuple[int, int, int], dims: int, block_size: int, window: int, blocks: int
) -> None:
    """Queries, and what the cache holds then: against two kernels, one after the other; keys beyond float16."""
    rng, (query_heads, kv_heads, size) = np.random.default_rng(dims), heads
    positions = np.array([0, 127, 128, 150, 300], np.int32)
    split = blocks > 1
    tokens, columns, padded = len(positions), -(-301 // block_size), 64 if size <= 64 else 128
    tables = rng.permutation(tokens * columns).reshape(tokens, columns).astype(np.int32)
    slots = tables[np.arange(tokens), positions // block_size] * block_size + positions % block_size
    q, k, v = (
        rng.standard_normal((tokens, count, size)).astype(np.float32)
        for count in (query_heads, kv_heads, kv_heads)
    )
    k[3, 0, 1], v[4, 0, 2] = 1e6, -7e4
    kv = rng.standard_normal((2, tokens * columns, block_size, kv_heads, size)).astype(np.float16)
    turns = rng.uniform(-1, 1, (tokens, dims)).astype(np.float32)
    arrays = {
        "sequences": np.arange(tokens, dtype=np.int32),
        "positions": positions,
        "query_starts": np.arange(tokens + 1, dtype=np.int32),
        "tables": tables,
        "partials": np.full((tokens, query_heads, 4, size + 2), np.nan, np.float32),
        "counters": np.zeros((tokens, kv_heads), np.int32),
    }
    results = []
    for turning in (False, True):
        cache, turned, y = kv.copy(), np.full_like(q, np.nan), np.full_like(q, np.nan)
        new = {"new_keys": k, "new_values": v, "turns": turns, "slots": slots.astype(np.int32)}
        given = attention_arguments(
            q if turning else turned, cache, y, arrays | (new if turning else {}),
            partitions=4 if split else 1, window=window, dims=dims, halves=1,
        )  # fmt: skip
        name = f"attention_halves_{'turning_' if turning else ''}{'split_' if split else ''}{padded}"
        kernel = Kernel("attention_halves", name, "Attention", 128, shared=halves_bytes(padded)[0])
        launches = [launch(kernel, (blocks, kv_heads, tokens), **given)]
        if not turning:
            rope = launch(
                Kernel("elementwise", "rope_and_store_f16", "Rope", 256),
                (-(-(query_heads + 2 * kv_heads) * size // 512), tokens, 1),
                q=q.ctypes.data, k=k.ctypes.data, v=v.ctypes.data, table=turns.ctypes.data,
                slots=new["slots"].ctypes.data, q_out=turned.ctypes.data, keys=cache[0].ctypes.data,
                values=cache[1].ctypes.data, block_bytes=cache[0, 0].nbytes, heads=query_heads,
                kv_heads=kv_heads, size=size, dims=dims, halves=1, block_size=block_size,
            )  # fmt: skip
            launches.insert(0, rope)
        EmulatedRuntime().launch(launches)
        assert not arrays["counters"].any()
        results.append((y, cache))
    assert np.array_equal(results[0][0], results[1][0], equal_nan=True)
    assert np.isfinite(results[0][0][:3]).all()
    assert results[0][1].tobytes() == results[1][1].tobytes()


@pytest.mark.parametrize("policy", ["mixed8", "mixed16"])
def test_a_model_that_generates_turns_on_the_way(policy: str) -> None:
    """Steps of one token each have the bits of a whole prompt."""
    rng, device = np.random.default_rng(0), Device(policy=policy)
    ids = tuple(tuple(rng.integers(0, 90, length).tolist()) for length in (150, 20))
    prompts = Prompts(tiny_model(), ids, block_size=16)
    whole = Prompting(device.subject, prompts).step(prompts.whole)[0]
    assert not any("turning" in name for name in device.launched())
    running = Prompting(device.subject, prompts)
    parts = [running.step([Chunk(0, 0, 126), Chunk(1, 0, 10)])[0]]
    for position in range(126, 132):
        beside = [Chunk(1, position - 116, position - 115)] if position % 2 else []
        if position == 129:
            beside = [Chunk(1, 12, 15)]  # a step in which not every sequence has one token
        parts.append(running.step([Chunk(0, position, position + 1), *beside])[0])
    assert {"attention_halves_turning_64", "attention_halves_turning_split_64"} <= device.launched()
    assert np.concatenate(parts).tobytes() == whole[:132].tobytes()


LAWS = [
    item for item in all_properties() if item.clause in {f"ATT-{n}" for n in (1, 2, 8, 9, 10, 11, 12, 13)}
]


@dataclass(frozen=True)
class HalfSubject:
    """Makes the backend on the played device, with float16 caches wherever nothing else is said."""

    def __call__(self) -> Subject:
        return Subject(EmulatedBackend, policy=replace(POLICIES["float32"], kv=HALF))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.mark.parametrize("law", LAWS, ids=lambda item: item.id)
def test_the_laws_of_the_shared_suite_hold(law: Property, worker: Worker) -> None:
    """Those that do not compare with numbers that a float16 cache has rounded."""
    outcome = worker.hold(Task(HalfSubject(), law.id, 6, 0, 240.0))
    assert outcome.kind == "passed", f"{outcome.message}\n{outcome.example}"


@pytest.mark.parametrize("runtime", TILES)
@pytest.mark.parametrize("window", [None, 40])
def test_a_number_that_is_none_spoils_who_sees_it(window: int | None, runtime: type[EmulatedRuntime]) -> None:
    """In the diagonal partition, at a window's edge, and in partitions that all queries of a tile see."""
    case, device = sequences((300,), (2, 1, 40), window=window), Device(runtime)
    (whole,) = Attending(device.subject, case).step(case.whole)
    for damaged in ((0,), (130,), (200, 290), (299,)):
        spoilt = replace(case, damaged=damaged, damage=np.nan)
        tiles, single = (
            Attending(device.subject, spoilt).steps(pieces(case, sizes))[0] for sizes in ((300,), (290, 1))
        )
        first = np.maximum(0, np.arange(300) - (window or 1000) + 1)
        sees = [any(a <= d <= p for d in damaged) for p, a in enumerate(first)]
        for y in (tiles, single):
            assert np.isnan(y[sees]).all()
            assert y[np.logical_not(sees)].tobytes() == whole[np.logical_not(sees)].tobytes()


@pytest.mark.parametrize("runtime", TILES)
def test_only_what_is_spoilt_of_a_value_is_no_number(runtime: type[EmulatedRuntime]) -> None:
    """One element of one position: the same bits elsewhere, by tiles and by tokens."""
    case, device = sequences((70,), (1, 1, 16)), Device(runtime)
    v = case.v.copy()
    v[33, 0, 5] = 1e6  # which float16 does not hold
    (whole,) = Attending(device.subject, case).step(case.whole)
    spoilt = Attending(device.subject, replace(case, v=v))
    for sizes in ((70,), (30, 1)):
        (y,) = spoilt.steps(pieces(case, sizes))
        expected = whole.copy()
        expected[33:, 0, 5] = np.nan
        assert np.array_equal(y, expected, equal_nan=True)


def test_devices_without_matrix_units_keep_the_bound() -> None:
    case, device = sequences((140,), (2, 1, 20)), Device(NarrowRuntime)
    (y,) = Attending(device.subject, case).step(case.whole)
    expected, bound = softmax_means(case, 0, U)
    assert (np.abs(y - expected) <= bound).all()
    assert device.launched() == {"attention_split_f16"}


def test_kernels_take_the_shared_memory_that_is_asked_for(tmp_path: Path) -> None:
    header, found = Path(__file__).with_name("emulation.h"), []
    for module, name in (
        ("attention_halves", "FewMemory"),
        ("attention_halves_tiles", "TileMemory"),
        ("attention_halves_groups", "GroupMemory"),
    ):
        source, program = tmp_path / f"{module}.cpp", tmp_path / module
        source.write_text(
            f'#include "{header}"\n{text_of(module)}\n#include <cstdio>\n'
            f'int main() {{ printf("%zu %zu", sizeof({name}<4>), sizeof({name}<8>)); }}\n'
        )
        subprocess.run(["g++", "-std=c++17", "-w", str(source), "-o", str(program)], check=True)
        run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
        found.append([int(n) for n in run.stdout.split()])
    expected = [(*halves_bytes(padded), groups_bytes(padded)) for padded in (64, 128)]
    assert list(zip(*found, strict=True)) == expected
