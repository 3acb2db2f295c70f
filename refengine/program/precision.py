"""Precision policies: in which dtype each value of a Program is held and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from refengine.errors import UnsupportedError


@dataclass(frozen=True)
class Policy:
    """A precision policy.

    Attributes:
        name: what the user types.
        activations: dtype of every intermediate value, of decoded weights and of arithmetic.
        kv: dtype in which keys and values are stored.

    Clauses: CNV-7, CNV-8, CNV-10.
    """

    name: str
    activations: np.dtype[np.floating]
    kv: np.dtype[np.floating]


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "float64": Policy("float64", activations=_F64, kv=_F64),
        "float32": Policy("float32", activations=_F32, kv=_F32),
    }
)
"""``float64`` is the oracle, ``float32`` the golden default."""


def policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        UnsupportedError: no such policy; the text lists those there are.
    """
    if name not in POLICIES:
        raise UnsupportedError(f"unknown precision policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]
