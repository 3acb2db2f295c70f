"""Why keys and values are sealed as they are: other ways to quantize them, measured on a model's own.

    OPENBLAS_NUM_THREADS=1 python benchmarks/kv_formats.py [MODEL]

The decoder runs eagerly over a namespace of ops whose attention reads keys and values quantized in some way:
scales per channel of a block of 16 positions or per 32 elements of a token, around zero or from the least
number up, or as in chapter 11 of the specification; with the first block and the query's own exact, or not.
Printed as in ``kv_quality.py``. Nothing here is fast, or bounded in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from kv_quality import compare
from numpy.typing import NDArray

from refengine import loader, ops
from refengine.models import Model, build, forward
from refengine.ops.scratch import Scratch
from refengine.program import StepInputs
from refengine.quantizer import SEALED_KEYS, SEALED_VALUES
from refengine.tokenizer import build_tokenizer

Array = NDArray[np.floating]
Quantize = Callable[[Array, int], Array]
"""``quantize(x, axis)``: what is read of numbers that share a scale along an axis."""

BLOCK, GROUP = 16, 32


def around_zero(bits: int) -> Quantize:
    """A float16 scale: the codes reach as far below zero as above."""

    def quantize(x: Array, axis: int) -> Array:
        most = 2 ** (bits - 1) - 1
        d = _half(np.abs(x).max(axis, keepdims=True) / most)
        return d * np.clip(np.rint(_quotient(x, d)), -most, most)

    return quantize


def from_the_least(bits: int) -> Quantize:
    """A float16 scale and a float16 least number."""

    def quantize(x: Array, axis: int) -> Array:
        least = _half(x.min(axis, keepdims=True))
        d = _half((x.max(axis, keepdims=True) - least) / (2**bits - 1))
        return least + d * np.clip(np.rint(_quotient(x - least, d)), 0, 2**bits - 1)

    return quantize


def exact(k: Array) -> Array:
    return k


def per_channel(quantize: Quantize) -> Callable[[Array], Array]:
    def read(x: Array) -> Array:
        return quantize(x.reshape(-1, BLOCK, *x.shape[1:]), 1).reshape(x.shape)

    return read


def per_token(quantize: Quantize) -> Callable[[Array], Array]:
    def read(x: Array) -> Array:
        groups = [quantize(x[..., a : a + GROUP], -1) for a in range(0, x.shape[-1], GROUP)]
        return np.concatenate(groups, axis=-1)

    return read


def sealed(formats: Mapping[str, Any], name: str) -> Callable[[Array], Array]:
    """As the engine does it."""

    def read(x: Array) -> Array:
        blocks = x.reshape(-1, BLOCK, *x.shape[1:])
        data = np.empty((len(blocks), formats[name].nbytes(*blocks.shape[1:])), np.uint8)
        formats[name].seal(blocks, data, Scratch())
        opened = np.empty_like(blocks)
        formats[name].open(data, opened, Scratch())
        return opened.reshape(x.shape)

    return read


class Quantized:
    """The golden ops, but for those that store and read keys and values."""

    def __init__(
        self,
        keys: Callable[[Array], Array] = exact,
        values: Callable[[Array], Array] = exact,
        *,
        sink: bool = True,
        own: bool = True,
    ) -> None:
        self._keys, self._values, self._sink, self._own = keys, values, sink, own

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def kv_write(self, cache: object, k: Array, v: Array, slots: object) -> tuple[Array, Array]:
        return k.copy(), v.copy()

    def attention(
        self,
        q: Array,
        cache: tuple[Array, Array],
        *step: object,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Array:
        k, v = cache
        tokens, heads, _ = q.shape
        full = tokens // BLOCK * BLOCK
        read_k = np.concatenate([self._keys(k[:full]), k[full:]])
        read_v = np.concatenate([self._values(v[:full]), v[full:]])
        p, j = np.arange(tokens)[:, None], np.arange(tokens)
        copied = (self._own & (j // BLOCK == p // BLOCK)) | (self._sink & (j < BLOCK))
        hidden = (j > p) | (False if window is None else j <= p - window)
        out = np.empty_like(q)
        for head in range(heads):
            g = head // (heads // k.shape[1])
            scores = np.where(copied, q[:, head] @ k[:, g].T, q[:, head] @ read_k[:, g].T) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[:, head] = (weights * copied) @ v[:, g] + (weights * ~copied) @ read_v[:, g]
        return out


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", nargs="?", default="smollm2")
    options = arguments.parse_args()
    checkpoint = loader.open(options.model)
    text = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
    ids = np.array(build_tokenizer(checkpoint.metadata).encode(text)[:1000], np.int32)
    model = build(checkpoint)
    weights = {role: tensor.decode() for role, tensor in model.weights.items()}
    expected = logits(model, weights, ids, Quantized())
    print(f"{options.model}, blocks of {BLOCK}: logits against exact keys and values\n")
    print(f"{'':44}{'KLD mean':>11}{'median':>11}{'99 %':>11}{'same top':>10}")
    for label, namespace in variants().items():
        q = compare(label, expected, logits(model, weights, ids, namespace), 0)
        print(
            f"{label:44}{q.mean:>11.2e}{q.median:>11.2e}{q.percentile_99:>11.2e}{q.same_top:>9.2%}",
            flush=True,
        )


def variants() -> dict[str, Quantized]:
    """What is measured."""
    found = {}
    for bits in (8, 4):
        name = f"int{bits}"
        keys, values = sealed(SEALED_KEYS, name), sealed(SEALED_VALUES, name)
        found |= {
            f"keys {name}, per token, around zero": Quantized(per_token(around_zero(bits))),
            f"keys {name}, per token, from the least": Quantized(per_token(from_the_least(bits))),
            f"keys {name}, per channel, around zero": Quantized(per_channel(around_zero(bits))),
            f"keys {name}, per channel, from the least": Quantized(per_channel(from_the_least(bits))),
            f"keys {name}, sealed": Quantized(keys),
            f"values {name}, per token, around zero": Quantized(exact, per_token(around_zero(bits))),
            f"values {name}, per token, from the least": Quantized(exact, per_token(from_the_least(bits))),
            f"values {name}, sealed": Quantized(exact, values),
            f"{name}, sealed": Quantized(keys, values),
            f"{name}, sealed, no first block": Quantized(keys, values, sink=False),
            f"{name}, sealed, no own block": Quantized(keys, values, own=False),
            f"{name}, sealed, neither": Quantized(keys, values, sink=False, own=False),
        }
    return found


def logits(model: Model, weights: Mapping[str, Array], ids: NDArray[np.int32], namespace: Quantized) -> Array:
    """Of the decoder over a namespace of ops, after each token."""
    none = (None,) * len(model.spec.kv_groups)
    positions = np.arange(len(ids), dtype=np.int32)
    step: StepInputs[Any] = StepInputs(ids, positions, None, None, positions, none, none)
    result: Array = forward(namespace, model.spec, weights, [None] * len(model.spec.layers), step)
    return result


def _half(x: Array) -> Array:
    return x.astype(np.float16).astype(x.dtype)


def _quotient(x: Array, d: Array) -> Array:
    return np.divide(x, d, out=np.zeros_like(x), where=d != 0)


if __name__ == "__main__":
    main()
