"""Tiny random models, as the conformance suite makes them."""

from __future__ import annotations

from refengine_conformance.tiny_model import tiny_model

__all__ = ["tiny_model"]
