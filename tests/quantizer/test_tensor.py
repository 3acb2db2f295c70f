"""LazyTensor: what it checks, what it reads, and when."""

from __future__ import annotations

import dataclasses
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import UnsupportedError
from refengine.quantizer import ENCODINGS, LazyTensor


def quantized(name, shape, seed=0):
    """Real values of ``shape`` as a tensor, and gguf's reading of its bytes."""
    ggml_type = gguf.GGMLQuantizationType[name.upper()]
    data = gguf.quants.quantize(np.random.default_rng(seed).standard_normal(shape, np.float32), ggml_type)
    data = data.view(np.uint8)
    data.flags.writeable = False
    return LazyTensor("blk.0.ffn_up.weight", shape, name, data), gguf.quants.dequantize(data, ggml_type)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
@pytest.mark.parametrize("name", ["f32", "bf16", "q4_1", "q8_0"])
def test_a_tensor_decodes_whole(name, shape):
    """decode gives every weight in the tensor's shape, for any number of axes."""
    tensor, expected = quantized(name, shape)
    weights = tensor.decode()
    assert weights.shape == tensor.shape
    np.testing.assert_array_equal(weights, expected.reshape(shape))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,)])
def test_an_empty_tensor_decodes_to_nothing(shape):
    """A tensor may have no rows, or rows of no weights."""
    data = np.empty((*shape[:-1], shape[-1] // 32 * 18), np.uint8)
    assert LazyTensor("empty", shape, "q4_0", data).decode().shape == shape


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 6)), dtype=st.sampled_from([np.uint8, np.int32, np.int64, np.uint64]))
def test_rows_are_those_of_the_whole(rows, dtype):
    """Rows come in the order asked for, repeated where asked for twice, as ids of any integer type."""
    tensor, expected = quantized("q4_1", (7, 64))
    taken = tensor[np.array(rows, dtype)]
    assert taken.shape == (len(rows), 64)
    np.testing.assert_array_equal(taken, expected[rows])


def test_rows_of_three_axes_keep_the_others():
    """A row of the first axis is everything beneath it; one id alone drops the axis."""
    tensor, expected = quantized("q8_0", (4, 3, 32))
    np.testing.assert_array_equal(tensor[np.array([2, 0])], expected[[2, 0]])
    np.testing.assert_array_equal(tensor[3], expected[3])


@pytest.mark.parametrize("name", ENCODINGS)
def test_row_access_decodes_only_these_rows(name):
    """Taking one row of 64 MiB of weights allocates less than 1 MiB: the rest is never decoded."""
    shape = (4096, 4096)
    data = np.zeros((4096, ENCODINGS[name].row_bytes(4096)), np.uint8)
    tensor = LazyTensor("token_embd.weight", shape, name, data)
    tracemalloc.start()
    try:
        tensor[np.array([17])]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("row", [-1, 7, 2**40, np.iinfo(np.int64).min, np.iinfo(np.uint64).max])
def test_rows_outside_raise(row):
    """A negative id, or one past the end, is an IndexError that names it, also among good ids."""
    tensor, _ = quantized("q4_0", (7, 64))
    for rows in (np.array(row), np.array([row]), np.array([0, row], np.array(row).dtype)):
        with pytest.raises(IndexError, match=f"no row {row} among 7"):
            tensor[rows]


@pytest.mark.parametrize("rows", [np.array([True] * 7), np.array([1.0]), "0", None, slice(0, 2)])
def test_ids_must_be_integers(rows):
    """Masks, floats, strings and slices are no row ids."""
    tensor, _ = quantized("q4_0", (7, 64))
    with pytest.raises(IndexError, match="rows must be integers"):
        tensor[rows]


def test_one_axis_has_no_rows():
    """A tensor with one axis decodes whole or not at all."""
    tensor, _ = quantized("f32", (64,))
    with pytest.raises(IndexError, match="one axis has no rows"):
        tensor[np.array([0])]


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ((2, 64), np.zeros((2, 40), np.uint8), r"is stored as uint8 \[2, 36\], not uint8 \[2, 40\]"),
        ((2, 64), np.zeros((3, 36), np.uint8), r"not uint8 \[3, 36\]"),
        ((2, 64), np.zeros(72, np.uint8), r"not uint8 \[72\]"),
        ((2, 64), np.zeros((2, 36), np.int8), "not int8"),
        ((2, 65), np.zeros((2, 36), np.uint8), "65 weights are not whole blocks of 32"),
        ((), np.zeros((), np.uint8), "at least one axis"),
    ],
)
def test_bytes_that_do_not_fit_the_shape_are_refused(shape, data, message):
    """The data's shape must be the tensor's with its last axis in bytes, and the dtype uint8."""
    with pytest.raises(ValueError, match=message):
        LazyTensor("output.weight", shape, "q4_0", data)


def test_an_unknown_encoding_is_refused():
    """A tensor whose bytes nobody can decode cannot be made."""
    with pytest.raises(UnsupportedError, match="'iq2_xxs'"):
        LazyTensor("output.weight", (256,), "iq2_xxs", np.zeros(66, np.uint8))


def test_a_tensor_is_frozen():
    """No attribute of a tensor can be set."""
    tensor, _ = quantized("q4_0", (7, 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensor.name = "other"


def test_sizes_are_of_weights_and_of_stored_bytes():
    """size counts weights, nbytes the bytes of the encoding."""
    tensor, _ = quantized("q4_0", (7, 64))
    assert tensor.size == 7 * 64
    assert tensor.nbytes == 7 * 2 * 18


def test_the_repr_is_one_short_line():
    """A tensor shows its name, encoding, shape and size, not its bytes."""
    tensor, _ = quantized("q4_0", (70, 64))
    assert repr(tensor) == "LazyTensor('blk.0.ffn_up.weight', q4_0 [70, 64], 2,520 bytes)"
