"""The traced Program: the decoder as data, which computes what the eager decoder computes."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine import ops
from refengine.backend import load
from refengine.memory import KVGroupLayout, KVLayout
from refengine.models import Model, forward
from refengine.ops import LayerCache, ShapeError
from refengine.program import (
    MemoryPlan,
    Program,
    StepBatch,
    SymbolicWeights,
    Tracer,
    golden_workspace,
    plan_memory,
    policy,
    symbolic_inputs,
)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


def batch_of(model: Model, lengths: list[int], block_size: int) -> StepBatch:
    """A step that computes whole prompts of these lengths, blocks in order."""
    starts = np.cumsum([0, *lengths])
    needed = [-(-n // block_size) for n in lengths]
    tables = np.full((len(lengths), max(needed)), -1, np.int32)
    for s, blocks in enumerate(needed):
        tables[s, :blocks] = np.arange(blocks) + sum(needed[:s])
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    slots = np.concatenate([tables[s, np.arange(n) // block_size] * block_size + np.arange(n) % block_size
                            for s, n in enumerate(lengths)]).astype(np.int32)  # fmt: skip
    groups = len(model.spec.kv_groups)
    return StepBatch(
        token_ids=np.random.default_rng(0)
        .integers(0, model.spec.vocabulary_size, starts[-1])
        .astype(np.int32),
        positions=positions,
        query_starts=starts.astype(np.int32),
        context_lens=np.array(lengths, np.int32),
        logit_rows=np.arange(starts[-1], dtype=np.int32),
        slot_mapping=(slots,) * groups,
        block_tables=(tables,) * groups,
    )


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [[1], [13], [5, 1, 9]])
def test_eager_and_traced_give_the_same_bits(model: Model, name: str, lengths: list[int]) -> None:
    """Running the decoder on arrays, and interpreting its trace in a planned arena, is the same computation."""
    chosen, block_size, blocks = policy(name), 4, 8
    batch = batch_of(model, lengths, block_size)
    layers = model.spec.layers
    shapes = [(blocks, block_size, layer.kv_heads, layer.head_size) for layer in layers]

    weights = {role: tensor.decode().astype(chosen.activations) for role, tensor in model.weights.items()}
    caches = [LayerCache(np.zeros(s, chosen.kv), np.zeros(s, chosen.kv)) for s in shapes]
    eager = forward(ops, model.spec, weights, caches, batch)

    backend = load("numpy")
    layout = KVLayout(block_size, chosen.kv, tuple(
        KVGroupLayout(g.window, tuple((i, layers[i].kv_heads, layers[i].head_size) for i in g.layers), blocks)
        for g in model.spec.kv_groups
    ))  # fmt: skip
    sizes = {"T": sum(lengths) + 3, "S": 4, "R": sum(lengths) + 3}
    plan = plan_memory(model.program, chosen, sizes)
    executable = backend.compile(
        model.program,
        chosen,
        plan,
        backend.upload(model.weights, chosen),
        layout,
        backend.create_cache(layout),
    )
    traced = executable.run(batch)
    assert traced.dtype == eager.dtype == chosen.activations
    assert np.array_equal(traced, eager)
    assert np.array_equal(executable.run(batch), eager), "a second run differs"


def planned(program: Program, sizes: dict[str, int]) -> MemoryPlan:
    """The plan with the golden ops' working memory."""
    chosen = policy("float32")
    return plan_memory(program, chosen, sizes, lambda i, s: golden_workspace(i, s, chosen))


