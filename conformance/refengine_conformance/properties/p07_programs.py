"""Chapter *Programs*."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine import ops
from refengine.backend import Executable
from refengine.memory import KVGroupLayout, KVLayout
from refengine.models import Model, forward
from refengine.models.families import FAMILIES
from refengine.ops import OPS, Dim, FloatArray, LayerCache, Shape, ShapeError
from refengine.ops.signature import Operand
from refengine.program import (
    Fusion,
    Instruction,
    MemoryPlan,
    Placement,
    Program,
    StepBatch,
    Tracer,
    Value,
    concrete,
    golden_workspace,
    input_arrays,
    symbolic_inputs,
)
from refengine.quantizer import LazyTensor
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject, Weight, activation, one_sequence
from refengine_conformance.tiny_model import tiny_model

MODELS = st.builds(tiny_model, st.sampled_from(sorted(FAMILIES)), layers=st.integers(1, 4))
SYMBOLS = {"T", "S", "S1", "R", "M", "B", "P"}
WIDTH, HEADS = 6, 2


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """A program of small integers, and what it computes: every result is exact in any order.

    Attributes:
        program: its output is ``[R, WIDTH]``.
        weights: its weights.
        expected: the result for all rows, ``[tokens, WIDTH]``.
    """

    program: Program
    weights: dict[str, LazyTensor]
    expected: NDArray[np.int64]


@st.composite
def arithmetic(draw: st.DrawFn, subject: Subject) -> Arithmetic:
    """Sums, doublings, changes of sign, permutations and views of earlier values, read again at will."""
    tokens, steps = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tracer = subject.tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    numbers = rng.integers(-9, 10, (tokens, WIDTH))
    weights = {"numbers": Weight(numbers).tensor("numbers")}
    known: list[tuple[Value, NDArray[np.int64]]] = [
        (activation(tracer, inputs, "numbers", numbers.shape), numbers)
    ]
    for number in range(steps):
        x, exact = draw(st.sampled_from(known[-3:]))
        kind = draw(st.sampled_from(["add", "scale", "view", "linear"]))
        if kind == "view":
            flat = exact.ndim == 2
            value = tracer.split_heads(x, heads=HEADS) if flat else tracer.merge_heads(x)
            known.append((value, exact.reshape((tokens, HEADS, -1) if flat else (tokens, -1))))
        elif kind == "scale":
            factor = draw(st.sampled_from([-1, 2]))
            known.append((tracer.scale(x, factor=float(factor)), exact * factor))
        elif kind == "linear" and exact.ndim == 2:
            role, matrix = f"matrix{number}", np.eye(WIDTH, dtype=np.int64)[rng.permutation(WIDTH)]
            weights[role] = Weight(matrix).tensor(role)
            known.append((tracer.linear(x, tracer.symbol(role, "weight", matrix.shape)), exact @ matrix.T))
        else:
            y, other = draw(st.sampled_from([(v, e) for v, e in known if e.shape == exact.shape]))
            known.append((tracer.add(x, y), exact + other))
    total, sum_ = next((v, e) for v, e in known if e.ndim == 2)
    for value, exact in draw(st.permutations(known[1:])):
        flat_value = value if exact.ndim == 2 else tracer.merge_heads(value)
        total, sum_ = tracer.add(total, flat_value), sum_ + exact.reshape(tokens, -1)
    output = tracer.scale(tracer.take_rows(total, inputs.logit_rows), factor=2.0)
    return Arithmetic(tracer.finish(output), weights, 2 * sum_)


@holds("PRG-1", "decoder")
def every_value_is_defined_once_and_before_it_is_read(subject: Subject, data: st.DataObject) -> None:
    """Reading the instructions in order, no name is met twice, and none before it is defined."""
    program = subject.trace(data.draw(MODELS))
    leaves = {leaf.index for leaf in program.leaves}
    assert all(leaf.kind in ("input", "weight", "state") for leaf in program.leaves)
    defined: set[int] = set()
    for instruction in program:
        for operand in instruction.operands:
            assert operand is None or operand.index in defined | leaves, f"{operand} in {instruction}"
        result = instruction.result
        assert result.kind == "result"
        assert result.index not in defined | leaves, f"{result} is defined twice"
        defined.add(result.index)
    assert program.output.index in defined


@holds("PRG-2", "decoder")
def inferred_shapes_are_those_of_the_arrays(subject: Subject, data: st.DataObject) -> None:
    """Whatever the sizes, an op gives an array of the shape that was inferred without any."""
    prompts = _prompts(data, data.draw(MODELS))
    program, batch = subject.trace(prompts.model), prompts.batch(prompts.whole)
    batch = replace(batch, logit_rows=batch.logit_rows[: data.draw(st.integers(0, prompts.tokens))])
    sizes = {"T": len(batch.token_ids), "S": len(batch.context_lens), "R": len(batch.logit_rows)}
    sizes |= {"S1": sizes["S"] + 1, "B": prompts.num_blocks, "P": prompts.block_size}
    for instruction, array in _interpret(subject, prompts, program, batch):
        shape = instruction.result.shape
        assert all(isinstance(dim, int) or dim in SYMBOLS for dim in shape), shape
        if instruction.op.sharing != "state":
            assert array.shape == concrete(shape, sizes), f"{instruction}, but the array is {array.shape}"


@holds("PRG-3", "decoder")
def operands_that_do_not_fit_are_refused(subject: Subject, data: st.DataObject) -> None:
    """A signature's operands are accepted; one axis, size or operand more, less or other is not."""
    op = data.draw(st.sampled_from(sorted(OPS)))
    operands = OPS[op].signature.operands
    dims_of_all = (dim for operand in operands for dim in operand.dims if dim != "...")
    words = {word for dim in dims_of_all for word in re.split(r"[*/]", dim) if not word.isdigit()}
    symbolic = data.draw(st.sets(st.sampled_from(["T", "S", "S1", "R", "M", "B", "P"])))
    sizes = {word: word if word in symbolic else 32 * (3 + n) for n, word in enumerate(sorted(words))}
    fitting = [_shape(operand, sizes) for operand in operands]
    attributes = {"rope_table": {"dims": 8}, "split_heads": {"heads": 2}}.get(op, {})
    tracer = subject.tracer()
    assert isinstance(_record(tracer, op, fitting, attributes), Value)

    broken = list(fitting)
    at = data.draw(st.integers(0, len(operands) - 1))
    dims, shape = operands[at].dims, fitting[at]
    shared = [n for n, dim in enumerate(dims) if dim != "..." and sum(dim in o.dims for o in operands) > 1]
    how = data.draw(st.sampled_from(["axes", "surplus", "missing", *(["size"] if shared else [])]))
    if how == "axes":
        broken[at] = () if "..." in dims else (*shape, 3)
    elif how == "surplus":
        broken.append((3,))
    elif how == "missing":
        broken = fitting[: max(n for n, operand in enumerate(operands) if not operand.optional)]
    else:
        axis = data.draw(st.sampled_from(shared))
        broken[at] = (*shape[:axis], 5, *shape[axis + 1 :])
    try:
        _record(tracer, op, broken, attributes)
    except ShapeError as error:
        assert op in str(error)
    else:
        raise AssertionError(f"{op}{broken} was accepted: {OPS[op].signature.text}")


