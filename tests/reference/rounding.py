"""How far rounding alone may take two correct engines apart; the conformance suite derives it."""

from __future__ import annotations

from refengine_conformance.rounding import UNIT_ROUNDOFF, decoded_weights, deviation

__all__ = ["UNIT_ROUNDOFF", "decoded_weights", "deviation"]
