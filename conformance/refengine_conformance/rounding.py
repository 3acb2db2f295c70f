"""How far rounding alone may take two correct engines apart: a bound derived, not typed in.

A network's forward error has no useful closed form, but its first-order behaviour can be sampled (Monte
Carlo arithmetic: Parker, 1997; Higham & Mary, 2019, SIAM J. Sci. Comput. 41(5), for the probabilistic model).
The traced Program is run in float64, and after every op a random error is added of the size that op may make
in the precision in question, with unit roundoff u:

- ``linear``: y = Σ t_k, a sum of K products, rounded at every partial sum s_k by at most u·|s_k|. Independent
  roundings add up to at most u·√(Σ s_k²). Terms of either sign make partial sums walk, Σ s_k² ≤ K·‖t‖²; terms
  of one sign make them climb, Σ s_k² ≤ K·y². So the error has standard deviation √K·u·max(‖t‖, |y|) at most,
  whatever the order.
- ``rms_norm``, ``gated``, ``rope``, ``add``, ``scale``, ``softcap``: a handful of roundings and at most one
  transcendental function: 4·u, relative.
- ``rope_table``: the angle p·f, made of two float32 factors, errs by 2·u·p·f; cosine and sine by u more.
- ``attention``: a score is a sum of D products and errs by √D·u·‖q∘k‖; so does a q each of whose elements
  errs by u·‖q‖. The weighted sum over n keys errs by √n·u relative to its size.

``deviation`` runs this a few times and takes, per row of logits, the largest deviation from the exact run.
Two correct engines each lie about that far from exact; their difference may be twice it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.models import Model
from refengine.ops import LayerCache
from refengine.program import Instruction, StepBatch, input_arrays

UNIT_ROUNDOFF: Mapping[str, float] = MappingProxyType({"float32": 2.0**-24, "float64": 2.0**-53})

_RUNS = 2
_BLOCK_SIZE = 16


def deviation(
    model: Model, token_ids: Sequence[int], rows: Sequence[int], weights: Mapping[str, NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exact logits ``[R, V]`` (float64), and how far float32 rounding takes each row from them, ``[R]``.

    To first order the deviation is proportional to u: scale it by ``2**-29`` for float64.
    """
    exact = _run(model, token_ids, rows, weights, None)
    largest = np.zeros(len(rows))
    for seed in range(_RUNS):
        noisy = _run(model, token_ids, rows, weights, _Noise(seed, weights))
        largest = np.maximum(largest, np.abs(noisy - exact).max(axis=1))
    return exact, largest


def decoded_weights(model: Model) -> dict[str, NDArray[np.float64]]:
    """All weights in float64."""
    return {name: tensor.decode().astype(np.float64) for name, tensor in model.weights.items()}


def _run(
    model: Model,
    token_ids: Sequence[int],
    rows: Sequence[int],
    weights: Mapping[str, NDArray[np.float64]],
    noise: _Noise | None,
) -> NDArray[np.float64]:
    tokens, groups = len(token_ids), len(model.spec.kv_groups)
    blocks = -(-tokens // _BLOCK_SIZE)
    batch = StepBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        query_starts=np.array([0, tokens], np.int32),
        context_lens=np.array([tokens], np.int32),
        logit_rows=np.array(rows, np.int32),
        slot_mapping=(np.arange(tokens, dtype=np.int32),) * groups,
        block_tables=(np.arange(blocks, dtype=np.int32)[None],) * groups,
    )
    inputs = input_arrays(batch)
    values: dict[int, Any] = {}
    for leaf in model.program.leaves:
        if leaf.kind == "state":
            layer = model.spec.layers[int(leaf.name.split(".")[1])]
            shape = (blocks, _BLOCK_SIZE, layer.kv_heads, layer.head_size)
            values[leaf.index] = LayerCache(np.zeros(shape), np.zeros(shape))
        else:
            values[leaf.index] = (inputs if leaf.kind == "input" else weights)[leaf.name]
    for instruction in model.program:
        operands = [None if v is None else values[v.index] for v in instruction.operands]
        if noise is None:
            result = instruction.op.golden(*operands, **instruction.attributes)
        else:
            result = noise.apply(instruction, operands)
        values[instruction.result.index] = result
    logits: NDArray[np.float64] = values[model.program.output.index]
    return logits


class _Noise:
    """Adds to each op's result a random error of the size that its float32 evaluation may have."""

    def __init__(self, seed: int, weights: Mapping[str, NDArray[np.float64]]) -> None:
        self._rng = np.random.default_rng(seed)
        self._squares = {id(weight): np.square(weight) for weight in weights.values() if weight.ndim == 2}

    def apply(self, instruction: Instruction, operands: list[Any]) -> Any:
        """The op's exact result, and its error."""
        golden, u = instruction.op.golden, UNIT_ROUNDOFF["float32"]
        attributes: Mapping[str, Any] = instruction.attributes
        match instruction.op.name:
            case "linear":
                x, weight = operands[:2]
                exact = golden(*operands, **attributes)
                norm = np.sqrt(np.square(x) @ self._squares[id(weight)].T)
                return exact + u * np.sqrt(x.shape[1]) * np.maximum(norm, np.abs(exact)) * self._draw(exact)
            case "rope_table":
                exact = golden(*operands, **attributes)
                angles = operands[0][:, None] * np.array(attributes["frequencies"])
                slip = 2 * np.concatenate([angles * np.sin(angles), angles * np.cos(angles)], axis=1)
                return exact + u * (np.abs(slip) + np.abs(exact)) * self._draw(exact)
            case "attention":
                q, context_lens = operands[0], operands[4]
                shaken = q + u * np.linalg.norm(q, axis=-1, keepdims=True) * self._draw(q)
                exact = golden(shaken, *operands[1:], **attributes)
                size = np.linalg.norm(exact, axis=-1, keepdims=True) / np.sqrt(exact.shape[-1])
                return exact + u * np.sqrt(context_lens.max()) * size * self._draw(exact)
            case "embedding" | "kv_write" | "split_heads" | "merge_heads" | "take_rows":
                return golden(*operands, **attributes)
            case _:
                exact = golden(*operands, **attributes)
                return exact * (1 + 4 * u * self._draw(exact))

    def _draw(self, like: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._rng.standard_normal(like.shape)
