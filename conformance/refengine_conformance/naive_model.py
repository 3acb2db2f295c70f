"""A decoder's forward pass, straight from the papers: float64, one whole sequence, no cache and no tricks.

Nothing here is shared with the engine but the description of the model (``ModelSpec``) and its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refengine.models import LayerSpec, Model, RopeSpec
from refengine.ops import Activation
from refengine_conformance.naive_sealing import open_block
from refengine_conformance.subject import KVPart

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


@dataclass(frozen=True)
class Sealing:
    """A sealed cache.

    Attributes:
        formats: names of those of keys and of values.
        block_size: positions per block.
    """

    formats: tuple[str, str]
    block_size: int

    def read(self, part: KVPart, x: Array) -> Array:
        """What the query at ``p`` reads of ``j``: ``[p, j, G, D]``, of keys or values ``[j, G, D]``."""
        name = self.formats[0] if part == "keys" else self.formats[1]
        sealed = x.copy()
        for start in range(0, len(x) - self.block_size + 1, self.block_size):
            block = slice(start, start + self.block_size)
            sealed[block] = open_block(part, name, x[block])
        blocks = np.arange(len(x)) // self.block_size
        exact = (blocks == 0) | (blocks == blocks[:, None])
        return np.where(exact[:, :, None, None], x, sealed)


def naive_logits(model: Model, token_ids: Sequence[int], sealing: Sealing | None = None) -> Array:
    """Logits ``[T, V]`` after each token of a sequence."""
    spec = model.spec
    weights: Weights = {role: tensor.decode().astype(np.float64) for role, tensor in model.weights.items()}
    x = weights["token_embedding"][list(token_ids)] * spec.embedding_scale
    for i, layer in enumerate(spec.layers):
        prefix = f"layers.{i}."
        w = {role.removeprefix(prefix): a for role, a in weights.items() if role.startswith(prefix)}
        h = _norm(x, w["attention_norm"], spec.norm_epsilon)
        h = _attend(layer, w, h, spec.norm_epsilon, sealing)
        x = x + (_norm(h, w["post_attention_norm"], spec.norm_epsilon) if "post_attention_norm" in w else h)
        h = _norm(x, w["ffn_norm"], spec.norm_epsilon)
        h = _linear(w, "down", _activate(spec.activation, _linear(w, "gate", h)) * _linear(w, "up", h))
        x = x + (_norm(h, w["post_ffn_norm"], spec.norm_epsilon) if "post_ffn_norm" in w else h)
    x = _norm(x, weights["output_norm"], spec.norm_epsilon)
    logits = np.einsum("te,ve->tv", x, weights["token_embedding" if spec.tied_embeddings else "output"])
    return logits if spec.logit_softcap is None else _cap(logits, spec.logit_softcap)


def _attend(layer: LayerSpec, w: Weights, x: Array, eps: float, sealing: Sealing | None) -> Array:
    """Every query against every key, hidden ones struck out."""
    tokens, size = len(x), layer.head_size
    q = _linear(w, "q", x).reshape(tokens, layer.heads, size)
    k, v = (_linear(w, name, x).reshape(tokens, layer.kv_heads, size) for name in ("k", "v"))
    if "q_norm" in w:
        q, k = _norm(q, w["q_norm"], eps), _norm(k, w["k_norm"], eps)
    q, k = _rotate(q, layer.rope), _rotate(k, layer.rope)
    if sealing is None:
        k, v = (np.broadcast_to(a, (tokens, *a.shape)) for a in (k, v))
    else:
        k, v = sealing.read("keys", k), sealing.read("values", v)
    k, v = (np.repeat(a, layer.heads // layer.kv_heads, axis=2) for a in (k, v))
    scores = np.einsum("phd,pjhd->hpj", q, k) * layer.attention_scale
    if layer.attention_softcap is not None:
        scores = _cap(scores, layer.attention_softcap)
    for p in range(tokens):
        for j in range(tokens):
            if j > p or (layer.window is not None and j <= p - layer.window):
                scores[:, p, j] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    attended = np.einsum("hpj,pjhd->phd", weights, v).reshape(tokens, -1)
    return _linear(w, "attention_output", attended)


def _linear(w: Weights, name: str, x: Array) -> Array:
    y: Array = np.einsum("tk,nk->tn", x, w[name]) + w.get(f"{name}_bias", 0.0)
    return y


def _norm(x: Array, weight: Array, eps: float) -> Array:
    y: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight
    return y


def _cap(x: Array, cap: float) -> Array:
    y: Array = cap * np.tanh(x / cap)
    return y


def _rotate(x: Array, rope: RopeSpec) -> Array:
    """Pair ``i`` as a complex number, turned by ``position · frequency``."""
    pairs = len(rope.frequencies)
    first, step = (2, 1) if rope.pairing == "interleaved" else (1, pairs)
    y = x.copy()
    for position in range(len(x)):
        for i, frequency in enumerate(rope.frequencies):
            a, b = i * first, i * first + step
            turn = rope.magnitude * np.exp(1j * position * frequency)
            z = (x[position, :, a] + 1j * x[position, :, b]) * turn
            y[position, :, a], y[position, :, b] = z.real, z.imag
    return y


def _activate(kind: Activation, g: Array) -> Array:
    y: Array = (
        g / (1 + np.exp(-g))
        if kind == "silu"
        else g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    )
    return y
