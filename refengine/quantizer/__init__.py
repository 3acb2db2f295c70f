"""Encodings of stored weights: what their bytes mean, and tensors that decode only when asked.

Most encodings here are *block* encodings: a row of a tensor is cut into blocks of 32 or 256 consecutive
weights, and each block stores small integers beside one or more scales. ``encodings`` names them and gives
their sizes; each family's bytes are specified, in a table and in NumPy, in its own module: ``plain``,
``classic``, ``k_quants``, ``iq4`` and ``mxfp4``; ``groups`` gives the integers and scales of those that
products of 8-bit codes read. ``sealed_kv`` has the formats of keys and values in a cache.
"""

from __future__ import annotations

from refengine.quantizer.decode import decode
from refengine.quantizer.encodings import ENCODINGS, Encoding, encoding
from refengine.quantizer.groups import GROUP, GROUPED, has_offsets, read_groups
from refengine.quantizer.sealed_kv import SEALED_KEYS, SEALED_VALUES
from refengine.quantizer.tensor import LazyTensor

__all__ = [
    "ENCODINGS",
    "GROUP",
    "GROUPED",
    "SEALED_KEYS",
    "SEALED_VALUES",
    "Encoding",
    "LazyTensor",
    "decode",
    "encoding",
    "has_offsets",
    "read_groups",
]
