"""Entries are called by address, several of them inside one parallel region with barriers between."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numba
import numpy as np
import pytest
from mixed_products import mixed8_product

from refengine_numba import entries, isa
from refengine_numba.barrier import barrier_state
from refengine_numba.kernels import entry
from refengine_numba.kernels.barrier import wait
from refengine_numba.matrix import Arguments, TiledMatrix, quantization
from refengine_numba.records import record_bytes
from refengine_numba.repack import pack


@numba.njit(nogil=True)
def step(thread: int, threads: int, addresses: np.ndarray, starts: np.ndarray, words: np.ndarray, state: np.ndarray) -> None:  # fmt: skip
    """What an executor does: every instruction's share, then wait for the others."""
    for i in range(len(addresses)):
        entry.call(addresses[i], thread, threads, words, starts[i])
        wait(state, threads)


@numba.njit(parallel=True)
def region(
    threads: int, addresses: np.ndarray, starts: np.ndarray, words: np.ndarray, state: np.ndarray
) -> None:
    """The same, as one parallel region of Numba's."""
    for thread in numba.prange(threads):
        step(thread, threads, addresses, starts, words, state)


def program(instructions: list[tuple[object, Arguments]]) -> tuple[np.ndarray, ...]:
    """Addresses, and all arguments in one array."""
    addresses = np.array([compiled.address for compiled, _ in instructions], np.int64)
    starts = np.cumsum([0] + [len(arguments.words) for _, arguments in instructions])[:-1]
    words = np.concatenate([arguments.words for _, arguments in instructions])
    return addresses, starts.astype(np.int64), words, barrier_state()


@pytest.mark.parametrize("how", ["one", "python", "numba"])
def test_a_step_of_several_products_runs_in_one_region(how: str, matrix: Callable[..., np.ndarray]) -> None:
    """Two layers, each quantized, then multiplied: as one after the other, by one thread or two."""
    shapes = [("q4_1", 96, 256), ("q8_0", 50, 96)]
    data = [matrix(*shape) for shape in shapes]
    tiled = [TiledMatrix(*shape, pack(shape[0], d)) for shape, d in zip(shapes, data, strict=True)]
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    expected = x
    instructions: list[tuple[object, Arguments]] = []
    for layer, d in zip(tiled, data, strict=True):
        expected = mixed8_product(layer.encoding, d, expected)
        records = np.zeros(record_bytes(3, layer.columns), np.uint8)
        y = np.zeros((3, layer.rows), np.float32)
        instructions += [
            (entries.entry("activations.quantize"), quantization(x, records)),
            (entries.entry("products.mixed8", layer.encoding, isa.choose()), layer.product(records, y)),
        ]
        x = y
    arrays = program(instructions)
    if how == "one":
        step(0, 1, *arrays)
    elif how == "python":
        step(0, 1, *(a[:0] for a in arrays[:3]), arrays[3])  # compiled before the threads start
        team = [threading.Thread(target=step, args=(t, 2, *arrays)) for t in range(2)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
    else:
        if numba.get_num_threads() < 2:
            pytest.skip("Numba has one thread here")
        region(2, *arrays)
    assert x.tobytes() == expected.tobytes()


def test_entries_are_compiled_once() -> None:
    """The same entry is the same address."""
    assert (
        entries.entry("products.float32", "q4_0").address == entries.entry("products.float32", "q4_0").address
    )
    with pytest.raises(KeyError):
        entries.entry("products.float32", "iq4_nl")
