"""refengine: a memory-efficient LLM inference engine whose NumPy implementation is the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from refengine.config import EngineConfig
    from refengine.engine import Engine
    from refengine.llm import LLM, Completion, load
    from refengine.request import Output, Request
    from refengine.sampling import SamplingParams

_HOMES = {
    "LLM": "refengine.llm",
    "Completion": "refengine.llm",
    "Engine": "refengine.engine",
    "EngineConfig": "refengine.config",
    "Output": "refengine.request",
    "Request": "refengine.request",
    "SamplingParams": "refengine.sampling",
    "load": "refengine.llm",
}

__all__ = [
    "LLM",
    "Completion",
    "Engine",
    "EngineConfig",
    "Output",
    "Request",
    "SamplingParams",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import refengine`` itself stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
