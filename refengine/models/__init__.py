"""Models: a declarative spec per family, and one decoder for all of them."""

from __future__ import annotations

from refengine.models.decoder import forward
from refengine.models.model import Model, build
from refengine.models.spec import KVGroup, LayerSpec, ModelSpec, RopeSpec

__all__ = ["KVGroup", "LayerSpec", "Model", "ModelSpec", "RopeSpec", "build", "forward"]
