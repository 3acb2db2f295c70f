"""What intermediate values take: the planned arena beside other ways to hold them. Works from shapes alone.

    python benchmarks/activations.py [--policy float32]

For a prefill step of 512 tokens, of which the last one's logits are wanted, and for one of a single token
after 2,048 positions. Logits belong to the caller and are counted nowhere.

values       the arena without working memory of ops
arena        as the golden engine plans it: with working memory, decoding of a matrix tile among it
least        the most bytes that live at one instruction: no arena is smaller
run state    one buffer for each named intermediate, shared by all layers, as in llama2.c's ``RunState``:
             x, xb, xb2, q, k, v, hb, hb2
+ scores     the same with its ``att``: a score for every query, head and position of the context
all kept     every result of every op in memory of its own, views not counted
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from math import prod

from refengine.models import LayerSpec, ModelSpec, RopeSpec, forward
from refengine.models.model import expected_shapes
from refengine.program import (
    MemoryPlan,
    Program,
    SymbolicWeights,
    Tracer,
    concrete,
    golden_workspace,
    plan_memory,
    policy,
    symbolic_inputs,
)


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, size: int, words: int) -> ModelSpec:
    """A Llama; its frequencies do not matter here, only their number."""
    rope = RopeSpec(tuple(10000.0 ** (-2 * i / size) for i in range(size // 2)), "interleaved")
    layer = LayerSpec(heads, kv_heads, size, ffn, rope, size**-0.5)
    return ModelSpec("llama", words, hidden, 2048, (layer,) * layers, 1e-5, "silu", tied_embeddings=True)


def gemma3(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, size: int, words: int) -> ModelSpec:
    """A Gemma 3: five layers of six see 512 positions."""
    spec = llama(layers, hidden, ffn, heads, kv_heads, size, words)
    far = spec.layers[0]
    near = replace(far, window=512, rope=replace(far.rope, magnitude=1.0, pairing="halves"))
    mixed = tuple(far if i % 6 == 5 else near for i in range(layers))
    return replace(
        spec, architecture="gemma3", layers=mixed, activation="gelu_tanh", embedding_scale=hidden**0.5
    )


MODELS = {
    "SmolLM2 135M": llama(30, 576, 1536, 9, 3, 64, 49152),
    "Gemma 3 270M": gemma3(18, 640, 2048, 4, 1, 256, 262144),
    "Llama 2 7B": llama(32, 4096, 11008, 32, 32, 128, 32000),
}


@dataclass(frozen=True)
class Row:
    """Bytes of each way."""

    values: int
    arena: int
    least: int
    run_state: int
    with_scores: int
    kept: int


def traced(spec: ModelSpec) -> Program:
    """The decoder of a spec, over symbols."""
    tracer = Tracer()
    absent = ("_bias",) if spec.architecture == "gemma3" else ("_bias", "q_norm", "k_norm", "post_")
    shapes = expected_shapes(spec)
    present = {role: shape for role, shape in shapes.items() if not any(part in role for part in absent)}
    weights = SymbolicWeights(tracer, present)
    caches = [
        tracer.symbol(f"layers.{i}.cache", "state", ("B", "P", layer.kv_heads, layer.head_size))
        for i, layer in enumerate(spec.layers)
    ]
    return tracer.finish(forward(tracer, spec, weights, caches, symbolic_inputs(tracer, len(spec.kv_groups))))


def measure(spec: ModelSpec, name: str, tokens: int, context: int) -> Row:
    """Count every way for steps of so many tokens."""
    chosen, program = policy(name), traced(spec)
    sizes = {"T": tokens, "S": 1, "R": 1}
    itemsize = chosen.activations.itemsize
    arena = plan_memory(program, chosen, sizes, lambda i, s: golden_workspace(i, s, chosen))
    layer = spec.layers[0]
    queries, keys = layer.heads * layer.head_size, layer.kv_heads * layer.head_size
    per_token = spec.hidden_size + max(spec.hidden_size, queries) + spec.hidden_size  # x, xb, xb2
    per_token += queries + 2 * keys + 2 * layer.ffn_size  # q, k, v, hb, hb2
    run_state = tokens * per_token * itemsize
    return Row(
        plan_memory(program, chosen, sizes).arena_bytes,
        arena.arena_bytes,
        arena.least_bytes,
        run_state,
        run_state + tokens * layer.heads * context * itemsize,
        _kept(program, arena),
    )


def _kept(program: Program, plan: MemoryPlan) -> int:
    made = [i for i in program if i.op.sharing not in ("view", "state") and i.result is not program.output]
    return sum(prod(concrete(i.result.shape, plan.sizes)) for i in made) * plan.dtype.itemsize


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policy", default="float32")
    arguments = parser.parse_args()
    ways = ("values", "arena", "least", "run state", "+ scores", "all kept")
    print(f"| MB, {arguments.policy} |", " | ".join(ways), "| arena less than run state | than all kept |")
    print("|---|" + "--:|" * (len(ways) + 2))
    for model, spec in MODELS.items():
        for tokens, context in ((512, 512), (1, 2048)):
            row = measure(spec, arguments.policy, tokens, context)
            figures = (row.values, row.arena, row.least, row.run_state, row.with_scores, row.kept)
            cells = " | ".join(f"{figure / 1e6:,.3f}" for figure in figures)
            saved = " | ".join(f"{1 - row.arena / other:.0%}" for other in (row.run_state, row.kept))
            print(f"| {model}, T = {tokens} | {cells} | {saved} |")


if __name__ == "__main__":
    main()
