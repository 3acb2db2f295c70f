"""The one forward pass. Every family is this function under another ModelSpec.

Given ``refengine.ops``, NumPy weights and arrays it computes; given a Tracer and symbols it is recorded
as a Program. Optional weights (biases, head norms, norms after a block) are used where they exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refengine.models.spec import ModelSpec
from refengine.program import StepInputs


def forward(
    ops: Any,
    spec: ModelSpec,
    weights: Mapping[str, Any],
    caches: Sequence[Any],
    step: StepInputs[Any],
) -> Any:
    """Logits ``[R, V]`` of the rows ``step.logit_rows``.

    Args:
        ops: the namespace of operations.
        spec: the model.
        weights: by canonical role name (see ``refengine.models.families``).
        caches: the KV cache of each layer, changed in place; of a sealed one, the sealed blocks and the exact
            copies. Then the step has twice as many pools: those of exact copies follow the others.
        step: the inputs.
    """
    x = ops.embedding(step.token_ids, weights["token_embedding"])
    if spec.embedding_scale != 1.0:
        x = ops.scale(x, factor=spec.embedding_scale)
    tables = {
        rope: ops.rope_table(
            step.positions,
            frequencies=rope.frequencies,
            dims=2 * len(rope.frequencies),
            magnitude=rope.magnitude,
        )
        for rope in dict.fromkeys(layer.rope for layer in spec.layers)
    }
    for i in range(len(spec.layers)):
        x = _attention_block(ops, spec, weights, i, x, tables[spec.layers[i].rope], caches[i], step)
        x = _feed_forward_block(ops, spec, weights, i, x)

    x = ops.take_rows(x, step.logit_rows)
    x = ops.rms_norm(x, weights["output_norm"], eps=spec.norm_epsilon)
    logits = ops.linear(x, weights["token_embedding" if spec.tied_embeddings else "output"])
    return logits if spec.logit_softcap is None else ops.softcap(logits, cap=spec.logit_softcap)


def _attention_block(
    ops: Any,
    spec: ModelSpec,
    weights: Mapping[str, Any],
    i: int,
    x: Any,
    rope_table: Any,
    cache: Any,
    step: StepInputs[Any],
) -> Any:
    """``x + attention(norm(x))``."""
    layer, w, eps = spec.layers[i], f"layers.{i}.", spec.norm_epsilon
    group = spec.group_of(i)

    def project(name: str, heads: int) -> Any:
        return ops.split_heads(ops.linear(h, weights[w + name], weights.get(w + name + "_bias")), heads=heads)

    h = ops.rms_norm(x, weights[w + "attention_norm"], eps=eps)
    q = project("q", layer.heads)
    k = project("k", layer.kv_heads)
    v = project("v", layer.kv_heads)
    if w + "q_norm" in weights:
        q = ops.rms_norm(q, weights[w + "q_norm"], eps=eps)
        k = ops.rms_norm(k, weights[w + "k_norm"], eps=eps)
    q = ops.rope(q, rope_table, pairing=layer.rope.pairing)
    k = ops.rope(k, rope_table, pairing=layer.rope.pairing)
    ends = (step.query_starts, step.context_lens)
    options = {
        "scale": layer.attention_scale,
        "window": layer.window,
        "softcap": layer.attention_softcap,
    }
    if len(step.block_tables) > len(spec.kv_groups):
        sealed, exact = cache
        copies = group + len(spec.kv_groups)
        tables = (step.block_tables[group], step.block_tables[copies])
        exact = ops.kv_write(exact, k, v, step.slot_mapping[copies])
        sealed = ops.kv_seal(sealed, exact, *tables, *ends)
        attended = ops.sealed_attention(q, sealed, exact, *tables, *ends, **options)
    else:
        cache = ops.kv_write(cache, k, v, step.slot_mapping[group])
        attended = ops.attention(q, cache, step.block_tables[group], *ends, **options)
    h = ops.linear(
        ops.merge_heads(attended), weights[w + "attention_output"], weights.get(w + "attention_output_bias")
    )
    if w + "post_attention_norm" in weights:
        h = ops.rms_norm(h, weights[w + "post_attention_norm"], eps=eps)
    return ops.add(x, h)


def _feed_forward_block(ops: Any, spec: ModelSpec, weights: Mapping[str, Any], i: int, x: Any) -> Any:
    """``x + down(activation(gate(norm(x))) · up(norm(x)))``."""
    w, eps = f"layers.{i}.", spec.norm_epsilon
    h = ops.rms_norm(x, weights[w + "ffn_norm"], eps=eps)
    gate = ops.linear(h, weights[w + "gate"], weights.get(w + "gate_bias"))
    up = ops.linear(h, weights[w + "up"], weights.get(w + "up_bias"))
    h = ops.gated(gate, up, activation=spec.activation)
    h = ops.linear(h, weights[w + "down"], weights.get(w + "down_bias"))
    if w + "post_ffn_norm" in weights:
        h = ops.rms_norm(h, weights[w + "post_ffn_norm"], eps=eps)
    return ops.add(x, h)
