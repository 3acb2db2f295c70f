"""Faults in ops (chapter *Operations*)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refengine import ops
from refengine.backend import Executable
from refengine.backend.numpy_backend import NumpyBackend
from refengine.ops import FloatArray, IndexArray
from refengine.program import StepBatch
from refengine_conformance.faults.fault import Fault, faulty_op
from refengine_conformance.subject import Subject

Out = FloatArray | None


def _given(result: FloatArray, out: Out) -> FloatArray:
    """The result, in the place that the plan has for it."""
    if out is None:
        return result
    out[...] = result
    return out


# -- Every op ----------------------------------------------------------------------------------------------


class _Promoting(NumpyBackend):
    """Gives its results in float64."""

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        executable: Executable = super().compile(*args, **kwargs)

        class Promoted:
            def run(self, batch: StepBatch) -> FloatArray:
                return executable.run(batch).astype(np.float64)

        return Promoted()


def _sum_order_follows_rows(
    x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None
) -> FloatArray:
    backwards = slice(None, None, -1 if len(x) > 1 else 1)
    return ops.linear(x[:, backwards], np.ascontiguousarray(weight[:, backwards]), bias, out=out)


def _split_sum(x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None) -> FloatArray:
    if len(x) >= 8 or x.shape[1] < 2:
        return ops.linear(x, weight, bias, out=out)
    half = x.shape[1] // 2
    first, second = (ops.linear(x[:, part], weight[:, part]) for part in (slice(half), slice(half, None)))
    return _given(first + second + (0 if bias is None else bias), out)


def _norm_over_the_batch(x: FloatArray, weight: FloatArray, *, eps: float, out: Out = None) -> FloatArray:
    root = np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(eps))
    return _given(x * (1 / root) * weight + (root.sum() - root.sum()), out)


def _one_hot_rows(x: FloatArray, rows: IndexArray, *, out: Out = None) -> FloatArray:
    return _given(np.eye(len(x), dtype=x.dtype)[rows] @ x, out)


def _racing_sum() -> Subject:
    calls = itertools.count()

    def linear(x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None) -> FloatArray:
        order = np.random.default_rng(next(calls)).permutation(x.shape[1])
        return ops.linear(x[:, order], np.ascontiguousarray(weight[:, order]), bias, out=out)

    return faulty_op("linear", linear)()


def _norm_in_place(x: FloatArray, weight: FloatArray, *, eps: float, out: Out = None) -> FloatArray:
    return _given(ops.rms_norm(x, weight, eps=eps, out=x), out)


def _gate_in_place(
    gate: FloatArray, up: FloatArray, *, activation: ops.Activation, out: Out = None
) -> FloatArray:
    return _given(ops.gated(gate, up, activation=activation, out=up), out)


def _rope_in_place(x: FloatArray, table: FloatArray, *, pairing: ops.Pairing, out: Out = None) -> FloatArray:
    return _given(ops.rope(x, table, pairing=pairing, out=x), out)


# -- Moving and adding -------------------------------------------------------------------------------------


def _padding_id(token_ids: IndexArray, table: FloatArray, *, out: Out = None) -> FloatArray:
    rows = table[token_ids]
    rows[token_ids == 0] = 0
    return _given(rows, out)


def _last_row_missed(x: FloatArray, rows: IndexArray, *, out: Out = None) -> FloatArray:
    return ops.take_rows(x, np.minimum(rows, max(len(x) - 2, 0)), out=out)


def _interleaved_heads(x: FloatArray, *, heads: int) -> FloatArray:
    return x.reshape(len(x), -1, heads).swapaxes(1, 2)


def _scale_in_half(x: FloatArray, *, factor: float, out: Out = None) -> FloatArray:
    with np.errstate(over="ignore"):
        return ops.scale(x.astype(np.float16).astype(x.dtype), factor=factor, out=out)


def _factor_in_bfloat16(x: FloatArray, *, factor: float, out: Out = None) -> FloatArray:
    return ops.scale(x, factor=float(_shortened(np.float32(factor), 16)), out=out)


def _saturating_add(x: FloatArray, y: FloatArray, *, out: Out = None) -> FloatArray:
    largest = np.finfo(x.dtype).max
    with np.errstate(over="ignore"):
        return _given(np.clip(ops.add(x, y, out=out), -largest, largest), out)


def _shortened(x: Any, bits: int) -> Any:
    """Float32 without its last bits."""
    return (np.asarray(x, np.float32).view(np.uint32) >> bits << bits).view(np.float32)


# -- linear ------------------------------------------------------------------------------------------------


def _half_accumulator(x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None) -> FloatArray:
    total = np.zeros((len(x), len(weight)), np.float16)
    with np.errstate(all="ignore"):
        for k in range(x.shape[1]):
            total += (x[:, k, None] * weight[:, k]).astype(np.float16)
    return _given(total.astype(x.dtype) + (0 if bias is None else bias), out)


def _tensor_core(x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None) -> FloatArray:
    short_x, short_weight = (_shortened(a, 13).astype(x.dtype) for a in (x, weight))
    return ops.linear(short_x, short_weight, bias, out=out)


def _no_bias_for_one(x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None) -> FloatArray:
    return ops.linear(x, weight, None if len(x) == 1 else bias, out=out)


def _two_biases(x: FloatArray, weight: FloatArray, bias: Out = None, *, out: Out = None) -> FloatArray:
    y = ops.linear(x, weight, bias, out=out)
    return y if bias is None else np.add(y, bias, out=out)


# -- rms_norm ----------------------------------------------------------------------------------------------


def _norm(root: Callable[[FloatArray, Any], FloatArray], *, centred: bool = False) -> Callable[[], Subject]:
    """RMS normalisation with another root, a function of a row and eps."""

    def rms_norm(x: FloatArray, weight: FloatArray, *, eps: float, out: Out = None) -> FloatArray:
        centre = x - x.mean(-1, keepdims=True) if centred else x
        return _given(centre / root(centre, x.dtype.type(eps)) * weight, out)

    return faulty_op("rms_norm", rms_norm)


def _mean_square(x: FloatArray) -> FloatArray:
    mean: FloatArray = np.square(x).mean(-1, keepdims=True)
    return mean


# -- RoPE --------------------------------------------------------------------------------------------------


def _table(**changed: Callable[[Any], Any]) -> Callable[[], Subject]:
    """A rope table made with some of its arguments changed."""

    def rope_table(positions: IndexArray, *, out: Out = None, **attributes: Any) -> FloatArray:
        arguments = {"positions": positions, **attributes}
        arguments |= {name: change(arguments) for name, change in changed.items()}
        return ops.rope_table(**arguments, out=out)

    return faulty_op("rope_table", rope_table)


def _base_10000(arguments: dict[str, Any]) -> tuple[float, ...]:
    dims = arguments["dims"]
    return tuple(10_000.0 ** (-i / dims) for i in range(0, dims, 2))


def _from_the_first(positions: IndexArray) -> IndexArray:
    return np.arange(len(positions)) + int(positions[0])


def _single_angles(
    positions: IndexArray,
    *,
    frequencies: tuple[float, ...],
    dims: int,
    magnitude: float = 1.0,
    out: Out = None,
) -> FloatArray:
    angles = positions[:, None].astype(np.float32) * np.array(frequencies, np.float32)
    return _given(np.concatenate([np.cos(angles), np.sin(angles)], 1) * np.float32(magnitude), out)


def _other_pairing(x: FloatArray, table: FloatArray, *, pairing: ops.Pairing, out: Out = None) -> FloatArray:
    return ops.rope(x, table, pairing="halves" if pairing == "interleaved" else "interleaved", out=out)


def _halves_of_the_head(
    x: FloatArray, table: FloatArray, *, pairing: ops.Pairing, out: Out = None
) -> FloatArray:
    size, dims = x.shape[-1], table.shape[-1]
    if pairing == "interleaved" or size % 2 or dims == size:
        return ops.rope(x, table, pairing=pairing, out=out)
    none = np.zeros((len(x), (size - dims) // 2), table.dtype)
    cosines, sines = table[:, : dims // 2], table[:, dims // 2 :]
    return ops.rope(x, np.concatenate([cosines, none + 1, sines, none], 1), pairing=pairing, out=out)


def _mirrored(x: FloatArray, table: FloatArray, *, pairing: ops.Pairing, out: Out = None) -> FloatArray:
    dims = table.shape[-1]
    forwards = ops.rope(x, table, pairing=pairing)
    backwards = ops.rope(
        x, table * np.where(np.arange(dims) < dims // 2, 1, -1).astype(table.dtype), pairing=pairing
    )
    second = (np.arange(dims) % 2 == 1) if pairing == "interleaved" else (np.arange(dims) >= dims // 2)
    forwards[..., :dims][..., second] = backwards[..., :dims][..., second]
    return _given(forwards, out)


# -- Activations -------------------------------------------------------------------------------------------


def _exact_gelu(
    gate: FloatArray, up: FloatArray, *, activation: ops.Activation, out: Out = None
) -> FloatArray:
    if activation == "silu":
        return ops.gated(gate, up, activation=activation, out=out)
    error_function = np.vectorize(math.erf, otypes=[np.float64])(gate / math.sqrt(2))
    return _given((0.5 * gate * (1 + error_function) * up).astype(gate.dtype), out)


def _sigmoid(gate: FloatArray, up: FloatArray, *, activation: ops.Activation, out: Out = None) -> FloatArray:
    if activation != "silu":
        return ops.gated(gate, up, activation=activation, out=out)
    with np.errstate(over="ignore"):
        return _given(up / (1 + np.exp(-gate)), out)


def _activated_up(
    gate: FloatArray, up: FloatArray, *, activation: ops.Activation, out: Out = None
) -> FloatArray:
    return _given(ops.gated(up, gate, activation=activation), out)


def _naive_silu(
    gate: FloatArray, up: FloatArray, *, activation: ops.Activation, out: Out = None
) -> FloatArray:
    if activation != "silu":
        return ops.gated(gate, up, activation=activation, out=out)
    with np.errstate(all="ignore"):
        grown = np.exp(gate)
        return _given(gate * (grown / (1 + grown)) * up, out)


def _uncapped(x: FloatArray, *, cap: float, out: Out = None) -> FloatArray:
    return _given(np.tanh(x / x.dtype.type(cap)), out)


def _clipped(x: FloatArray, *, cap: float, out: Out = None) -> FloatArray:
    return _given(np.clip(x, -cap, cap), out)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "results in float64",
        "OPS-1",
        "A Python or NumPy scalar of float64 somewhere on the way promotes what it touches.",
        lambda: Subject(_Promoting),
    ),
    Fault(
        "a sum's order follows the number of rows",
        "OPS-2",
        "A BLAS takes a matrix-vector kernel for one row and a matrix-matrix kernel for more.",
        faulty_op("linear", _sum_order_follows_rows),
    ),
    Fault(
        "a sum is split in two for small batches",
        "OPS-2",
        "Split-K kernels fill the processor where there are few rows, and add the parts at the end.",
        faulty_op("linear", _split_sum),
    ),
    Fault(
        "rows fetched by a product with zeros and ones",
        "OPS-2",
        "One-hot products replace gathers on accelerators that gather slowly; zero times infinity is NaN.",
        faulty_op("take_rows", _one_hot_rows),
    ),
    Fault(
        "a row's norm touches those of the batch",
        "OPS-2",
        "A check for overflow summed over the whole batch finds its way into the result.",
        faulty_op("rms_norm", _norm_over_the_batch),
    ),
    Fault(
        "a sum in whatever order its parts arrive",
        "OPS-3",
        "Partial sums added atomically arrive in another order each time.",
        _racing_sum,
    ),
    Fault(
        "the norm overwrites the residual",
        "OPS-4",
        "An in-place kernel is called where the operand is needed for the residual connection.",
        faulty_op("rms_norm", _norm_in_place),
    ),
    Fault(
        "the gate's product lies in its second operand",
        "OPS-4",
        "The plan lets a result take the first operand's place, and the kernel takes the second's.",
        faulty_op("gated", _gate_in_place),
    ),
    Fault(
        "rope turns its operand",
        "OPS-4",
        "A view of a tensor is rotated in place, and the tensor with it.",
        faulty_op("rope", _rope_in_place),
    ),
    Fault(
        "token 0 taken for padding",
        "OPS-5",
        "Training frameworks have a padding id whose embedding is zero; inference has none.",
        faulty_op("embedding", _padding_id),
    ),
    Fault(
        "the last row is never taken",
        "OPS-5",
        "A bound that is off by one clamps the row whose logits are wanted most.",
        faulty_op("take_rows", _last_row_missed),
    ),
    Fault(
        "heads taken in strides",
        "OPS-5",
        "Reshape to [size, heads] and transpose: right for tensors that are stored so, and for no others.",
        faulty_op("split_heads", _interleaved_heads),
    ),
    Fault(
        "scaled after rounding to float16",
        "OPS-6",
        "Activations are stored as float16 before the embedding's factor is applied.",
        faulty_op("scale", _scale_in_half),
    ),
    Fault(
        "the factor in bfloat16",
        "OPS-6",
        "Gemma's embedding factor was rounded to bfloat16 in training, but not every checkpoint's was.",
        faulty_op("scale", _factor_in_bfloat16),
    ),
    Fault(
        "sums saturate",
        "OPS-6",
        "Overflow is clamped to the largest number to keep infinity out of what follows, and hides there.",
        faulty_op("add", _saturating_add),
    ),
    Fault(
        "float16 accumulator",
        "OPS-7",
        "The fast mode of many matrix units adds products of float16 in float16.",
        faulty_op("linear", _half_accumulator),
    ),
    Fault(
        "factors shortened to TF32",
        "OPS-7",
        "Tensor cores take float32 and read 10 bits of its fraction, unless told otherwise.",
        faulty_op("linear", _tensor_core),
    ),
    Fault(
        "no bias for one row",
        "OPS-7",
        "Decoding has its own matrix-vector kernel, to which nobody passed the bias.",
        faulty_op("linear", _no_bias_for_one),
    ),
    Fault(
        "bias added twice",
        "OPS-7",
        "Once as the initial value of the accumulator, and again in the epilogue.",
        faulty_op("linear", _two_biases),
    ),
    Fault(
        "eps outside the root",
        "OPS-8",
        "√(mean) + eps is how other layers of normalisation are written.",
        _norm(lambda x, eps: np.sqrt(_mean_square(x)) + eps),
    ),
    Fault(
        "no eps",
        "OPS-8",
        "The key of the hyper-parameter was not found, and zero stood in for it.",
        _norm(lambda x, eps: np.sqrt(_mean_square(x))),
    ),
    Fault(
        "mean over N - 1",
        "OPS-8",
        "The unbiased variance of a statistics library in place of the mean.",
        _norm(lambda x, eps: np.sqrt(np.square(x).sum(-1, keepdims=True) / max(x.shape[-1] - 1, 1) + eps)),
    ),
    Fault(
        "layer normalisation",
        "OPS-8",
        "The mean is subtracted first, as in the layer that this one replaced.",
        _norm(lambda x, eps: np.sqrt(_mean_square(x) + eps), centred=True),
    ),
    Fault(
        "RoPE base dropped",
        "OPS-9",
        "The base of 10,000 is built in, and the model's own is never read (mlx-lm lost a default so).",
        _table(frequencies=_base_10000),
    ),
    Fault(
        "RoPE magnitude dropped",
        "OPS-9",
        "YaRN's frequencies were implemented, and its attention factor forgotten.",
        _table(magnitude=lambda arguments: 1.0),
    ),
    Fault(
        "RoPE angles in float32",
        "OPS-9",
        "Position times frequency in float32 is right for short contexts, and wrong for long ones.",
        faulty_op("rope_table", _single_angles),
    ),
    Fault(
        "positions counted from the step's first row",
        "OPS-9",
        "The length of the cache was not added where a prompt is processed in chunks (as in mlx-lm#1457).",
        _table(positions=lambda arguments: np.arange(len(arguments["positions"]))),
    ),
    Fault(
        "one offset for the whole batch",
        "OPS-9",
        "Positions go on from the first row's, whosever the rows behind it are (mlx-lm#1457).",
        _table(positions=lambda arguments: _from_the_first(arguments["positions"])),
    ),
    Fault(
        "RoPE pairing swapped",
        "OPS-10",
        "GGUF permutes the rows of some families' projections, and leaves those of others.",
        faulty_op("rope", _other_pairing),
    ),
    Fault(
        "partial RoPE pairs halves of the whole head",
        "OPS-10",
        "Element i is paired with i + D / 2, which is right where all of the head is turned.",
        faulty_op("rope", _halves_of_the_head),
    ),
    Fault(
        "RoPE mirrors instead of turning",
        "OPS-11",
        "One sign of the rotation is wrong, which keeps some lengths and all of position 0.",
        faulty_op("rope", _mirrored),
    ),
    Fault(
        "positions in float16",
        "OPS-11",
        "Positions were cast along with the activations: beyond 2048 neighbours share one.",
        _table(positions=lambda arguments: arguments["positions"].astype(np.float16)),
    ),
    Fault(
        "GELU by the error function",
        "OPS-12",
        "The two GELUs differ by up to a thousandth, and configuration files name either one `gelu`.",
        faulty_op("gated", _exact_gelu),
    ),
    Fault(
        "SiLU without its gate",
        "OPS-12",
        "A sigmoid instead of g · sigmoid(g).",
        faulty_op("gated", _sigmoid),
    ),
    Fault(
        "gate and up exchanged",
        "OPS-12",
        "Fused projections store [gate, up] or [up, gate].",
        faulty_op("gated", _activated_up),
    ),
    Fault(
        "SiLU overflows",
        "OPS-12",
        "eᵍ / (1 + eᵍ) is infinity over infinity for a large gate.",
        faulty_op("gated", _naive_silu),
    ),
    Fault(
        "cap not multiplied back",
        "OPS-13",
        "tanh(x / cap) keeps the order of the logits: greedy decoding looks right.",
        faulty_op("softcap", _uncapped),
    ),
    Fault(
        "hard cap",
        "OPS-13",
        "Clipping in place of the tangent.",
        faulty_op("softcap", _clipped),
    ),
)
