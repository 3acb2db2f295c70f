"""Chapter *Mixed precision*.

Products are held against :mod:`refengine_conformance.naive_mixed`, which shares nothing with the engine. What
a backend computes of codes is seen through products alone: where its records lie is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.backend import Backend
from refengine.errors import NumericalError
from refengine.models import Model
from refengine.models.families import FAMILIES
from refengine.ops import FloatArray
from refengine.program import POLICIES, Tracer, Value, WorkspaceOf, symbolic_inputs
from refengine.quantizer import ENCODINGS
from refengine_conformance.bits import check_bits
from refengine_conformance.bounds import check_bound
from refengine_conformance.mixed import check_product, products_of, stored_matrix, stored_model
from refengine_conformance.naive_mixed import CODED, GROUP, a8_bound, a8_product, a16_product
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.properties.p03_encodings import LAYOUTS, some_supported
from refengine_conformance.registry import holds
from refengine_conformance.subject import Input, Subject, Weight, activation, commit_all, one_sequence

MIXED8, MIXED16 = ("mixed8",), ("mixed16",)
MIXED = MIXED8 + MIXED16

SEEDS = st.integers(0, 2**32 - 1)


def models(subject: Subject) -> st.SearchStrategy[Model]:
    """Models whose matrices have encodings that the backend computes; any, to be refused, if it has none."""
    support, ops = subject.start().support, ("embedding", product_of(subject))
    names = [
        n for n in CODED if all(support(op, encoding=n, policy=subject.policy.name) is None for op in ops)
    ]
    return st.builds(
        stored_model,
        st.sampled_from(sorted(FAMILIES)),
        st.integers(0, 3),
        wide=st.sampled_from([False, False, True]),
        encodings=st.just(tuple(names) if any(ENCODINGS[n].block_size == GROUP for n in names) else CODED),
    )


@st.composite
def prompts(draw: st.DrawFn, subject: Subject, longest: int = 5, count: int = 2) -> Prompts:
    """Prompts of random tokens, in blocks of any size and order."""
    model = draw(models(subject))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=count))
    rng = np.random.default_rng(draw(SEEDS))
    ids = tuple(tuple(rng.integers(0, model.spec.vocabulary_size, n).tolist()) for n in lengths)
    return Prompts(model, ids, draw(st.sampled_from([1, 4, 16])), order=draw(st.integers(0, 9)))


@st.composite
def rows_of_groups(draw: st.DrawFn, rows: int = 3, groups: int = 8) -> NDArray[np.float32]:
    """Activations ``[rows, 32 · groups]`` at most, each group of a size of its own, with ties and zeros."""
    shape = (draw(st.integers(1, rows)), draw(st.integers(1, groups)), GROUP)
    rng = np.random.default_rng(draw(SEEDS))
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, (*shape[:2], 1)))
    for kind in draw(st.lists(st.sampled_from(["ties", "zeros", "ones", "outlier"]), max_size=3)):
        t, g = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        match kind:
            case "ties":  # halves of steps of three to twelve bits, 127 of them at most
                step = rng.integers(4, 4096) / 8
                x[t, g] = rng.integers(-253, 254, GROUP) / 2 * step
                x[t, g, 0] = 127 * step
            case "zeros":
                x[t, g] = 0
            case "ones":
                x[t, g] = rng.choice([-1, 1], GROUP)
            case _:
                x[t, g, rng.integers(0, GROUP)] *= 1000
    return x.reshape(shape[0], -1).astype(np.float32)


def coded_weight(encoding: str, columns: int, data: st.DataObject, rows: int = 3) -> Weight:
    """Rows of so many weights, or of the next whole blocks."""
    columns = -(-columns // LAYOUTS[encoding].weights) * LAYOUTS[encoding].weights
    rng = np.random.default_rng(data.draw(SEEDS))
    return Weight(stored_matrix(rng, encoding, (rows, columns)), (rows, columns), encoding)


def supported(subject: Subject, data: st.DataObject, op: str, count: int = 2) -> list[str]:
    """Some encodings in which the backend computes a product; one to be refused, if it has none."""
    support = subject.start().support
    among = tuple(ENCODINGS) if op == "linear_a16" else CODED
    names = [n for n in among if support(op, encoding=n, policy=subject.policy.name) is None]
    return data.draw(st.permutations(names or [among[0]]), "encodings")[:count]


def widened(x: NDArray[np.float32], weight: Weight) -> NDArray[np.float32]:
    """Activations repeated to a weight's columns."""
    columns = weight.tensor("").shape[1]
    return np.ascontiguousarray(np.tile(x, (1, -(-columns // x.shape[1])))[:, :columns])


def unit_weight(columns: Sequence[int], width: int) -> Weight:
    """Q8_0 with a row for each of these columns: one there, zero elsewhere."""
    blocks = np.zeros((len(columns), width // GROUP, 34), np.uint8)
    blocks[..., 0:2] = np.array([1], "<f2").view(np.uint8)
    for row, column in enumerate(columns):
        blocks[row, column // GROUP, 2 + column % GROUP] = 1
    return Weight(blocks.reshape(len(columns), -1), (len(columns), width), "q8_0")


def check_a8(
    subject: Subject, x: NDArray[np.float32], weight: Weight, bias: FloatArray | None = None
) -> None:
    """A product's bits."""
    stored = weight.tensor("")
    given = None if bias is None else Weight(bias)
    check_bits(subject.apply("linear", x, weight, given), a8_product(stored.encoding, stored.data, x, bias))


def check_spoiling(subject: Subject, x: NDArray[np.float32], weight: Weight, data: st.DataObject) -> None:
    """One element that is infinite or NaN on its way to a product, among others below 1."""
    row, column = data.draw(st.integers(0, len(x) - 1)), data.draw(st.integers(0, x.shape[1] - 1))
    expected = subject.apply("linear", x, weight)
    spoilt = x.copy()
    spoilt[row, column] = data.draw(st.sampled_from([4, -4]))
    y = _through_infinity(subject, spoilt, weight, not_a_number=data.draw(st.booleans()))
    assert not np.isfinite(y[row]).any(), f"what is not finite gave {y[row]}"
    others = np.arange(len(x)) != row
    check_bits(y[others], expected[others])


def _through_infinity(
    subject: Subject, x: NDArray[np.float32], weight: Weight, *, not_a_number: bool
) -> FloatArray:
    """A product with ``x``, in which elements of size 4 become infinite, or NaN, and those below 1 stay.

    Weights must be finite, so infinity is computed: by the largest power of two and back.
    """
    weights = {"x": Weight(x).tensor("x"), "w": weight.tensor("w")}
    tracer = subject.tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    value = activation(tracer, inputs, "x", x.shape)
    large = tracer.scale(value, factor=2.0**127)
    for part in (63, 64):  # the inverse itself is subnormal
        large = tracer.scale(large, factor=2.0**-part)
    zero_or_nan = tracer.add(large, tracer.scale(large, factor=-1.0))
    value = tracer.add(value, zero_or_nan) if not_a_number else large
    traced = tracer.finish(tracer.linear(value, tracer.symbol("w", "weight", weights["w"].shape)))
    program = subject.in_policy(traced, weights)
    with np.errstate(all="ignore"):
        return subject.compile(program, weights, len(x)).run(one_sequence(len(x)))


# -- Which products ----------------------------------------------------------------------------------------


@holds("MIX-1", "precision", tier="models", policies=MIXED)
def products_are_replaced_and_nothing_else(subject: Subject, data: st.DataObject) -> None:
    """Recounted instruction by instruction: ops, operands, shapes and attributes; values defined once."""
    model = data.draw(models(subject))
    sealed = data.draw(st.booleans())
    traced = (subject.trace_sealed if sealed else subject.trace)(model)
    chosen = data.draw(st.sampled_from(sorted(POLICIES)))
    encodings = {role: tensor.encoding for role, tensor in model.weights.items()}
    program = subject.apply_policy(traced, POLICIES[chosen], encodings)
    stands_for: dict[int, int] = {}  # a traced value's index -> its index now
    codes: dict[int, Value] = {}  # of a traced value
    instructions = iter(program)
    for old in traced:
        new = next(instructions)
        coded = chosen == "mixed8" and _is_coded(model, old.op.name, old.operands)
        first = old.operands[0]
        if coded and first is not None and first.index not in codes:
            assert new.op.name == "quantize_a8", f"{new} where codes are wanted first"
            assert new.operands[0] is not None
            assert stands_for[first.index] == new.operands[0].index
            assert new.result.shape == (*first.shape[:1], int(first.shape[1]) // GROUP, 48)
            assert new.result.dtype == np.uint8
            codes[first.index], new = new.result, next(instructions)
        expected = "linear_a16" if chosen == "mixed16" and old.op.name == "linear" else old.op.name
        assert new.op.name == ("linear_a8" if coded else expected)
        assert (new.attributes, new.layer) == (old.attributes, old.layer)
        assert new.result.shape == old.result.shape
        assert new.result.dtype is None
        for number, (a, b) in enumerate(zip(old.operands, new.operands, strict=True)):
            assert (a is None) == (b is None)
            if a is None or b is None:
                continue
            if coded and number == 0:
                assert b is codes[a.index], f"{new} reads other codes"
            else:
                assert (a.kind, a.shape) == (b.kind, b.shape)
                assert a.kind == "result" or a.name == b.name
                assert stands_for.setdefault(a.index, b.index) == b.index, f"{new} reads another value"
        assert new.result.index not in stands_for.values(), f"{new} is defined twice"
        stands_for[old.result.index] = new.result.index
    assert next(instructions, None) is None
    assert stands_for[traced.output.index] == program.output.index
    assert len(set(stands_for.values()) | {v.index for v in codes.values()}) == len(stands_for) + len(codes)


def _is_coded(model: Model, op: str, operands: Sequence[Value | None]) -> bool:
    weight = operands[1] if op == "linear" else None
    return weight is not None and model.weights[weight.name].encoding in CODED


@holds("MIX-1", "precision", policies=MIXED8)
def the_encodings_are_those_of_integers(subject: Subject, data: st.DataObject) -> None:
    """A product with a weight of any encoding, alone."""
    encoding = data.draw(st.sampled_from(sorted(ENCODINGS)))
    tracer = Tracer()
    table, weight = (tracer.symbol(name, "weight", (8, 256)) for name in ("table", "weight"))
    x = tracer.embedding(tracer.symbol("token_ids", "input", ("T",)), table)
    program = tracer.finish(tracer.linear(x, weight))
    names = [i.op.name for i in subject.apply_policy(program, subject.policy, {"weight": encoding})]
    products = ["quantize_a8", "linear_a8"] if encoding in CODED else ["linear"]
    assert names == ["embedding", *products], f"{encoding}: {names}"


# -- Eight bits --------------------------------------------------------------------------------------------


@holds("MIX-2", "quantize_a8", policies=MIXED8)
def codes_are_the_nearest_ones(subject: Subject, data: st.DataObject) -> None:
    """Seen one by one, by a weight that has a single one: the result is ``code · s``."""
    x = data.draw(rows_of_groups(groups=3))
    columns = data.draw(st.lists(st.integers(0, x.shape[1] - 1), min_size=1, max_size=40))
    check_a8(subject, x, unit_weight(columns, x.shape[1]))


@holds("MIX-3", "quantize_a8", policies=MIXED8)
def groups_of_the_smallest_numbers_have_codes(subject: Subject, data: st.DataObject) -> None:
    """From a few times the least subnormal number to where scales are normal."""
    rng = np.random.default_rng(data.draw(SEEDS))
    largest = 2.0 ** data.draw(st.integers(-149, -115)) * data.draw(st.sampled_from([1, 1.5, 190, 63.5, 64]))
    x = rng.uniform(-largest, largest, (2, GROUP)).astype(np.float32)
    x[0, 0] = largest
    shifted = unit_weight(range(GROUP), GROUP).array.copy()
    shifted[:, 0:2] = np.array([2.0**15], "<f2").view(np.uint8)
    check_a8(subject, x, Weight(shifted, (GROUP, GROUP), "q8_0"))


@holds("MIX-4", "quantize_a8", policies=MIXED8)
def what_is_not_finite_shows_in_its_row_alone(subject: Subject, data: st.DataObject) -> None:
    """No result of that row is a number, whatever the weights; others have the bits they have without it."""
    rng = np.random.default_rng(data.draw(SEEDS))
    x = rng.uniform(-1, 1, (data.draw(st.integers(1, 6)), 256)).astype(np.float32)
    for encoding in supported(subject, data, "linear_a8"):
        check_spoiling(subject, x, coded_weight(encoding, 256, data), data)


@holds("MIX-5", "linear_a8", policies=MIXED8)
def sums_of_the_largest_integers_are_exact(subject: Subject, data: st.DataObject) -> None:
    """All codes 127 or -127, and integers as large as they get, or any."""
    for encoding in supported(subject, data, "linear_a8", count=3):
        layout = LAYOUTS[encoding]
        fill = data.draw(st.sampled_from([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, None]))
        rng = np.random.default_rng(data.draw(SEEDS))
        rows = (
            rng.integers(0, 256, (3, layout.bytes), np.uint8)
            if fill is None
            else np.full((3, layout.bytes), fill, np.uint8)
        )
        for start in layout.scales:
            rows[:, start : start + 2] = np.array([0.5 + start / 16 % 1], "<f2").view(np.uint8)
        x = np.where(rng.random((3, layout.weights)) < [[0], [1], [0.5]], 1, -1).astype(np.float32)
        check_a8(subject, x, Weight(rows, (3, layout.weights), encoding))


@holds("MIX-6", "linear_a8", policies=MIXED8)
def products_have_the_bits_of_rational_arithmetic(subject: Subject, data: st.DataObject) -> None:
    """Any activations and weights, with a bias and without, in each encoding that the backend supports."""
    x = data.draw(rows_of_groups())
    for encoding in supported(subject, data, "linear_a8"):
        weight = coded_weight(encoding, x.shape[1], data)
        bias = np.random.default_rng(data.draw(SEEDS)).standard_normal(3).astype(np.float32)
        check_a8(subject, widened(x, weight), weight, data.draw(st.sampled_from([None, bias])))


@holds("MIX-7", "linear_a8", "linear_a16", level="L3", policies=MIXED)
def a_rows_bits_are_those_it_has_alone(subject: Subject, data: st.DataObject) -> None:
    """Among up to 40 rows, large ones and small; and a weight row's results in any place."""
    rng = np.random.default_rng(data.draw(SEEDS))
    count, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    x = rng.standard_normal((count, GROUP * groups)) * np.exp2(rng.integers(-3, 20, (count, 1)))
    for encoding in supported(subject, data, product_of(subject), count=1):
        weight = coded_weight(encoding, x.shape[1], data, rows=70)
        wide = widened(x.astype(np.float32), weight)
        together = subject.apply("linear", wide, weight)
        start = data.draw(st.integers(0, count - 1))
        stop = data.draw(st.integers(start + 1, count))
        check_bits(subject.apply("linear", wide[start:stop], weight), together[start:stop])
        order = rng.permutation(70)[: data.draw(st.integers(1, 70))]
        if weight.shape is not None:
            some = replace(weight, array=weight.array[order], shape=(len(order), weight.shape[1]))
            if product_of(subject) == "linear_a8":
                check_bits(subject.apply("linear", wide, some), together[:, order])


@holds("MIX-8", "quantize_a8", "linear_a8", policies=MIXED8)
def products_stay_close_to_those_of_activations(subject: Subject, data: st.DataObject) -> None:
    """Within half a scale per weight, and the roundings."""
    x = data.draw(rows_of_groups())
    for encoding in supported(subject, data, "linear_a8"):
        weight = coded_weight(encoding, x.shape[1], data)
        wide, stored = widened(x, weight), weight.tensor("")
        bias = np.random.default_rng(data.draw(SEEDS)).standard_normal(3).astype(np.float32)
        y = subject.apply("linear", wide, weight, Weight(bias))
        check_bound(y, *a8_bound(encoding, stored.data, wide, bias))


# -- Sixteen bits ------------------------------------------------------------------------------------------


@holds("MIX-9", "linear_a16", policies=MIXED16)
def operands_are_rounded_to_float16(subject: Subject, data: st.DataObject) -> None:
    """Within the bound of rounded numbers' sums: any encoding, and numbers that float16 barely has."""
    rng = np.random.default_rng(data.draw(SEEDS))
    columns = data.draw(st.sampled_from([1, 7, 32, 100, 256]))
    small = 2.0 ** data.draw(st.sampled_from([0, 0, -16, -24]))
    x = (rng.standard_normal((data.draw(st.integers(1, 9)), columns)) * small).astype(np.float32)
    bias = rng.standard_normal(5).astype(np.float32)
    for encoding in supported(subject, data, "linear_a16"):
        if LAYOUTS[encoding].scales:
            weight = coded_weight(encoding, columns, data, rows=5)
        else:
            numbers = (rng.standard_normal((5, columns)) * data.draw(st.sampled_from([1, 2.0**-14]))).astype(
                np.float32
            )
            weight = Weight(numbers)
        wide = widened(x, weight)
        given = data.draw(st.sampled_from([None, bias]))
        y = subject.apply("linear", wide, weight, None if given is None else Weight(given))
        check_bound(y, *a16_product(weight.tensor("").decode(), wide, given))


@holds("MIX-10", "linear_a16", policies=MIXED16)
def large_rows_are_scaled_by_a_power_of_two(subject: Subject, data: st.DataObject) -> None:
    """Just below and above where float16 ends, and far above; rows beside them keep their bits."""
    rng = np.random.default_rng(data.draw(SEEDS))
    x = rng.standard_normal((4, 64)).astype(np.float32)
    weight = Weight((rng.standard_normal((5, 64)) * 0.1).astype(np.float32))
    alone = subject.apply("linear", x, weight)
    row, column = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 63))
    sizes = [2.0**15, 2.0**15 + 1, 40000.0, 65503.0, 65504.0, 65519.0, 65520.0, 2.0**16, 1e6, 1e30, 1e36]
    x[row] *= np.float32(data.draw(st.sampled_from([1, 1000])))
    x[row, column] = data.draw(st.sampled_from(sizes)) * data.draw(st.sampled_from([1, -1]))
    y = subject.apply("linear", x, weight)
    check_bound(y, *a16_product(weight.array, x))
    others = np.arange(4) != row
    check_bits(y[others], alone[others])


@holds("MIX-10", "linear_a16", policies=MIXED16)
def what_is_not_finite_stays_in_its_row(subject: Subject, data: st.DataObject) -> None:
    """No result of that row is a number; all others have the bits they have without it."""
    rng = np.random.default_rng(data.draw(SEEDS))
    x = rng.uniform(-1, 1, (data.draw(st.integers(1, 9)), 64)).astype(np.float32)
    check_spoiling(subject, x, Weight(rng.standard_normal((5, 64)).astype(np.float32)), data)


@holds("MIX-11", "linear_a16", policies=MIXED16)
def a_weight_that_float16_does_not_have_is_refused(subject: Subject, data: st.DataObject) -> None:
    """From where it would be rounded to infinity on, and not before."""
    rng = np.random.default_rng(data.draw(SEEDS))
    numbers = rng.standard_normal((5, 64)).astype(np.float32)
    at = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 63))
    size, fits = data.draw(
        st.sampled_from([(65504.0, True), (65519.99, True), (65520.0, False), (1e9, False)])
    )
    numbers[at] = size * data.draw(st.sampled_from([1, -1]))
    x = rng.standard_normal((2, 64)).astype(np.float32)
    try:
        y = subject.apply("linear", x, Weight(numbers))
    except NumericalError as error:
        assert not fits, f"{numbers[at]} was refused"
        assert "float32" in str(error), f"{error} names no other policy"
    else:
        assert fits, f"{numbers[at]} gave {y}"


# -- Whole models ------------------------------------------------------------------------------------------


@holds("MIX-12", "backend", policies=MIXED)
def other_ops_are_those_of_float32(subject: Subject, data: st.DataObject) -> None:
    """Norm, activation, cap, sum, rotation, and rows that are looked up: the same bits in both policies."""
    rng = np.random.default_rng(data.draw(SEEDS))
    x, y = rng.standard_normal((2, data.draw(st.integers(1, 20)), 96)).astype(np.float32)
    weight = Weight(rng.standard_normal(96).astype(np.float32))
    plain = replace(subject, policy=POLICIES["float32"])
    table = rng.standard_normal((len(x), 32)).astype(np.float32)
    activation_name = data.draw(st.sampled_from(["silu", "gelu_tanh"]))
    pairing = data.draw(st.sampled_from(["halves", "interleaved"]))
    looked_up = coded_weight(supported(subject, data, "embedding", 1)[0], 64, data)
    results = [
        (
            one.apply("rms_norm", x, weight, eps=1e-5),
            one.apply("gated", x, y, activation=activation_name),
            one.apply("softcap", x, cap=2.0),
            one.apply("add", x, y),
            one.apply("scale", x, factor=0.3),
            one.apply("rope", x.reshape(len(x), 3, 32), table, pairing=pairing),
            one.apply("embedding", Input("token_ids"), looked_up),
        )
        for one in (subject, plain)
    ]
    for mixed, expected in zip(*results, strict=True):
        check_bits(mixed, expected)


@holds("MIX-12", "linear", policies=MIXED8)
def products_that_are_left_are_those_of_float32(subject: Subject, data: st.DataObject) -> None:
    """With weights that are not stored as integers in groups of 32."""
    rng = np.random.default_rng(data.draw(SEEDS))
    x = rng.standard_normal((data.draw(st.integers(1, 9)), 256)).astype(np.float32)
    for encoding in some_supported(subject, data, "linear"):
        if encoding in CODED:
            continue
        weight = (
            coded_weight(encoding, 256, data)
            if LAYOUTS[encoding].scales
            else Weight(rng.standard_normal((3, 256)).astype(np.float32))
        )
        plain = replace(subject, policy=POLICIES["float32"]).apply("linear", x, weight)
        check_bits(subject.apply("linear", x, weight), plain)


@holds("MIX-13", "backend", "precision", tier="models", policies=MIXED)
def each_product_of_a_model_is_that_of_what_it_reads(subject: Subject, data: st.DataObject) -> None:
    """Any product of any model, in a step of several prompts."""
    case = data.draw(prompts(subject, longest=3))
    at = data.draw(st.sampled_from(products_of(subject.program(case.model))))
    check_product(subject, case, at, data.draw(SEEDS))


@holds("MIX-14", "backend", level="L3", tier="models", policies=MIXED)
def logits_do_not_depend_on_the_schedule(subject: Subject, data: st.DataObject) -> None:
    """A prompt alone in one step, or in pieces beside another prompt, in other blocks: the same bits."""
    case = data.draw(prompts(subject, longest=20))
    alone = Prompting(subject, case).step(case.whole[:1])[0]
    running = Prompting(subject, replace(case, order=case.order + 1))
    length = len(case.token_ids[0])
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=3)) - {length})
    others = [Chunk(1, 0, len(case.token_ids[1]))] if len(case.token_ids) > 1 else []
    parts = []
    for start, stop in pairwise([0, *cuts, length]):
        first = data.draw(st.booleans())
        step = [*(others if first else []), Chunk(0, start, stop), *([] if first else others)]
        logits = running.step(step)
        parts.append(logits[step.index(Chunk(0, start, stop))])
        others = []
    check_bits(np.concatenate(parts), alone)


@holds("MIX-14", "backend", level="L2", tier="models", policies=MIXED)
def repetition_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """On two backends, and once more on one of them, whose arena is full of other numbers by then."""
    case = data.draw(prompts(subject, longest=9))
    first, second = Prompting(subject, case), Prompting(subject, case)
    results = [np.concatenate(first.step(case.whole)).tobytes()]
    other = replace(
        case, token_ids=tuple(tuple(reversed(ids)) for ids in case.token_ids), order=case.order + 1
    )
    first.executable.run(other.batch(other.whole))
    results += [np.concatenate(running.step(case.whole)).tobytes() for running in (first, second)]
    assert len(set(results)) == 1


@holds("MIX-15", "memory_plan", "backend", level="M", tier="models", policies=MIXED)
def codes_have_places_in_the_plan(subject: Subject, data: st.DataObject) -> None:
    """48 bytes per group, and no value that lives at the same time on top of them."""
    model, tokens = data.draw(models(subject)), data.draw(st.integers(1, 40))
    program = subject.program(model)
    plan = subject.plan(program, subject.policy, {"T": tokens, "S": 2, "R": tokens})
    coded = [i.result for i in program if i.op.name == "quantize_a8"]
    for value in coded:
        groups = int(value.shape[1])
        place = plan.placements[value.index]
        assert place.nbytes == -(-tokens * groups * 48 // 64) * 64, f"{value}: {place.nbytes} bytes"
        last = max(at for at, i in enumerate(program) if value in i.operands)
        assert place.last == last
        for index, other in plan.placements.items():
            if index != value.index and other.first <= place.last and place.first <= other.last:
                apart = (
                    other.offset + other.nbytes <= place.offset or place.offset + place.nbytes <= other.offset
                )
                assert apart, f"{value} lies on %{index}"


@holds("MIX-15", "backend", level="M", tier="models", policies=MIXED)
def memory_is_what_was_planned_under_any_limit(subject: Subject, data: st.DataObject) -> None:
    """Weights, arena and cache take what the plans say, to the byte, and no limit changes a bit."""
    case = data.draw(prompts(subject, longest=4))
    program, weights = subject.program(case.model), case.model.weights
    stored = sum(tensor.nbytes for tensor in weights.values())
    limit = data.draw(st.just(0) | st.just(stored) | st.integers(0, 2 * stored))
    results = []
    for most in (None, limit):
        backend = subject.start()
        planned = backend.plan_weights(program, weights, subject.policy, most)
        least = backend.plan_weights(program, weights, subject.policy, 0).total
        assert most is None or planned.total <= max(most, least)
        layout = case.layout(subject.policy, subject.kv_format)
        cache = backend.create_cache(layout)
        commit_all(cache, layout)
        sizes = {"T": case.tokens, "S": case.tokens, "R": case.tokens, "P": layout.block_size}
        plan = subject.plan(program, subject.policy, sizes, _workspace(backend, subject))
        executable = backend.compile(
            program, subject.policy, plan, backend.upload(weights, subject.policy, planned), layout, cache,
            fallback=subject.fallback,
        )  # fmt: skip
        for _ in range(2):
            results.append(executable.run(case.batch(case.whole)).tobytes())
            use = backend.memory()
            assert (use.weights, use.mapped) == (planned.held, planned.mapped + planned.streamed)
            assert (use.arena, use.kv_cache) == (plan.arena_bytes, layout.nbytes)
    assert len(set(results)) == 1, f"other bits under a limit of {limit} bytes"


def _workspace(backend: Backend, subject: Subject) -> WorkspaceOf:
    return lambda instruction, sizes: backend.workspace(instruction, sizes, subject.policy)


def product_of(subject: Subject) -> str:
    """The product of the subject's policy."""
    return "linear_a8" if subject.policy.products == "a8" else "linear_a16"
