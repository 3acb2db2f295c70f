"""The encodings refengine decodes: their names and the sizes of their blocks.

Names are ggml's, in lower case, where it has the encoding; ``int4_g128`` and its kin are refengine's own.
Source: ggml, ``ggml-common.h`` (the ``block_*`` structures), ``ggml.c`` (``type_traits``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from refengine.errors import UnsupportedError


@dataclass(frozen=True)
class Encoding:
    """How weights are stored: in blocks of ``block_size`` weights, each ``block_bytes`` bytes long.

    Attributes:
        name: ggml's name in lower case, such as ``q4_1``; or one that ggml does not have.
        block_size: weights per block; 1 where every weight stands alone.
        block_bytes: bytes per block.
    """

    name: str
    block_size: int
    block_bytes: int

    def row_bytes(self, weights: int) -> int:
        """Bytes of a row of ``weights`` weights; ValueError unless they fill whole blocks."""
        if weights % self.block_size:
            raise ValueError(f"{self.name}: {weights} weights are not whole blocks of {self.block_size}")
        return weights // self.block_size * self.block_bytes

    def row_weights(self, row_bytes: int) -> int:
        """Weights in a row of ``row_bytes`` bytes; ValueError unless they are whole blocks."""
        if row_bytes % self.block_bytes:
            raise ValueError(f"{self.name}: {row_bytes} bytes are not whole blocks of {self.block_bytes}")
        return row_bytes // self.block_bytes * self.block_size


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {
        stored.name: stored
        for stored in (
            Encoding("f32", 1, 4),
            Encoding("f16", 1, 2),
            Encoding("bf16", 1, 2),
            Encoding("q4_0", 32, 18),
            Encoding("q4_1", 32, 20),
            Encoding("q5_0", 32, 22),
            Encoding("q5_1", 32, 24),
            Encoding("q8_0", 32, 34),
            Encoding("q2_k", 256, 84),
            Encoding("q3_k", 256, 110),
            Encoding("q4_k", 256, 144),
            Encoding("q5_k", 256, 176),
            Encoding("q6_k", 256, 210),
            Encoding("iq4_nl", 32, 18),
            Encoding("iq4_xs", 256, 136),
            Encoding("mxfp4", 32, 17),
            Encoding("int4_g32", 32, 19),
            Encoding("int4_g64", 64, 35),
            Encoding("int4_g128", 128, 67),
            Encoding("int8_g32", 32, 35),
            Encoding("int8_g64", 64, 67),
            Encoding("int8_g128", 128, 131),
        )
    }
)
"""Every encoding that :func:`refengine.quantizer.decode` decodes, by name; immutable."""


def encoding(name: str) -> Encoding:
    """The encoding called ``name``.

    Raises:
        UnsupportedError: no encoding has this name; the text lists near matches and all names.
    """
    if name in ENCODINGS:
        return ENCODINGS[name]
    raise unknown_encoding(name, ENCODINGS)


def unknown_encoding(name: str, known: Iterable[str]) -> UnsupportedError:
    """What to raise where no encoding of those known here has this name; the text lists them."""
    names = list(known)
    near = get_close_matches(name.lower(), names)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UnsupportedError(f"unknown encoding {name!r}{hint} (there are {', '.join(names)})")
