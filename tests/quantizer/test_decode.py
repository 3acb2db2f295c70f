"""decode, against the dequantizers of the gguf package; of integer groups, against a loop over single weights."""

from __future__ import annotations

import itertools
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer.integer_groups import BLOCKS, weight_at

from refengine.errors import UnsupportedError
from refengine.loader import read_gguf
from refengine.quantizer import ENCODINGS, decode
from refengine.quantizer.decode import CHUNK_WEIGHTS

every_encoding = pytest.mark.parametrize("name", ENCODINGS)
QUANTIZABLE = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
"""What the gguf package can also encode."""
FLOAT16_SCALES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "iq4_nl": [0],
    "iq4_xs": [0],
    **{name: [0] for name in BLOCKS},
}
"""Where in a block its float16 scales lie."""


def expected_weights(name, data):
    """The gguf package's reading of ``data``, or for want of one the loop's."""
    if name in BLOCKS:
        blocks = data.reshape(-1, ENCODINGS[name].block_bytes)
        found = [weight_at(name, block.tobytes(), i) for block in blocks for i in range(BLOCKS[name])]
        return np.array(found, np.float32).reshape(*data.shape[:-1], -1)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])


def assert_same_bits(actual, expected):
    """NaN in the same places, of whatever payload; elsewhere the same bits, signs of zeros included."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(
        np.where(nan, 0, actual.view(np.uint32)), np.where(nan, 0, expected.view(np.uint32))
    )


def random_bytes(shape, seed=0):
    """Every bit pattern is as likely as any other: about one scale in 32 is NaN, as many are subnormal."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@every_encoding
@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bytes_of_any_shape_decode_as_elsewhere(name, leading, blocks, seed):
    """Random bytes decode to the other reader's bits, whatever the leading axes."""
    data = random_bytes((*leading, blocks * ENCODINGS[name].block_bytes), seed)
    assert_same_bits(decode(name, data), expected_weights(name, data))


@pytest.mark.parametrize(("name", "offsets"), FLOAT16_SCALES.items())
def test_special_scales_decode_as_elsewhere(name, offsets):
    """Zero, subnormal, largest, infinite and NaN scales of both signs, in all pairs, decode to its bits too."""
    specials = [0x0000, 0x0001, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x7D01, 0x7E00]
    specials += [0x8000 | bits for bits in specials]
    pairings = np.array(list(itertools.product(specials, repeat=len(offsets))), "<u2")
    data = random_bytes((len(pairings), ENCODINGS[name].block_bytes))
    for offset, scales in zip(offsets, pairings.T, strict=True):
        data[:, offset : offset + 2] = np.ascontiguousarray(scales)[:, None].view(np.uint8)
    weights = decode(name, data)
    assert_same_bits(weights, expected_weights(name, data))
    assert np.isnan(weights).any()
    assert np.isinf(weights).any()
    assert (weights == 0).any()


def test_every_mxfp4_exponent_decodes_as_in_ggml():
    """Each of the 256 exponent bytes, with each of the 16 elements, decodes to gguf's bits."""
    data = np.empty((256, 17), np.uint8)
    data[:, 0] = np.arange(256)
    data[:, 1:] = np.arange(16) * 17
    assert_same_bits(decode("mxfp4", data), expected_weights("mxfp4", data))


@every_encoding
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 1)])
def test_nothing_decodes_to_nothing(name, shape):
    """A tensor without rows, or with rows of no blocks, decodes to an empty array of the right shape."""
    *leading, blocks = shape
    weights = decode(name, np.empty((*leading, blocks * ENCODINGS[name].block_bytes), np.uint8))
    assert weights.shape == (*leading, blocks * ENCODINGS[name].block_size)
    assert weights.dtype == np.float32


@every_encoding
@pytest.mark.parametrize("extra", [-1, 0, 1, 3])
def test_chunks_join_without_a_seam(name, extra):
    """Tensors of a few chunks, and of a block more or less, decode as in one piece."""
    blocks = 2 * CHUNK_WEIGHTS // ENCODINGS[name].block_size + extra
    data = random_bytes((blocks, ENCODINGS[name].block_bytes))
    assert_same_bits(decode(name, data), expected_weights(name, data))


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantized_real_values_decode_as_in_ggml(name):
    """Normally distributed weights that gguf has quantized decode to gguf's bits, and near what they were."""
    original = np.random.default_rng(0).standard_normal((64, 512), dtype=np.float32) * np.float32(0.02)
    data = gguf.quants.quantize(original, gguf.GGMLQuantizationType[name.upper()]).view(np.uint8)
    weights = decode(name, data)
    assert_same_bits(weights, expected_weights(name, data))
    assert np.corrcoef(weights.ravel(), original.ravel())[0, 1] > 0.98