def test_the_plan_never_lays_two_living_values_over_each_other(model: Model) -> None:
    """Recounted from scratch: at every instruction, the places of all living values are apart, and apart from
    the instruction's working memory."""
    program = model.program
    plan = planned(program, {"T": 7, "S": 2, "R": 7})
    last_use: dict[int, int] = {}
    for at, instruction in enumerate(program):
        for operand in instruction.operands:
            if operand is not None:
                last_use[operand.index] = at
    for at, instruction in enumerate(program):
        living = [
            value
            for earlier in program.instructions[: at + 1]
            if (value := earlier.result).index in plan.placements and last_use.get(value.index, -1) >= at
        ]
        if instruction.result.index in plan.placements:
            living.append(instruction.result)
        working = plan.workspaces.get(at)
        assert (working is None) == (instruction.op.workspace is None)
        for i, a in enumerate(living):
            if working is not None:
                place = plan.placements[a.index]
                before = place.offset + place.nbytes <= working.offset
                assert before or working.offset + working.nbytes <= place.offset, f"{a} at {at}"
            for b in living[:i]:
                pa, pb = plan.placements[a.index], plan.placements[b.index]
                apart = pa.offset + pa.nbytes <= pb.offset or pb.offset + pb.nbytes <= pa.offset
                assert apart or pa.offset == pb.offset, f"{a} over {b} at {at}"
                if (
                    not apart
                ):  # one memory: only a view or an operand overwritten by its last reader may share
                    assert _shares(program, a.index, b.index), f"{a} over {b} at {at}: {instruction}"
    places = [*plan.placements.values(), *plan.workspaces.values()]
    assert plan.arena_bytes == max(p.offset + p.nbytes for p in places)


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_the_arena_is_as_small_as_any_can_be(model: Model, tokens: int) -> None:
    """No larger than what lives at one instruction, working memory included."""
    plan = planned(model.program, {"T": tokens, "S": 1, "R": 1})
    assert plan.arena_bytes == plan.least_bytes


def test_the_least_bytes_are_those_of_the_fullest_moment() -> None:
    """A value of 64 bytes and one of 128 live at once, and a third later, alone."""
    tracer = Tracer()
    table = tracer.symbol("table", "weight", (9, 16))
    x = tracer.embedding(tracer.symbol("token_ids", "input", ("T",)), table)
    y = tracer.linear(x, tracer.symbol("w", "weight", (32, 16)))
    program = tracer.finish(tracer.scale(tracer.linear(y, tracer.symbol("v", "weight", (8, 32))), factor=2.0))
    assert plan_memory(program, policy("float32"), {"T": 1}).least_bytes == 64 + 128


def _shares(program: object, a: int, b: int) -> bool:
    """Whether one value is made of the other's memory, through views and overwriting."""
    first_operand = {
        i.result.index: i.operands[0].index
        for i in program  # type: ignore[attr-defined]
        if i.op.sharing in ("view", "in_place") and i.operands[0] is not None
    }

    def chain(value: int) -> set[int]:
        found = {value}
        while value in first_operand:
            value = first_operand[value]
            found.add(value)
        return found

    return b in chain(a) or a in chain(b)


def test_all_layers_share_one_layers_space() -> None:
    """Four layers need the arena of two."""
    arenas = {
        plan_memory(
            tiny_model("llama", layers=n).program, policy("float32"), {"T": 64, "S": 1, "R": 1}
        ).arena_bytes
        for n in (2, 4)
    }
    assert len(arenas) == 1


def test_a_program_reads_as_text(model: Model) -> None:
    """Its text names ops, operands with shapes, and the output."""
    text = str(model.program)
    assert "= rms_norm(%" in text
    assert "layers.0.q[" in text
    assert text.endswith(f"return {model.program.output}")
    assert sum(model.program.op_counts.values()) == len(model.program)


def test_tracing_refuses_weights_that_do_not_fit(model: Model) -> None:
    """A wrong shape is an error while tracing, not while computing."""
    tracer = Tracer()
    shapes = {role: tensor.shape for role, tensor in model.weights.items()} | {"layers.0.down": (8, 8)}
    caches = [
        tracer.symbol(f"layers.{i}.cache", "state", ("B", "P", layer.kv_heads, layer.head_size))
        for i, layer in enumerate(model.spec.layers)
    ]
    inputs = symbolic_inputs(tracer, len(model.spec.kv_groups))
    with pytest.raises(ShapeError, match="linear"):
        forward(tracer, model.spec, SymbolicWeights(tracer, shapes), caches, inputs)
