"""Which encoding each matrix of a file gets when all of it is quantized to one.

Few files are of one encoding: matrices that matter more than others get more bits, and rows that are not
whole blocks get another encoding. Files here have the mixture that ``llama-quantize`` makes without an
importance matrix (llama.cpp, ``src/llama-quant.cpp``), so that their sizes are those of real files. ``q3_k``,
``q4_k`` and ``q5_k`` are its Q3_K_M, Q4_K_M and Q5_K_M. It keeps MXFP4 for experts; here, ``mxfp4`` stands
for the layers' matrices, beside an embedding and an output in the ``q8_0`` that it gives to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from refengine.errors import UnsupportedError
from refengine.quantizer import ENCODINGS

FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        **{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12},
        **{"q4_k": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32, "mxfp4": 38},
    }
)
"""The number by which ``general.file_type`` calls a file of this encoding (``llama_ftype``)."""

FALLBACKS: Mapping[str, str] = MappingProxyType(
    {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
)
"""What stands in where rows are not whole blocks of 256."""

PLAIN = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Mixture:
    """How the matrices of one model are stored.

    Attributes:
        encoding: of the file as a whole, a name in ``FILE_TYPES``.
        layers: how many the model has.
        queries_per_kv: query heads that share a head of keys and values.
        tied_embeddings: whether the embedding is the output matrix as well.
        uniform: give every matrix this encoding.
    """

    encoding: str
    layers: int
    queries_per_kv: int
    tied_embeddings: bool
    uniform: bool = False

    def of(self, role: str, columns: int) -> str:
        """The encoding of the matrix with this role (``token_embedding``, ``layers.3.v``).

        Raises:
            UnsupportedError: its rows, of ``columns`` weights, are not whole blocks of any that would do.
        """
        chosen = self.encoding if self.uniform or self.encoding in PLAIN else self._favoured(role, columns)
        if columns % ENCODINGS[chosen].block_size:
            chosen = FALLBACKS.get(chosen, chosen)
        if columns % ENCODINGS[chosen].block_size:
            raise UnsupportedError(
                f"{role} has rows of {columns} weights, not whole blocks of {ENCODINGS[chosen].block_size}: "
                f"{self.encoding} cannot hold it; {', '.join(PLAIN)} can"
            )
        return chosen

    def _favoured(self, role: str, columns: int) -> str:
        if role == "output" or (role == "token_embedding" and self.tied_embeddings):
            whole = columns % ENCODINGS[self.encoding].block_size == 0
            return "q6_k" if whole and self.encoding not in ("q8_0", "mxfp4") else "q8_0"
        if role == "token_embedding":
            return "q8_0" if self.encoding == "mxfp4" else self.encoding
        _, layer, kind = role.split(".")
        chosen = {"v": self._values, "down": self._down, "attention_output": self._attention_output}.get(kind)
        return chosen(int(layer)) if chosen else self.encoding

    def _values(self, layer: int) -> str:
        match self.encoding:
            case "q2_k":
                return "q4_k" if self.queries_per_kv >= 4 else "q3_k"
            case "q3_k":
                return "q5_k" if layer < 2 else "q4_k"
            case "iq4_nl" | "iq4_xs" if self.queries_per_kv >= 4:
                return "q5_k"
            case "q4_k" | "q5_k" if self._matters(layer):
                return "q6_k"
        return self.encoding

    def _down(self, layer: int) -> str:
        match self.encoding:
            case "q2_k":
                return "q3_k"
            case "q3_k":
                return "q5_k" if layer < self.layers // 16 else "q4_k"
            case "iq4_nl" | "iq4_xs" if layer < self.layers // 8:
                return "q5_k"
            case "q4_k" | "q5_k" if self._matters(layer):
                return "q6_k"
        return self.encoding

    def _attention_output(self, layer: int) -> str:
        return {"q2_k": "q3_k", "q3_k": "q4_k"}.get(self.encoding, self.encoding)

    def _matters(self, layer: int) -> bool:
        """The first and last eighth of the layers, and every third between them."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
