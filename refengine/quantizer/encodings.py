"""The encodings refengine decodes: their names and the sizes of their blocks.

Names are ggml's, in lower case. Source: ggml, ``ggml-common.h`` (the ``block_*`` structures), ``ggml.c``
(``type_traits``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from refengine.errors import UnsupportedError


@dataclass(frozen=True)
class Encoding:
    """How weights are stored: in blocks of ``block_size`` weights, each ``block_bytes`` bytes long.

    Attributes:
        name: ggml's name in lower case, such as ``q4_1``.
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
    near = get_close_matches(name.lower(), ENCODINGS)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UnsupportedError(f"unknown encoding {name!r}{hint} (refengine decodes {', '.join(ENCODINGS)})")
