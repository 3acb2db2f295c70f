"""What another way of running a model would need, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refengine.engine_plan import EnginePlan
    from refengine.models import Model

FLOAT16 = 2

BASIS = (
    "Arithmetic, not measured: every weight once, and keys and values of each position, in layers with a "
    "window of the window's. Activations and the runtime are left out, and of this plan as well."
)


@dataclass(frozen=True)
class Baseline:
    """Weights and KV cache of a model, each with a number of bytes per element and nothing besides.

    Attributes:
        name: whose they are.
        weights, kv_cache: bytes.
    """

    name: str
    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.kv_cache


def baselines(model: Model, plan: EnginePlan, context: int, batch: int) -> tuple[Baseline, Baseline]:
    """Transformers in float16, and the same as if it held weights and KV cache in our precision.

    At equal precision, weights are counted as the file stores them, keys and values as the plan's KV cache.
    """
    tensors = {tensor.name: tensor for tensor in model.weights.values()}.values()
    seen = [batch * min(context, layer.window or context) for layer in model.spec.layers]
    halves = sum(
        positions * 2 * layer.kv_heads * layer.head_size * FLOAT16
        for positions, layer in zip(seen, model.spec.layers, strict=True)
    )
    layout = plan.layout
    stored = sum(
        seen[layer] * (keys + values)
        for g, pool in enumerate(layout.groups)
        if not pool.recent
        for (layer, _, _), (keys, values) in zip(pool.layers, layout.layer_bytes(g), strict=True)
    )
    return (
        Baseline("Transformers, float16", FLOAT16 * sum(t.size for t in tensors), halves),
        Baseline("the same at equal precision", sum(t.nbytes for t in tensors), stored // layout.block_size),
    )
