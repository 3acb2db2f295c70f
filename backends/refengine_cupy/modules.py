"""The modules whose kernels a policy's programs may take: all that there is to compile for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from types import MappingProxyType

from refengine.program import Policy
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES
from refengine_cupy.packing import LAYOUTS, PLAIN
from refengine_cupy.source import FOLDER, SEALED_MODULES, formats_name

Module = tuple[str, str | None]
"""Name of a file, and which version of it: see ``source.text_of``."""

EVEN: Mapping[str, tuple[bool, ...]] = MappingProxyType(
    {"seal": (False,), "attention_sealed": (True, False), "attention_sealed_tiles": (True,)}
)
"""Of the modules for sealed caches, the versions that are launched: see ``source.formats_name``."""


def modules_for(policy: Policy) -> tuple[Module, ...]:
    """Every module that a program under a policy may need, in every version.

    Products with weights are in modules called after the policy's: ``linear``, ``linear_a8``, ``linear_a16``,
    with any ending. Those of codes are beside plain ones, for weights that are in no groups.
    """
    products = {"plain": ("linear",), "a8": ("linear", "linear_a8"), "a16": ("linear_a16",)}[policy.products]
    names = sorted(path.stem for path in FOLDER.glob("*.cu"))
    return tuple((name, version) for name in names for version in _versions(name, products, policy.kv.name))


def _versions(name: str, products: tuple[str, ...], exact: str) -> Iterator[str | None]:
    if name in SEALED_MODULES:
        for keys, values, even in product(SEALED_KEYS, SEALED_VALUES, EVEN[name]):
            yield formats_name(keys, values, exact, even=even)
    elif not name.startswith("linear"):
        yield None
    elif "_".join(name.split("_")[:2]) in products:
        yield from (*LAYOUTS, *PLAIN)