@holds("PRG-4", "backend", "memory_plan")
def a_value_keeps_its_numbers_until_it_is_last_read(subject: Subject, data: st.DataObject) -> None:
    """Exact arithmetic in which values and views of them are read again: none is overwritten before."""
    case = data.draw(arithmetic(subject))
    tokens = len(case.expected)
    result = subject.compile(case.program, case.weights, tokens).run(one_sequence(tokens))
    assert np.array_equal(result, case.expected), str(case.program)


@holds("PRG-5", "backend")
def instructions_on_one_state_happen_in_their_order(subject: Subject, data: st.DataObject) -> None:
    """A token alone attends to its own value: the one written last before, of two in the same slot."""
    tokens = data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    numbers = {name: rng.integers(-9, 10, (tokens, WIDTH)) for name in ("first", "second")}
    tracer = subject.tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    cache = tracer.symbol("layers.0.cache", "state", ("B", "P", HEADS, WIDTH // HEADS))
    seen = []
    for name in numbers:
        x = activation(tracer, inputs, name, (tokens, HEADS, WIDTH // HEADS))
        cache = tracer.kv_write(cache, x, x, inputs.slot_mapping[0])
        starts, ends = inputs.query_starts, inputs.context_lens
        seen.append(tracer.attention(x, cache, inputs.block_tables[0], starts, ends, scale=0.5))
    total = tracer.add(tracer.scale(tracer.merge_heads(seen[0]), factor=32.0), tracer.merge_heads(seen[1]))
    program = tracer.finish(tracer.take_rows(total, inputs.logit_rows))

    ascending = np.arange(tokens, dtype=np.int32)
    batch = replace(
        one_sequence(tokens),
        positions=np.zeros(tokens, np.int32),
        query_starts=np.arange(tokens + 1, dtype=np.int32),
        context_lens=np.ones(tokens, np.int32),
        slot_mapping=(ascending,),
        block_tables=(ascending[:, None],),
    )
    layout = KVLayout(1, subject.policy.kv, (KVGroupLayout(None, ((0, HEADS, WIDTH // HEADS),), tokens),))
    weights = {name: Weight(array).tensor(name) for name, array in numbers.items()}
    result = subject.compile(program, weights, tokens, layout).run(batch)
    assert np.array_equal(result, 32 * numbers["first"] + numbers["second"])


@holds("PRG-6", "decoder", tier="models")
def the_record_computes_what_the_decoder_computes(subject: Subject, data: st.DataObject) -> None:
    """The decoder run on arrays, and its record replayed with the same ops, agree in every bit."""
    prompts = _prompts(data, data.draw(MODELS))
    batch = prompts.batch(prompts.whole)
    *_, (_, replayed) = _interpret(subject, prompts, subject.trace(prompts.model), batch)
    weights, caches = _arrays(subject, prompts)
    eager = forward(ops, prompts.model.spec, weights, caches, batch)
    assert replayed.dtype == eager.dtype
    assert replayed.tobytes() == eager.tobytes()


@holds("PRG-7", "memory_plan", level="M")
def living_values_lie_apart(subject: Subject, data: st.DataObject) -> None:
    """Replayed with marks instead of numbers: what is read bears the mark of the value that is meant."""
    program, plan, sizes = _planned(subject, data)
    marks = np.full(plan.arena_bytes, -1)
    meaning: dict[int, int] = {}
    for instruction in program:
        op, result = instruction.op, instruction.result
        operands = [v for v in instruction.operands if v is not None and v.index in plan.placements]
        for operand in operands:
            assert (_cells(marks, plan, operand, sizes) == meaning[operand.index]).all(), (
                f"{operand} is overwritten before {instruction}"
            )
        if op.sharing == "state" or result.index not in plan.placements:
            continue
        place, first = _range(plan, result, sizes), instruction.operands[0]
        for operand in operands:
            other = _range(plan, operand, sizes)
            apart = place.stop <= other.start or other.stop <= place.start
            is_first = first is not None and meaning[operand.index] == meaning.get(
                first.index
            )  # or a view of it
            may_share = is_first and op.sharing in ("view", "in_place") and place == other
            assert apart or may_share, f"{result} lies on {operand} in {instruction}"
        if op.sharing == "view" and first is not None and first.index in plan.placements:
            assert place == _range(plan, first, sizes), f"{instruction} is a view, elsewhere"
            meaning[result.index] = meaning[first.index]
        else:
            meaning[result.index] = result.index
            marks[place] = result.index


@holds("PRG-8", "memory_plan", level="M")
def places_are_aligned_and_large_enough(subject: Subject, data: st.DataObject) -> None:
    """Offsets are multiples of 64, and a value's bytes fit."""
    program, plan, sizes = _planned(subject, data)
    values = {i.result.index: i.result for i in program}
    for index, place in plan.placements.items():
        assert place.offset % 64 == 0, f"{values[index]} lies at {place.offset}"
        needed = int(np.prod(concrete(values[index].shape, sizes))) * subject.policy.activations.itemsize
        assert place.nbytes >= needed, f"{values[index]} has {place.nbytes} bytes and needs {needed}"


@holds("PRG-14", "memory_plan", level="M")
def working_memory_lies_apart_from_all_that_lives(subject: Subject, data: st.DataObject) -> None:
    """Recounted: what an instruction needs has no byte in common with a value that is still to be read."""
    program, plan, sizes = _planned(subject, data)
    told = {at: golden_workspace(i, sizes, subject.policy) for at, i in enumerate(program)}
    assert plan.workspaces.keys() == {at for at, nbytes in told.items() if nbytes}
    memory = {i.result.index: i.result.index for i in program}  # whose memory a value's numbers lie in
    for i in program:
        if i.op.sharing == "view" and i.operands[0] is not None:
            memory[i.result.index] = memory.get(i.operands[0].index, -1)
    read_last: dict[int, int] = {}
    for at, i in enumerate(program):
        read_last |= {memory[v.index]: at for v in i.operands if v is not None and v.index in memory}
    defined: set[int] = set()
    for at, i in enumerate(program):
        defined.add(i.result.index)
        if (working := plan.workspaces.get(at)) is None:
            continue
        assert working.offset % 64 == 0
        assert working.nbytes >= told[at], f"{i} has {working.nbytes} bytes and needs {told[at]}"
        for index in defined & plan.placements.keys():
            if index == i.result.index or read_last.get(memory[index], -1) >= at:
                place = plan.placements[index]
                apart = (
                    place.offset + place.nbytes <= working.offset
                    or working.offset + working.nbytes <= place.offset
                )
                assert apart, f"the working memory of {i} lies on %{index}"


@holds("PRG-16", "memory_plan", level="M")
def what_runs_as_one_keeps_what_it_reads(subject: Subject, data: st.DataObject) -> None:
    """Any stretches of a program, as one each: where all that is read lies, and all that is given."""
    if data.draw(st.booleans()):
        program = subject.trace(data.draw(MODELS))
    else:
        program = data.draw(arithmetic(subject)).program
    fusions, sizes = _fusions(data, program), _sizes(data)
    plan = subject.plan(program, subject.policy, sizes, None, fusions)
    unwritten = {index for fusion in fusions for index in fusion.unwritten}
    results = {i.result.index for i in program if i.op.sharing != "state"}
    assert plan.placements.keys() == results - {program.output.index} - unwritten
    assert plan.workspaces.keys() == {fusion.first for fusion in fusions if fusion.workspace}
    memory = {i.result.index: i.result.index for i in program}  # whose memory a value's numbers lie in
    for i in program:
        if i.op.sharing == "view" and i.operands[0] is not None:
            memory[i.result.index] = memory.get(i.operands[0].index, -1)
    for fusion in fusions:
        together = [program.instructions[at] for at in fusion.positions if at < len(program)]
        read = [{memory.get(v.index, -1) for v in i.operands if v is not None} for i in together]
        held = set().union(*read) & plan.placements.keys()
        for at, i in enumerate(together):
            result = i.result.index
            if i.op.sharing in ("view", "state") or result not in plan.placements:
                continue
            held.add(result)
            alone = set().union(*(r for other, r in enumerate(read) if other != at))
            first = i.operands[0]
            later = {other.result.index for other in together[at:]}  # each of these in its turn
            for index in (set().union(*read) & plan.placements.keys()) - later:
                mine, other = plan.placements[result], plan.placements[index]
                over = i.op.sharing == "in_place" and first is not None and memory.get(first.index) == index
                exact = mine == other and over and index not in alone
                assert exact or _apart(mine, other), f"{i} lies on %{index}, which runs with it"
        if fusion.workspace:
            working = plan.workspaces[fusion.first]
            assert working.offset % 64 == 0
            assert working.nbytes >= fusion.workspace
            assert all(_apart(working, plan.placements[index]) for index in held), "working memory on values"


@holds("PRG-9", "memory_plan", level="M")
def the_arena_ends_with_its_last_value(subject: Subject, data: st.DataObject) -> None:
    """Its size is the largest end of a place, or zero."""
    _, plan, _ = _planned(subject, data)
    places = [*plan.placements.values(), *plan.workspaces.values()]
    assert plan.arena_bytes == max((p.offset + p.nbytes for p in places), default=0)


@holds("PRG-10", "memory_plan", level="M")
def every_result_but_the_output_has_a_place(subject: Subject, data: st.DataObject) -> None:
    """Placed are the results of ops that are not states, without the output; leaves are not."""
    program, plan, _ = _planned(subject, data)
    results = {i.result.index for i in program if i.op.sharing != "state"}
    assert plan.placements.keys() == results - {program.output.index}


@holds("PRG-10", "backend")
def an_output_that_is_a_view_is_given_whole(subject: Subject, data: st.DataObject) -> None:
    """A view of a value in the arena, asked for as the result, arrives with the value's numbers."""
    tokens = data.draw(st.integers(1, 7))
    x = np.random.default_rng(tokens).integers(-9, 10, (tokens, HEADS, 3)).astype(np.float32)
    assert np.array_equal(subject.apply("merge_heads", x), x.reshape(tokens, -1))


@holds("PRG-11", "memory_plan", level="M")
def layers_share_one_layers_space(subject: Subject, data: st.DataObject) -> None:
    """From two layers on, more layers of the same kind need no larger arena."""
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    sizes = _sizes(data)
    arenas = {
        subject.plan(subject.trace(tiny_model(family, layers=layers)), subject.policy, sizes).arena_bytes
        for layers in (2, data.draw(st.integers(3, 9)))
    }
    assert len(arenas) == 1, f"arenas of {arenas} bytes"


@holds("PRG-12", "backend", "memory_plan")
def a_plan_holds_for_every_smaller_step(subject: Subject, data: st.DataObject) -> None:
    """Exact arithmetic, planned for many tokens, in steps of fewer, in any order."""
    case = data.draw(arithmetic(subject))
    most = len(case.expected)
    executable = subject.compile(case.program, case.weights, most + data.draw(st.integers(0, 30)), rows=most)
    for _ in range(3):
        tokens = data.draw(st.integers(1, most))
        rows = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=most))
        result = executable.run(one_sequence(tokens, rows))
        assert np.array_equal(result, case.expected[rows]), f"{tokens} tokens, rows {rows}\n{case.program}"


@holds("PRG-13", "backend", "memory_plan", level="M")
def no_step_takes_more_working_memory_than_was_told(subject: Subject, data: st.DataObject) -> None:
    """Prompts cut into steps, planned for the largest of these: none asks for more than there is."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    model, longest = data.draw(MODELS), max(lengths)
    ids = tuple(tuple(n % model.spec.vocabulary_size for n in range(length)) for length in lengths)
    prompts = Prompts(model, ids)
    size = data.draw(st.integers(1, longest))
    prompting = Prompting(subject, prompts, tokens=size * len(lengths))
    for start in range(0, longest, size):
        chunks = [Chunk(p, start, min(start + size, n)) for p, n in enumerate(lengths) if start < n]
        prompting.step(chunks)


@holds("PRG-15", "backend", "memory_plan", "linear", "gated", "rms_norm", "rope", "attention", level="M")
def a_step_takes_no_memory_that_was_not_planned(subject: Subject, data: st.DataObject) -> None:
    """Ops of ordinary width, and a tiny model over a long context, counted by Python's tracer."""
    tokens = data.draw(st.sampled_from([1, 7, 64, 200]))
    prompts = Prompts(data.draw(MODELS), (tuple(n % 16 for n in range(tokens + 300)),))
    prompting = Prompting(subject, prompts, tokens=300)
    prompting.step([Chunk(0, 0, 300)])
    _check_allocations("a model", prompting.executable, prompts.batch([Chunk(0, 300, 300 + tokens)]))
    for op in _WIDE_OPS:
        _check_allocations(op, _wide(subject, op, tokens, width=600), one_sequence(tokens))


def _check_allocations(what: str, executable: Executable, batch: StepBatch) -> None:
    executable.run(batch)  # weights are decoded, and kernels chosen
    tracemalloc.start()
    try:
        logits = executable.run(batch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    beyond, tokens = peak - logits.nbytes, len(batch.token_ids)
    assert beyond <= 256 * 1024 + 512 * tokens, f"{what}: {beyond} bytes for {tokens} tokens"


_WIDE_OPS: Mapping[str, Callable[[Tracer, Value, Mapping[str, Value]], Value]] = {
    "linear": lambda t, x, w: t.linear(x, w["matrix"]),
    "rms_norm": lambda t, x, w: t.rms_norm(x, w["vector"], eps=1e-5),
    "gated": lambda t, x, w: t.gated(x, x, activation="silu"),
    "rope": lambda t, x, w: t.merge_heads(
        t.rope(
            t.split_heads(x, heads=2),
            t.rope_table(w["positions"], frequencies=(1.0, 0.5) * 25, dims=100),
            pairing="halves",
        )
    ),
}


def _wide(subject: Subject, op: str, tokens: int, width: int) -> Executable:
    """An op on activations ``[tokens, width]``."""
    tracer = subject.tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    weights = {
        "x": Weight(np.ones((tokens, width), np.float32)).tensor("x"),
        "matrix": Weight(np.ones((width, width), np.float32)).tensor("matrix"),
        "vector": Weight(np.ones(width, np.float32)).tensor("vector"),
    }
    operands = {name: tracer.symbol(name, "weight", tensor.shape) for name, tensor in weights.items()}
    x = activation(tracer, inputs, "x", (tokens, width))
    output = _WIDE_OPS[op](tracer, x, {**operands, "positions": inputs.positions})
    return subject.compile(tracer.finish(output), weights, tokens)


def _prompts(data: st.DataObject, model: Model) -> Prompts:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ids = tuple(tuple(rng.integers(0, model.spec.vocabulary_size, n).tolist()) for n in lengths)
    return Prompts(model, ids, data.draw(st.sampled_from([1, 4, 16])))


def _arrays(subject: Subject, prompts: Prompts) -> tuple[dict[str, FloatArray], list[LayerCache]]:
    """A model's weights and an empty cache, as arrays of the policy's dtypes."""
    weights = {r: t.decode().astype(subject.policy.activations) for r, t in prompts.model.weights.items()}
    caches = []
    for layer in prompts.model.spec.layers:
        shape = (2, prompts.num_blocks, prompts.block_size, layer.kv_heads, layer.head_size)
        caches.append(LayerCache(*np.zeros(shape, subject.policy.kv)))
    return weights, caches


def _interpret(
    subject: Subject, prompts: Prompts, program: Program, batch: StepBatch
) -> list[tuple[Instruction, FloatArray]]:
    """Each instruction with its result: ops one after the other, every result in memory of its own."""
    weights, caches = _arrays(subject, prompts)
    inputs = input_arrays(batch)
    values: dict[int, Any] = {}
    for leaf in program.leaves:
        if leaf.kind == "state":
            values[leaf.index] = caches[int(leaf.name.split(".")[1])]
        else:
            values[leaf.index] = (inputs if leaf.kind == "input" else weights)[leaf.name]
    done: list[tuple[Instruction, FloatArray]] = []
    for instruction in program:
        operands = [None if v is None else values[v.index] for v in instruction.operands]
        result = instruction.op.golden(*operands, **instruction.attributes)
        values[instruction.result.index] = result
        done.append((instruction, result))
    return done


def _planned(subject: Subject, data: st.DataObject) -> tuple[Program, MemoryPlan, dict[str, int]]:
    """A model's program or arithmetic, with its plan."""
    if data.draw(st.booleans()):
        program = subject.trace(data.draw(MODELS))
    else:
        program = data.draw(arithmetic(subject)).program
    sizes = _sizes(data)

    def workspace(instruction: Instruction, sizes: Mapping[str, int]) -> int:
        return golden_workspace(instruction, sizes, subject.policy)

    return program, subject.plan(program, subject.policy, sizes, workspace), sizes


def _fusions(data: st.DataObject, program: Program) -> list[Fusion]:
    """Stretches of a program, with some of the values that are read in one alone."""
    shown = {
        v.index for i in program if i.op.sharing in ("view", "state") for v in (*i.operands, i.result) if v
    }
    readers: dict[int, list[int]] = {}
    for at, i in enumerate(program):
        for v in i.operands:
            if v is not None:
                readers.setdefault(v.index, []).append(at)
    ends = sorted(data.draw(st.sets(st.integers(0, len(program)), min_size=2, max_size=9)))
    found = []
    for first, end in pairwise(ends):
        results = {i.result.index for i in program.instructions[first:end]} - shown - {program.output.index}
        inner = {v for v in results if v in readers and max(readers[v]) < end}
        unwritten = data.draw(st.sets(st.sampled_from(sorted(inner)))) if inner else set()
        workspace = data.draw(st.sampled_from([0, 64, 1000]))
        found.append(Fusion(first, end - 1, frozenset(unwritten), workspace))
    return found


def _sizes(data: st.DataObject) -> dict[str, int]:
    tokens = data.draw(st.integers(1, 20))
    return {"T": tokens, "S": data.draw(st.integers(1, tokens)), "R": data.draw(st.integers(1, tokens))}


def _apart(one: Placement, other: Placement) -> bool:
    return one.offset + one.nbytes <= other.offset or other.offset + other.nbytes <= one.offset


def _range(plan: MemoryPlan, value: Value, sizes: Mapping[str, int]) -> slice:
    offset = plan.placements[value.index].offset
    return slice(offset, offset + int(np.prod(concrete(value.shape, sizes))) * plan.dtype.itemsize)


def _cells(
    marks: NDArray[np.int64], plan: MemoryPlan, value: Value, sizes: Mapping[str, int]
) -> NDArray[np.int64]:
    return marks[_range(plan, value, sizes)]


def _shape(operand: Operand, sizes: Mapping[str, Dim]) -> Shape:
    """A shape that fits; ``...`` stands for one axis."""
    return tuple("T" if dim == "..." else _size(dim, sizes) for dim in operand.dims)


def _size(dim: str, sizes: Mapping[str, Dim]) -> Dim:
    """A number, a word's size, or the quotient of a word and a number."""
    word, _, divisor = dim.partition("/")
    if not divisor:
        return int(dim) if dim.isdigit() else sizes[dim]
    return int(sizes[word]) // int(divisor)


def _record(tracer: Tracer, op: str, shapes: Sequence[Shape], attributes: Mapping[str, int]) -> Value:
    """Record an op on symbols of these shapes."""
    value: Value = getattr(tracer, op)(
        *(tracer.symbol("x", "input", shape) for shape in shapes), **attributes
    )
    return value
