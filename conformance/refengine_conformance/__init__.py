"""The conformance suite: properties by clause, that any backend can be held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refengine_conformance.registry import Property, all_properties, holds
    from refengine_conformance.subject import Subject

_HOMES = {"Property": "registry", "holds": "registry", "all_properties": "registry", "Subject": "subject"}

__all__ = ["Property", "Subject", "all_properties", "holds"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: pytest imports this package wherever it is installed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