@every_encoding
def test_gaps_between_rows_are_skipped(name):
    """Data need not be contiguous: it may skip, reverse or transpose rows, and skip or reverse bytes."""
    bytes_ = ENCODINGS[name].block_bytes
    data = random_bytes((4, 6, 3 * bytes_))
    for view in (
        data[::2],
        data[:, ::-1],
        data[:, :, bytes_ : 2 * bytes_],
        data.transpose(1, 0, 2),
        data[0, 0, ::-1],
        data[..., ::3],
    ):
        assert_same_bits(decode(name, view), expected_weights(name, np.ascontiguousarray(view)))


@every_encoding
def test_unaligned_read_only_bytes_decode(name):
    """Data may start at any address and may be read-only."""
    data = random_bytes((3, 5 * ENCODINGS[name].block_bytes))
    unaligned = np.frombuffer(b"\0" + data.tobytes(), np.uint8, offset=1).reshape(data.shape)
    assert_same_bits(decode(name, unaligned), expected_weights(name, data))


@every_encoding
def test_out_is_filled_and_returned(name):
    """Given ``out``, decode writes every weight there and returns that very array."""
    data = random_bytes((7, 3 * ENCODINGS[name].block_bytes))
    out = np.full((7, 3 * ENCODINGS[name].block_size), 12345, np.float32)
    assert decode(name, data, out) is out
    assert_same_bits(out, expected_weights(name, data))


@every_encoding
def test_the_result_is_never_a_view(name):
    """Writing to the decoded weights does not write to the data, for plain encodings neither."""
    data = random_bytes((2, 4 * ENCODINGS[name].block_bytes))
    assert not np.shares_memory(decode(name, data), data)


@every_encoding
@pytest.mark.parametrize("contiguous", [True, False])
def test_memory_beside_the_output_is_bounded(name, contiguous):
    """Two million weights decode in under 1 MiB of temporaries."""
    weights = 2**21
    data = random_bytes((4, ENCODINGS[name].row_bytes(weights // 2)))
    data = data[:2] if contiguous else data[::2]
    out = np.empty((2, weights // 2), np.float32)
    tracemalloc.start()
    try:
        decode(name, data, out)
        into_out = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        decode(name, data)
        into_new = tracemalloc.get_traced_memory()[1] - out.nbytes
    finally:
        tracemalloc.stop()
    assert max(into_out, into_new) < 2**20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros(19, np.uint8), "q4_0: 19 bytes are not whole blocks of 18"),
        (np.zeros(18, np.int8), r"data must be uint8 \[..., bytes\], not int8 \[18\]"),
        (np.zeros(18, np.float32), "not float32"),
        (np.zeros((), np.uint8), r"not uint8 \[\]"),
    ],
)
def test_malformed_data_is_refused(data, message):
    """Data of another dtype, without an axis or of broken blocks is the caller's mistake."""
    with pytest.raises(ValueError, match=message):
        decode("q4_0", data)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((2, 31), np.float32), r"out must be float32 \[2, 32\], not float32 \[2, 31\]"),
        (np.empty(64, np.float32), r"not float32 \[64\]"),
        (np.empty((2, 32), np.float64), r"not float64 \[2, 32\]"),
        (np.empty((2, 32), ">f4"), "out must be float32"),
        (np.empty((32, 2), np.float32).T, "out must be C-contiguous and writeable"),
        (read_only(np.empty((2, 32), np.float32)), "out must be C-contiguous and writeable"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out, message):
    """An ``out`` of another shape, dtype or layout is the caller's mistake."""
    with pytest.raises(ValueError, match=message):
        decode("q4_0", np.zeros((2, 18), np.uint8), out)


def test_an_unknown_encoding_is_refused():
    """What refengine cannot decode is named, with what was probably meant."""
    with pytest.raises(UnsupportedError, match=r"'q4_2'; did you mean .*q4_0"):
        decode("q4_2", np.zeros(18, np.uint8))


@pytest.mark.filterwarnings("error")
def test_non_finite_scales_pass_without_a_warning():
    """Infinite and NaN scales decode silently, even for callers that turned floating-point errors on."""
    infinite_and_nan = np.array([[0x7C00, 0xFC00], [0x7E00, 0x7D01]], "<u2").view(np.uint8)
    data = np.concatenate([infinite_and_nan, np.zeros((2, 16), np.uint8)], axis=1)
    with np.errstate(all="raise"):
        weights = decode("q4_1", data)
    assert np.isnan(weights).all()


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_real_tensors_decode_as_in_ggml(model, request):
    """The first and last 64 rows of every tensor of a real checkpoint decode to gguf's bits."""
    for tensor in read_gguf(request.getfixturevalue(f"{model}_path")).tensors.values():
        data = np.atleast_2d(tensor.data)
        for rows in (data[:64], data[-64:]):
            assert_same_bits(decode(tensor.encoding, rows), expected_weights(tensor.encoding, rows))
