"""Precision policies: in which dtype each value of a Program is held and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from refengine.errors import UnsupportedError
from refengine.memory import SealedFormat
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES

Products = Literal["plain", "a8", "a16"]
"""How ``linear`` is computed: as it stands; of activations in 8-bit codes and the weights' stored integers;
or of activations and weights rounded to float16."""


@dataclass(frozen=True)
class Policy:
    """A precision policy.

    Attributes:
        name: what the user types.
        activations: dtype of every intermediate value, of decoded weights and of arithmetic.
        kv: dtype in which keys and values are stored.
        products: how products with weight matrices are computed.

    Clauses: CNV-7, CNV-8, CNV-10, MIX-1.
    """

    name: str
    activations: np.dtype[np.floating]
    kv: np.dtype[np.floating]
    products: Products = "plain"


_PLAIN = ("float16", "float32", "float64")

_F16, _F32, _F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "float64": Policy("float64", activations=_F64, kv=_F64),
        "float32": Policy("float32", activations=_F32, kv=_F32),
        "mixed8": Policy("mixed8", activations=_F32, kv=_F16, products="a8"),
        "mixed16": Policy("mixed16", activations=_F32, kv=_F16, products="a16"),
    }
)
"""``float64`` is the oracle, ``float32`` the golden default; the mixed ones are for speed."""


def policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        UnsupportedError: no such policy; the text lists those there are.
    """
    if name not in POLICIES:
        raise UnsupportedError(f"unknown precision policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]


def kv_formats(
    name: str | None, chosen: Policy
) -> tuple[np.dtype[np.floating], tuple[SealedFormat, SealedFormat] | None]:
    """Dtype of plain keys and values, and the formats of sealed ones, ``None`` where they are not sealed.

    Args:
        name: a float dtype, to which keys and values are rounded when they are written; or a format of
            sealed blocks (``int8``, ``int4``), or two of them as ``keys/values``, beside which exact copies
            keep the policy's dtype; ``None`` for the policy's dtype.
        chosen: the precision policy.

    Raises:
        UnsupportedError: no such KV dtype, or one that holds more than the policy computes.

    Clauses: SKV-10.
    """
    if name is None:
        return chosen.kv, None
    keys, values = name.split("/") if name.count("/") == 1 else (name, name)
    if keys == values and keys in _PLAIN:
        if np.dtype(keys).itemsize > chosen.activations.itemsize:
            raise UnsupportedError(
                f"KV dtype {name} holds more than the policy {chosen.name} computes: leave it out, "
                f"or choose the policy {keys}"
            )
        return np.dtype(keys), None
    for part in (keys, values):
        if part not in SEALED_KEYS:
            raise UnsupportedError(
                f"unknown KV dtype {part!r}; there are {', '.join(dict.fromkeys((*_PLAIN, *SEALED_KEYS)))}, "
                "and pairs of keys/values such as int8/int4"
            )
    return chosen.kv, (SEALED_KEYS[keys], SEALED_VALUES[values])
