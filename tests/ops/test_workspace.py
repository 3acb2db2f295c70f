"""What golden ops take besides operands and results: as much as they tell, and it changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_products import stored_matrix

from refengine import ops
from refengine.backend.weights import StoredMatrix
from refengine.errors import MemoryManagerError
from refengine.ops import OPS, LayerCache
from refengine.ops.linear import tile_rows
from refengine.ops.matmul import BASE_WIDTHS
from refengine.ops.scratch import Scratch
from refengine.quantizer import encoding

TOKENS = st.integers(1, 300)


class Encoded:
    """A matrix that is decoded tile by tile; its numbers are known only to ``tile``."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self.shape = numbers.shape
        self.tiles: list[int] = []

    def tile(self, start: int, stop: int, scratch: Scratch) -> np.ndarray:
        rows = scratch.empty((stop - start, self.shape[1]), self._numbers.dtype)
        rows[...] = self._numbers[start:stop]
        self.tiles.append(stop - start)
        return rows


def stored(name: str, rows: int, columns: int) -> StoredMatrix:
    """A matrix of any bytes but for its scales, 8 bits of which are zero."""
    data = np.random.default_rng(0).integers(0, 256, (rows, encoding(name).row_bytes(columns)), np.uint8)
    data.reshape(rows, -1, encoding(name).block_bytes)[..., 1:4:2] = 1
    return stored_matrix(name, data)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def told(op: str, operands: list[Any], **attributes: Any) -> int:
    """The declared working memory, for these operands' shapes."""
    shapes = [
        None if x is None else x.keys.shape if isinstance(x, LayerCache) else tuple(x.shape) for x in operands
    ]
    shapes += [None] * (len(OPS[op].signature.operands) - len(shapes))
    workspace = OPS[op].workspace
    assert workspace is not None
    return workspace(shapes, attributes, 4)


