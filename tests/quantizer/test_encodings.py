"""The table of encodings, against ggml's own table in the gguf package; and those that ggml does not have."""

from __future__ import annotations

import gguf
import pytest

from refengine.errors import UnsupportedError
from refengine.quantizer import ENCODINGS, encoding
from refengine.quantizer.decode import DECODERS

OWN = ["int4_g32", "int4_g64", "int4_g128", "int8_g32", "int8_g64", "int8_g128"]
"""Encodings that ggml does not have."""


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in OWN])
def test_block_sizes_are_ggmls(name):
    """Every other encoding has ggml's weights per block and bytes per block, and a name that ggml knows."""
    stored = encoding(name)
    assert stored.name == name
    ggml_type = gguf.GGMLQuantizationType[name.upper()]
    assert (stored.block_size, stored.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]


@pytest.mark.parametrize("name", OWN)
def test_a_block_of_integers_is_a_scale_a_zero_point_and_they(name):
    """Two bytes, one byte, and as many bits for each weight as the name says."""
    bits, group = map(int, name.removeprefix("int").split("_g"))
    assert encoding(name).block_size == group
    assert encoding(name).block_bytes == 2 + 1 + bits * group // 8
    assert name.upper() not in gguf.GGMLQuantizationType.__members__


def test_every_encoding_has_a_decoder():
    """The table of encodings and the table of decoders have the same names in the same order."""
    assert list(DECODERS) == list(ENCODINGS)


def test_the_table_is_immutable():
    """Nobody can add an encoding to the table, or change one."""
    with pytest.raises(TypeError):
        ENCODINGS["q4_k"] = ENCODINGS["q4_0"]
    with pytest.raises(AttributeError):
        ENCODINGS["q4_k"].block_size = 32


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("q4k", "q4_k"),
        ("Q4_K", "q4_k"),
        ("fp16", "f16"),
        ("iq4xs", "iq4_xs"),
        ("gptq-int4-g128", "int4_g128"),
    ],
)
def test_an_unknown_name_lists_near_matches(wrong, right):
    """A misspelt name is answered with the name that was meant."""
    with pytest.raises(UnsupportedError, match=rf"'{wrong}'; did you mean .*\b{right}\b.*\?"):
        encoding(wrong)


def test_a_name_like_no_other_lists_every_encoding():
    """A name with no near match is answered with all names."""
    with pytest.raises(UnsupportedError) as raised:
        encoding("nonsense")
    assert "did you mean" not in str(raised.value)
    assert all(name in str(raised.value) for name in ENCODINGS)


def test_row_sizes_convert_both_ways():
    """A row of whole blocks has so many bytes as it has blocks, and the other way round."""
    assert encoding("q4_k").row_bytes(2048) == 8 * 144
    assert encoding("q4_k").row_weights(8 * 144) == 2048
    assert encoding("q4_k").row_bytes(0) == encoding("q4_k").row_weights(0) == 0


def test_part_of_a_block_is_refused():
    """A row that ends within a block has no size."""
    with pytest.raises(ValueError, match="q4_k: 2049 weights are not whole blocks of 256"):
        encoding("q4_k").row_bytes(2049)
    with pytest.raises(ValueError, match="q4_k: 145 bytes are not whole blocks of 144"):
        encoding("q4_k").row_weights(145)
