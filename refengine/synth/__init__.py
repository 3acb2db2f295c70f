"""Synth: checkpoints with the shape of real models and random weights, to measure memory and speed.

``shapes`` has the facts, ``mixture`` says which encoding each tensor gets, ``blocks`` draws the weights,
``vocabulary`` makes up the tokens, and ``checkpoint`` joins them into what ``loader.gguf_writer`` writes.
"""

from __future__ import annotations

from refengine.synth.checkpoint import SyntheticCheckpoint, synthesize
from refengine.synth.shapes import SHAPES, Shape, shape

__all__ = ["SHAPES", "Shape", "SyntheticCheckpoint", "shape", "synthesize"]
