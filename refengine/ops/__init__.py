"""The golden operations: what every backend must compute, written in NumPy.

This package is itself the namespace of ops that the decoder takes: given ``refengine.ops`` it runs
eagerly; given a tracer with the same names it is recorded (``refengine.program``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from refengine.ops.arrays import FloatArray, IndexArray
from refengine.ops.attention import LayerCache, attention, kv_write
from refengine.ops.elementwise import Activation, add, gated, scale, softcap
from refengine.ops.linear import embedding, linear
from refengine.ops.linear_a8 import linear_a8, quantize_a8
from refengine.ops.linear_a16 import linear_a16
from refengine.ops.norm import rms_norm
from refengine.ops.registry import Op, declared
from refengine.ops.rope import Pairing, rope, rope_table
from refengine.ops.sealed_attention import SealedLayerCache, kv_seal, sealed_attention
from refengine.ops.shape import merge_heads, split_heads, take_rows
from refengine.ops.signature import Dim, Shape, ShapeError

OPS: Mapping[str, Op] = MappingProxyType(
    declared(
        embedding,
        scale,
        rope_table,
        rms_norm,
        linear,
        quantize_a8,
        linear_a8,
        linear_a16,
        split_heads,
        merge_heads,
        rope,
        kv_write,
        attention,
        kv_seal,
        sealed_attention,
        add,
        gated,
        softcap,
        take_rows,
    )
)
"""The instruction set, in the order in which a decoder meets it."""

__all__ = [
    "OPS",
    "Activation",
    "Dim",
    "FloatArray",
    "IndexArray",
    "LayerCache",
    "Op",
    "Pairing",
    "SealedLayerCache",
    "Shape",
    "ShapeError",
    "add",
    "attention",
    "embedding",
    "gated",
    "kv_seal",
    "kv_write",
    "linear",
    "linear_a8",
    "linear_a16",
    "merge_heads",
    "quantize_a8",
    "rms_norm",
    "rope",
    "rope_table",
    "scale",
    "sealed_attention",
    "softcap",
    "split_heads",
    "take_rows",
]
