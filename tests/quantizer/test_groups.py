"""Integers, scales and offsets of stored rows: what the decoder gives where all else is one, or zero."""

from __future__ import annotations

import numpy as np
import pytest
from quantizer.integer_groups import BLOCKS

from refengine.quantizer import GROUP, GROUPED, decode, encoding, has_offsets, read_groups

ONE, ZERO = np.array([1, 0], "<f2").view(np.uint8).reshape(2, 2)
NO_OFFSETS = {"q4_0": 0, "q5_0": 0, "q8_0": 0, "q6_k": 208} | dict.fromkeys(BLOCKS, 0)
"""Where the only scale of a block stands."""


def rows_of(name: str, rows: int, blocks: int) -> np.ndarray:
    """Stored bytes [rows, row_bytes]: any, but for scales and offsets, which are of ordinary size."""
    rng = np.random.default_rng([rows, blocks])
    data = rng.integers(0, 256, (rows, blocks, encoding(name).block_bytes), np.uint8)
    for at in [NO_OFFSETS[name]] if name in NO_OFFSETS else [0, 2]:
        halves = rng.standard_normal((rows, blocks, 1)).astype("<f2")
        data[..., at : at + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def fields(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Integers [N, K], scales [G, N] and offsets [G, N], read off the decoder through blocks that are edited.

    With scales of one and no offsets it gives the integers; with integers of zero the offsets; with integers
    of one and no offsets the scales.
    """
    size = encoding(name).block_bytes
    blocks = data.reshape(len(data), -1, size)

    def decoded(edited: np.ndarray) -> np.ndarray:
        return decode(name, edited.reshape(len(data), -1))

    def first_of_groups(edited: np.ndarray) -> np.ndarray:
        return decoded(edited)[:, ::GROUP].T

    unit, low, high = blocks.copy(), blocks.copy(), blocks.copy()
    if name in NO_OFFSETS:
        at = NO_OFFSETS[name]
        unit[..., at : at + 2] = ONE
        halves = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)
        return decoded(unit), halves.repeat(encoding(name).block_size // GROUP, axis=1).T, None
    unit[..., 0:2], unit[..., 2:4] = ONE, ZERO
    low[..., 4 if name.endswith("_1") else 16 :] = 0
    high[..., 2:4] = ZERO
    if name.endswith("_1"):
        high[..., 4:] = 0
        high[..., -16:] = 0x11
    else:
        unit[..., 4:16] = np.repeat(np.array([1, 0, 1], np.uint8), 4)  # all scales one, all minima zero
        high[..., 16:] = 0
        high[..., -128:] = 0x11
    return decoded(unit), first_of_groups(high), first_of_groups(low)


def read(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    columns = encoding(name).row_weights(data.shape[1])
    integers = np.full((len(data), columns), np.nan, np.float32)
    scales = np.full((columns // GROUP, len(data)), np.nan, np.float32)
    offsets = np.full_like(scales, np.nan) if has_offsets(name) else None
    read_groups(name, data, integers, scales, offsets)
    return integers, scales, offsets


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3), (700, 1), (3, 300)])
def test_rows_are_integers_scales_and_offsets(name: str, rows: int, blocks: int) -> None:
    """Each as the decoder shows it; short rows many at a time, and rows longer than are read at once."""
    data = rows_of(name, rows, blocks)
    for found, expected in zip(read(name, data), fields(name, data), strict=True):
        assert np.array_equal(found, expected) if expected is not None else found is None


@pytest.mark.parametrize("name", GROUPED)
def test_they_make_up_the_weights(name: str) -> None:
    """scale · integer + offset, each rounded to float32, is the decoded weight."""
    data = rows_of(name, 4, 2)
    integers, scales, offsets = read(name, data)
    weights = integers * scales.T.repeat(GROUP, axis=1)
    if offsets is not None:
        weights += offsets.T.repeat(GROUP, axis=1)
    assert np.array_equal(weights, decode(name, data))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0])
def test_a_groups_sum_with_any_codes_is_exact_in_float32(name: str, fill: int) -> None:
    """The largest integers there are, times 127, 32 times: below 2²⁴."""
    integers, _, _ = read(name, np.full((1, encoding(name).block_bytes), fill, np.uint8))
    assert np.abs(integers).reshape(-1, GROUP).sum(axis=1).max() * 127 < 2**24