def attention_operands(
    tokens: int, context: int, heads: tuple[int, int, int], sequences: int = 1
) -> list[Any]:
    """``sequences`` of the same context; their tokens of the step share ``tokens`` as evenly as they can."""
    query_heads, kv_heads, size = heads
    starts = np.linspace(0, tokens, sequences + 1).astype(int)
    contexts = np.maximum(np.diff(starts), context)
    blocks = -(-int(contexts.max()) // 16)
    cache = LayerCache(*numbers(2, blocks, 16, kv_heads, size))
    tables = np.tile(np.arange(blocks), (sequences, 1))
    return [numbers(tokens, query_heads, size, seed=1), cache, tables, starts, contexts]


CASES: dict[str, tuple[Callable[[int], list[Any]], dict[str, Any]]] = {
    "rms_norm": (lambda t: [numbers(t, 576), numbers(576)], {"eps": 1e-5}),
    "rms_norm ": (lambda t: [numbers(t, 9, 64), numbers(64)], {"eps": 1e-5}),
    "gated": (lambda t: [numbers(t, 600), numbers(t, 600)], {"activation": "silu"}),
    "gated ": (lambda t: [numbers(t, 600), numbers(t, 600)], {"activation": "gelu_tanh"}),
    "rope_table": (lambda t: [np.arange(t)], {"frequencies": (1.0, 0.1) * 150, "dims": 600}),
    "rope": (lambda t: [numbers(t, 9, 64), numbers(t, 48)], {"pairing": "halves"}),
    "linear": (lambda t: [numbers(t, 300), Encoded(numbers(2000, 300))], {}),
    "linear ": (lambda t: [numbers(t, 3000), Encoded(numbers(50, 3000)), numbers(50)], {}),
    "quantize_a8": (lambda t: [numbers(t, 576)], {}),
    "quantize_a8 ": (lambda t: [numbers(t, 40_000)], {}),
    "linear_a8": (lambda t: [ops.quantize_a8(numbers(t, 320)), stored("q4_1", 2000, 320)], {}),
    "linear_a8 ": (lambda t: [ops.quantize_a8(numbers(t, 3072)), stored("q5_k", 50, 3072), numbers(50)], {}),
    "linear_a16": (lambda t: [numbers(t, 300), Encoded(numbers(2000, 300))], {}),
    "linear_a16 ": (lambda t: [numbers(t, 3000), numbers(50, 3000), numbers(50)], {}),
    "attention": (lambda t: attention_operands(t, 700, (9, 3, 64)), {"scale": 0.1}),
    "attention ": (lambda t: attention_operands(t, 30, (12, 12, 40)), {"scale": 0.1, "window": 9}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_an_op_takes_what_it_tells(case: str, tokens: int) -> None:
    """At the sizes it was asked for, or at some smaller ones, it holds what it told: no less would do.

    A product of fewer columns than the narrowest call has needs a copy of them, which larger ones do not. A
    BLAS with no use for the widest calls would need less than is told.
    """
    make, attributes = CASES[case]
    op, peaks = case.strip(), []
    for size in {tokens, min(tokens, max(BASE_WIDTHS) - 1)}:
        scratch = Scratch()
        OPS[op].golden(*make(size), **attributes, scratch=scratch)
        peaks.append(scratch.peak)
    bound = told(op, make(tokens), **attributes)
    assert max(peaks) == bound or (op in ("linear", "attention") and bound / 2 < max(peaks) < bound)


@pytest.mark.parametrize("case", CASES)
@given(planned=TOKENS, tokens=TOKENS)
@settings(max_examples=6, deadline=None)
def test_a_smaller_step_takes_no_more(case: str, planned: int, tokens: int) -> None:
    """In a buffer planned for more tokens an op finds room, and gives the bits it gives without a plan."""
    make, attributes = CASES[case]
    op, operands = case.strip(), make(min(planned, tokens))
    buffer = np.full(told(op, make(max(planned, tokens)), **attributes), 0xFF, np.uint8)
    scratch = Scratch(buffer)
    planned_result = OPS[op].golden(*operands, **attributes, scratch=scratch)
    assert np.array_equal(planned_result, OPS[op].golden(*operands, **attributes))
    assert scratch.peak <= len(buffer)


@given(
    st.integers(1, 40),
    st.integers(1, 2000),
    st.integers(1, 5),
    st.sampled_from([None, 1, 100, 500]),
    st.sampled_from([None, 2.0]),
)
@settings(max_examples=30, deadline=None)
def test_attention_takes_no_more_for_a_long_context(
    tokens: int, context: int, sequences: int, window: int | None, cap: float | None
) -> None:
    """Neither the context nor the number of sequences counts, nor does a window or a cap."""
    operands = attention_operands(tokens, context, (4, 2, 16), min(sequences, tokens))
    scratch = Scratch()
    ops.attention(*operands, scale=0.2, window=window, softcap=cap, scratch=scratch)
    assert scratch.peak <= told("attention", operands)


def test_a_value_that_is_not_finite_takes_no_more() -> None:
    """Queries that are computed again, one by one, find room too."""
    operands = attention_operands(50, 300, (4, 2, 16))
    operands[1].values[18, 3] = np.nan
    scratch = Scratch(np.empty(told("attention", operands), np.uint8))
    y = ops.attention(*operands, scale=0.2, scratch=scratch)
    assert np.isnan(y).any()
    assert not np.isnan(y).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (50, 7), (192, 2800), (900, 576), (2000, 300), (1000, 1536)])
@pytest.mark.parametrize("tokens", [1, 3, 9, 300])
def test_an_encoded_matrix_gives_the_bits_of_its_numbers(
    shape: tuple[int, int], tokens: int, dtype: type
) -> None:
    """Decoded beforehand or tile by tile: the tiles are the same, and so is every sum."""
    weight, x = numbers(*shape).astype(dtype), numbers(tokens, shape[1], seed=1).astype(dtype)
    encoded = Encoded(weight)
    assert ops.linear(x, encoded).tobytes() == ops.linear(x, weight).tobytes()
    assert sum(encoded.tiles) == shape[0]


@given(st.integers(1, 300_000), st.integers(1, 40_000))
def test_a_tile_is_bounded_and_depends_on_the_shape_alone(rows: int, columns: int) -> None:
    """A multiple of 48 rows; at most 2 MiB of float32, or 192 rows."""
    tile = tile_rows((rows, columns))
    assert tile == tile_rows((1, columns))
    assert tile % 48 == 0
    assert tile == 192 or prod((tile, columns, 4)) <= 2 * 2**20


def test_a_workspace_that_is_too_small_is_an_error() -> None:
    """Not memory from elsewhere."""
    x = numbers(7, 100)
    buffer = np.empty(told("gated", [x, x]) - 1, np.uint8)
    with pytest.raises(MemoryManagerError, match="working memory"):
        ops.gated(x, x, activation="silu", scratch=Scratch(buffer))
