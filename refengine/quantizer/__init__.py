"""Encodings of stored weights: what their bytes mean, and tensors that decode only when asked.

Most encodings here are *block* encodings: a row of a tensor is cut into blocks of 32 to 256 consecutive
weights, and each block stores small integers beside one or more scales. ``encodings`` names them and gives
their sizes; each family's bytes are specified, in a table and in NumPy, in its own module: ``plain``,
``classic``, ``k_quants``, ``iq4``, ``mxfp4`` and ``affine``; ``groups`` gives the integers and scales of
those that products of 8-bit codes read. ``gptq`` and ``awq`` lay the tensors of such checkpoints out as rows
of an affine encoding. ``sealed_kv`` has the formats of keys and values in a cache.
"""

from __future__ import annotations

from refengine.quantizer.awq import from_awq
from refengine.quantizer.decode import decode
from refengine.quantizer.encodings import ENCODINGS, Encoding, encoding
from refengine.quantizer.gptq import from_gptq
from refengine.quantizer.groups import GROUP, GROUPED, has_offsets, read_groups
from refengine.quantizer.sealed_kv import SEALED_KEYS, SEALED_VALUES
from refengine.quantizer.stored_rows import StoredRows
from refengine.quantizer.tensor import LazyTensor

__all__ = [
    "ENCODINGS",
    "GROUP",
    "GROUPED",
    "SEALED_KEYS",
    "SEALED_VALUES",
    "Encoding",
    "LazyTensor",
    "StoredRows",
    "decode",
    "encoding",
    "from_awq",
    "from_gptq",
    "has_offsets",
    "read_groups",
]
