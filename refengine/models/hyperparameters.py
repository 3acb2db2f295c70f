"""Reading a family's hyper-parameters strictly: what nobody reads is an error, not a silence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from refengine.errors import FormatError, UnsupportedError
from refengine.loader.metadata import Metadata

T = TypeVar("T")

MAX_COUNT = 2**31 - 1
"""No count in a model comes near this; larger ones are malformed."""

WITHOUT_EFFECT = frozenset({"vocab_size", "attention.causal"})
"""Keys that restate what is known otherwise."""


class HyperParameters:
    """The keys ``{architecture}.*`` of a checkpoint; remembers which were read."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.architecture = metadata.string("general.architecture")
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.metadata

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.metadata.integer(self._key(name), *_optional(default))
        if not 0 < value <= MAX_COUNT:
            raise self.error(name, f"must be between 1 and {MAX_COUNT}, but is {value}")
        return value

    def counts(self, name: str, layers: int, default: int | None = None) -> tuple[int, ...]:
        """A positive integer per layer, given as one for all or as an array."""
        value = self.metadata.get(self._key(name))
        if not isinstance(value, np.ndarray):
            return (self.count(name, default),) * layers
        if value.dtype.kind not in "iu" or len(value) != layers:
            raise self.error(name, f"must be an integer, or {layers} of them")
        if not ((value > 0) & (value <= MAX_COUNT)).all():
            raise self.error(name, f"must be between 1 and {MAX_COUNT} in every layer")
        return tuple(int(v) for v in value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self.metadata.number(self._key(name), *_optional(default))
        if not (math.isfinite(value) and value > 0):
            raise self.error(name, f"must be finite and positive, but is {value}")
        return value

    def string(self, name: str, default: str) -> str:
        """A string."""
        return self.metadata.string(self._key(name), default)

    def flags(self, name: str, layers: int) -> tuple[bool, ...]:
        """A boolean per layer."""
        value = self.metadata.array(self._key(name))
        if value.dtype.kind not in "b" and not (
            value.dtype.kind in "iu" and ((value == 0) | (value == 1)).all()
        ):
            raise self.error(name, "must be an array of booleans")
        if len(value) != layers:
            raise self.error(name, f"must have one entry for each of {layers} layers, but has {len(value)}")
        return tuple(bool(v) for v in value)

    def error(self, name: str, problem: str) -> FormatError:
        """The error to raise about a hyper-parameter."""
        return self.metadata.error(self._key(name), problem)

    def refuse_unread(self, supported_values: Mapping[str, object] | None = None) -> None:
        """Raise for a key that was not read: it would change the result, and nobody would know.

        Args:
            supported_values: keys that may be there as long as they have this value.

        Raises:
            UnsupportedError: naming the key.

        Clauses: CKP-12.
        """
        prefix = f"{self.architecture}."
        for key in self.metadata:
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or key in self._read or name in WITHOUT_EFFECT:
                continue
            value = self.metadata[key]
            if supported_values and name in supported_values and value == supported_values[name]:
                continue
            raise UnsupportedError(
                f"hyper-parameter {key} = {value!r} is not one that refengine implements for the "
                f"architecture {self.architecture!r}; running the model without it would give other results"
            )

    def _key(self, name: str) -> str:
        key = f"{self.architecture}.{name}"
        self._read.add(key)
        return key


def _optional(default: T | None) -> tuple[T] | tuple[()]:
    return () if default is None else (default,)
