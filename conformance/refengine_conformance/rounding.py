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

Sealing a block is not a matter of first order: rounding either changes a code or it changes nothing. So the
noisy runs read the codes of the exact one, and ``sealed_deviation`` also says from which position on a code
is in doubt: where the noise, taken ``_DOUBT`` times, could change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.models import Model
from refengine.ops import LayerCache, SealedLayerCache
from refengine.program import Instruction, StepBatch, input_arrays
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES
from refengine_conformance.naive_model import Sealing
from refengine_conformance.naive_sealing import in_doubt
from refengine_conformance.subject import KVPart

UNIT_ROUNDOFF: Mapping[str, float] = MappingProxyType({"float32": 2.0**-24, "float64": 2.0**-53})

_RUNS = 2
_DOUBT = 8
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


def sealed_deviation(
    model: Model,
    token_ids: Sequence[int],
    weights: Mapping[str, NDArray[np.float64]],
    sealing: Sealing,
    unit_roundoff: float,
) -> tuple[NDArray[np.float64], int]:
    """How far rounding takes the logits of each position over a sealed cache, ``[T]``.

    Also the number of positions for which that holds: those that read no code in doubt.
    """
    rows, unit = range(len(token_ids)), unit_roundoff / UNIT_ROUNDOFF["float32"]
    exact, states = _run_program(model, token_ids, rows, weights, None, sealing)
    largest = np.zeros(len(rows))
    errors = {
        name: LayerCache(*(np.zeros_like(a) for a in s)) for name, s in states.items() if "exact" in name
    }
    for seed in range(_RUNS):
        logits, noisy = _run_program(model, token_ids, rows, weights, _Noise(seed, weights, states), sealing)
        largest = np.maximum(largest, unit * np.abs(logits - exact).max(axis=1))
        for name, error in errors.items():
            for e, a, b in zip(error, states[name], noisy[name], strict=True):
                np.maximum(e, unit * np.abs(a - b), out=e)
    parts: tuple[KVPart, KVPart] = ("keys", "values")
    for block in range(1, len(rows) // sealing.block_size):
        for name, error in errors.items():
            for part, form, x, e in zip(parts, sealing.formats, states[name], error, strict=True):
                if in_doubt(part, form, x[block], _DOUBT * e[block]):
                    return largest, (block + 1) * sealing.block_size
    return largest, len(rows)


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
    return _run_program(model, token_ids, rows, weights, noise, None)[0]


def _run_program(
    model: Model,
    token_ids: Sequence[int],
    rows: Sequence[int],
    weights: Mapping[str, NDArray[np.float64]],
    noise: _Noise | None,
    sealing: Sealing | None,
) -> tuple[NDArray[np.float64], Mapping[str, Any]]:
    """Logits ``[R, V]``, and every layer's keys and values."""
    program = model.trace(sealed=sealing is not None)
    size = _BLOCK_SIZE if sealing is None else sealing.block_size
    tokens, groups = len(token_ids), len(model.spec.kv_groups) * (1 if sealing is None else 2)
    blocks = -(-tokens // size)
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
    states: dict[str, Any] = {}
    for leaf in program.leaves:
        if leaf.kind == "state":
            layer = model.spec.layers[int(leaf.name.split(".")[1])]
            shape = (blocks, size, layer.kv_heads, layer.head_size)
            if sealing is not None and leaf.name.endswith(".cache"):
                formats = SEALED_KEYS[sealing.formats[0]], SEALED_VALUES[sealing.formats[1]]
                stored = [np.zeros((blocks, form.nbytes(*shape[1:])), np.uint8) for form in formats]
                states[leaf.name] = SealedLayerCache(stored[0], stored[1], formats)
            else:
                states[leaf.name] = LayerCache(np.zeros(shape), np.zeros(shape))
            values[leaf.index] = states[leaf.name]
        else:
            values[leaf.index] = (inputs if leaf.kind == "input" else weights)[leaf.name]
    for instruction in program:
        operands = [None if v is None else values[v.index] for v in instruction.operands]
        if noise is None:
            result = instruction.op.golden(*operands, **instruction.attributes)
        else:
            result = noise.apply(instruction, operands)
        values[instruction.result.index] = result
    return values[program.output.index], states


class _Noise:
    """Adds to each op's result a random error of the size that its float32 evaluation may have.

    Args:
        seed: of the errors.
        weights: by role.
        states: every layer's keys and values as the exact run left them, where they are sealed.
    """

    def __init__(
        self, seed: int, weights: Mapping[str, NDArray[np.float64]], states: Mapping[str, Any] | None = None
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._states = states or {}
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
            case "kv_seal":
                cache = instruction.operands[0]
                return None if cache is None else self._states[cache.name]
            case "attention" | "sealed_attention":
                q, context_lens = operands[0], operands[-1]
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
