"""A Model: a ModelSpec and its weights under canonical role names, nothing decoded yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from refengine.errors import FormatError, UnsupportedError
from refengine.loader.checkpoint import Checkpoint
from refengine.models.decoder import forward
from refengine.models.families import build_spec, family_of
from refengine.models.spec import LayerSpec, ModelSpec
from refengine.program import (
    Policy,
    Program,
    SymbolicWeights,
    Tracer,
    Value,
    apply_policy,
    symbolic_inputs,
)
from refengine.quantizer import LazyTensor

MODEL_WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "token_embedding",
        "output_norm.weight": "output_norm",
        "output.weight": "output",
    }
)
"""GGUF names of the tensors outside the layers, and their roles."""

LAYER_WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm.weight": "attention_norm",
        "attn_q.weight": "q",
        "attn_q.bias": "q_bias",
        "attn_k.weight": "k",
        "attn_k.bias": "k_bias",
        "attn_v.weight": "v",
        "attn_v.bias": "v_bias",
        "attn_q_norm.weight": "q_norm",
        "attn_k_norm.weight": "k_norm",
        "attn_output.weight": "attention_output",
        "attn_output.bias": "attention_output_bias",
        "post_attention_norm.weight": "post_attention_norm",
        "ffn_norm.weight": "ffn_norm",
        "ffn_gate.weight": "gate",
        "ffn_gate.bias": "gate_bias",
        "ffn_up.weight": "up",
        "ffn_up.bias": "up_bias",
        "ffn_down.weight": "down",
        "ffn_down.bias": "down_bias",
        "post_ffw_norm.weight": "post_ffn_norm",
    }
)
"""GGUF names of a layer's tensors (after ``blk.N.``), and their roles (after ``layers.N.``)."""

OPTIONAL = frozenset(
    {role for role in LAYER_WEIGHTS.values() if role.endswith("_bias")}
    | {"q_norm", "k_norm", "post_attention_norm", "post_ffn_norm"}
)
"""Layer roles that only some families have; a family's entry says which it must have."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which Llama 3.1 and later divide RoPE frequencies; it becomes part of the spec."""


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder with its weights, still in their stored encodings.

    Attributes:
        spec: its shape.
        weights: by role: ``token_embedding``, ``layers.3.q``, ``output_norm`` …
    """

    spec: ModelSpec
    weights: Mapping[str, LazyTensor]

    @cached_property
    def program(self) -> Program:
        """The decoder, traced: T tokens, S sequences, R rows of logits."""
        return trace(self)

    @cached_property
    def sealed_program(self) -> Program:
        """The same for a sealed KV cache: a pool of sealed blocks and one of exact copies per group."""
        return trace(self, sealed=True)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(tensor.size for tensor in self.weights.values())

    def trace(self, *, sealed: bool) -> Program:
        """One of the two."""
        return self.sealed_program if sealed else self.program

    def program_for(self, chosen: Policy, *, sealed: bool = False) -> Program:
        """One of the two in a precision policy: what an engine compiles."""
        encodings = {role: tensor.encoding for role, tensor in self.weights.items()}
        return apply_policy(self.trace(sealed=sealed), chosen, encodings)


def trace(model: Model, tracer: Tracer | None = None, *, sealed: bool = False) -> Program:
    """Record the decoder of a model.

    Args:
        model: the model.
        tracer: what records.
        sealed: whether the KV cache is sealed: it has twice as many pools then, those of exact copies last.

    Clauses: SKV-13.
    """
    tracer = tracer or Tracer()
    spec = model.spec
    weights = SymbolicWeights(tracer, {name: tensor.shape for name, tensor in model.weights.items()})

    def state(name: str, i: int) -> Value:
        layer = spec.layers[i]
        return tracer.symbol(f"layers.{i}.{name}", "state", ("B", "P", layer.kv_heads, layer.head_size))

    caches: list[Any] = [
        (state("cache", i), state("exact", i)) if sealed else state("cache", i)
        for i in range(len(spec.layers))
    ]
    inputs = symbolic_inputs(tracer, len(spec.kv_groups) * (2 if sealed else 1))
    return tracer.finish(forward(tracer, spec, weights, caches, inputs))


def build(checkpoint: Checkpoint) -> Model:
    """Make a Model of a checkpoint: names become roles, every tensor is accounted for, every shape checked.

    Raises:
        UnsupportedError: the architecture, a hyper-parameter or a tensor is not one refengine implements.
        FormatError: a tensor is missing or of the wrong shape, or a hyper-parameter is wrong.

    Clauses: CKP-12.
    """
    tensors = dict(checkpoint.tensors)
    architecture = checkpoint.metadata.string("general.architecture")
    family = family_of(architecture)
    factors = tensors.pop(ROPE_FACTORS, None)
    weights = {_role(name, architecture): tensor for name, tensor in tensors.items()}
    if "token_embedding" not in weights:
        raise FormatError("the tensor token_embd.weight is missing", path=checkpoint.path)
    spec = build_spec(
        checkpoint.metadata,
        vocabulary_size=weights["token_embedding"].shape[0],
        tied_embeddings="output" not in weights,
        rope_factors=None if factors is None else factors.decode(),
    )
    expected = expected_shapes(spec)
    required = {name for name in expected if name.rpartition(".")[2] not in OPTIONAL - family.layer_weights}
    for name in sorted(required - weights.keys()):
        raise FormatError(f"the tensor for {name} is missing", path=checkpoint.path)
    for name, tensor in weights.items():
        if name not in expected:
            raise UnsupportedError(
                f"tensor {tensor.name} is in a layer beyond the model's {len(spec.layers)}"
            )
        if tensor.shape != expected[name]:
            raise FormatError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, "
                f"but the hyper-parameters ask for {list(expected[name])}",
                path=checkpoint.path,
            )
    return Model(spec, MappingProxyType(weights))


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape every weight of a model must have, required or optional, by role."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding": (spec.vocabulary_size, spec.hidden_size),
        "output_norm": (spec.hidden_size,),
    }
    if not spec.tied_embeddings:
        shapes["output"] = (spec.vocabulary_size, spec.hidden_size)
    for i, layer in enumerate(spec.layers):
        shapes |= {
            f"layers.{i}.{role}": shape for role, shape in _layer_shapes(spec.hidden_size, layer).items()
        }
    return shapes


def _layer_shapes(hidden: int, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    query, shared, size, ffn = (
        layer.heads * layer.head_size,
        layer.kv_heads * layer.head_size,
        layer.head_size,
        layer.ffn_size,
    )
    matrices = {
        "q": (query, hidden),
        "k": (shared, hidden),
        "v": (shared, hidden),
        "attention_output": (hidden, query),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    norms = ("attention_norm", "post_attention_norm", "ffn_norm", "post_ffn_norm")
    return {
        **matrices,
        **{f"{name}_bias": shape[:1] for name, shape in matrices.items()},
        **dict.fromkeys(norms, (hidden,)),
        "q_norm": (size,),
        "k_norm": (size,),
    }


def _role(name: str, architecture: str) -> str:
    if name in MODEL_WEIGHTS:
        return MODEL_WEIGHTS[name]
    if (found := re.fullmatch(r"blk\.(\d{1,4})\.(.+)", name)) and found[2] in LAYER_WEIGHTS:
        return f"layers.{int(found[1])}.{LAYER_WEIGHTS[found[2]]}"
    raise UnsupportedError(
        f"tensor {name!r} is not one that refengine knows in the architecture {architecture!r}; "
        "running the model without it would give other results"
    )
