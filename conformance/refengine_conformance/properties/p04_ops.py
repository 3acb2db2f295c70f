"""Chapter *Operations*.

Expected values are decimal numbers of 28 digits and more, so that they are exact beside the results of every
policy, and results are held against the clauses' own bounds, with nothing added for the expectation's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.backend import Executable
from refengine.ops import FloatArray
from refengine.program import StepBatch, Tracer, Value, symbolic_inputs
from refengine_conformance.bounds import check_bound
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject, Weight, activation, one_sequence

OPS = (
    "embedding",
    "take_rows",
    "split_heads",
    "merge_heads",
    "add",
    "scale",
    "linear",
    "rms_norm",
    "rope_table",
    "rope",
    "gated",
    "softcap",
)

Build = Callable[[Tracer, SimpleNamespace], Value]
"""``build(tracer, values)`` writes a program and gives its output; the values are operands, by name, and the
step's ``token_ids``, ``positions`` and ``logit_rows``."""

Decimals = NDArray[np.object_]

ROWS = st.sampled_from([1, 2, 3, 8, 9, 17])
WIDTHS = st.sampled_from([1, 2, 7, 8, 24, 31, 33, 48, 65])
PAIRINGS = st.sampled_from(["interleaved", "halves"])
SIZES = st.sampled_from([1e-45, 1e-42, 1e-38, 1e-20, 1e-3, 1.0, 1.0, 1.0, 30.0, 1e4, 1e15, 1e30, 3e38])


# -- The clauses -------------------------------------------------------------------------------------------


@holds("OPS-1", *OPS)
def results_have_the_shape_and_dtype_that_the_signature_says(subject: Subject, data: st.DataObject) -> None:
    """Every op, with any size of 1 and any number of rows."""
    subject = started(subject)
    tokens, heads, size = data.draw(ROWS), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    width = heads * size
    x, vector = np.ones((tokens, width), np.float32), Weight(np.ones(width, np.float32))
    table = np.ones((tokens, size - size % 2), np.float32)
    matrix = Weight(np.ones((data.draw(st.integers(1, 5)), width), np.float32))
    taken = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens))
    in_heads = (tokens, heads, size)
    programs: dict[str, tuple[Build, tuple[int, ...]]] = {
        "embedding": (lambda t, v: v.x, (tokens, width)),
        "take_rows": (lambda t, v: t.take_rows(v.x, v.logit_rows), (len(taken), width)),
        "split_heads": (lambda t, v: t.split_heads(v.x, heads=heads), in_heads),
        "merge_heads": (lambda t, v: t.merge_heads(t.split_heads(v.x, heads=heads)), (tokens, width)),
        "add": (lambda t, v: t.add(v.x, v.x), (tokens, width)),
        "scale": (lambda t, v: t.scale(v.x, factor=2.0), (tokens, width)),
        "linear": (lambda t, v: t.linear(v.x, v.matrix), (tokens, matrix.array.shape[0])),
        "rms_norm": (lambda t, v: t.rms_norm(v.x, v.vector, eps=1.0), (tokens, width)),
        "rope_table": (lambda t, v: t.rope_table(v.positions, frequencies=(1.0, 0.1), dims=4), (tokens, 4)),
        "gated": (lambda t, v: t.gated(v.x, v.x, activation="silu"), (tokens, width)),
        "softcap": (lambda t, v: t.softcap(v.x, cap=2.0), (tokens, width)),
    }
    if table.size:
        programs["rope"] = (
            lambda t, v: t.rope(t.split_heads(v.x, heads=heads), v.table, pairing="halves"),
            in_heads,
        )
    operands: dict[str, Any] = {"x": x, "vector": vector, "matrix": matrix}
    if table.size:
        operands["table"] = table
    for op, (build, shape) in programs.items():
        y = compiled(subject, build, tokens, **operands).run(step(range(tokens), rows=taken))
        assert y.shape == shape, f"{op}: {y.shape}, not {shape}"
        assert y.dtype == subject.policy.activations, f"{op}: {y.dtype}, not {subject.policy.activations}"


@holds("OPS-2", *OPS, level="L3")
def a_row_has_the_bits_it_has_alone(subject: Subject, data: st.DataObject) -> None:
    """Every op: alone, in company, in company in another order, and with itself as company."""
    subject = started(subject)
    tokens = data.draw(st.sampled_from([2, 3, 8, 9, 17, 33, 49]))
    order = data.draw(st.permutations(range(tokens)))
    operands, programs = data.draw(rows_and_programs(tokens))
    for op, build in programs.items():
        executable = compiled(subject, build, tokens + 1, **operands)
        together = executable.run(step(range(tokens)))
        alone, doubled = order[0], [order[-1], *order]
        for ids in ([alone], order[: tokens // 2], order, doubled):
            y = executable.run(step(ids))
            assert y.tobytes() == together[ids].tobytes(), (
                f"{op}: rows {ids} differ from those of {tokens} rows"
            )


@holds("OPS-2", *OPS, level="L3")
def what_is_not_finite_stays_in_its_row(subject: Subject, data: st.DataObject) -> None:
    """Every op: where a row overflows on the way to it, the others have the bits that they have otherwise.

    Weights must be finite, so infinity is computed: elements up to 1 survive a multiplication by the largest
    power of two and by its inverse, 4 does not. Infinity minus infinity is NaN.
    """
    subject = started(subject)
    tokens, not_a_number = data.draw(st.sampled_from([2, 3, 9, 17])), data.draw(st.booleans())
    spoiled = data.draw(st.integers(0, tokens - 1))
    operands, programs = data.draw(rows_and_programs(tokens, largest=1.0))
    damaged = {name: array.copy() for name, array in operands.items() if isinstance(array, np.ndarray)}
    for array in damaged.values():
        array[spoiled, :: data.draw(st.integers(1, 3))] = 4.0
    exponent = int(np.finfo(subject.policy.activations).maxexp) - 1

    def spoil(t: Tracer, x: Value) -> Value:
        y = t.scale(x, factor=2.0**exponent)
        for part in (exponent // 2, exponent - exponent // 2):  # the inverse itself is subnormal
            y = t.scale(y, factor=2.0**-part)
        return t.add(x, t.add(y, t.scale(y, factor=-1.0))) if not_a_number else y

    def after(build: Build) -> Build:
        return lambda t, v: build(
            t, SimpleNamespace(**{**vars(v), **{name: spoil(t, getattr(v, name)) for name in damaged}})
        )

    others = [row for row in range(tokens) if row != spoiled]
    with np.errstate(all="ignore"):
        for op, build in programs.items():
            clean, mixed = (
                compiled(subject, after(build), tokens, **o).run(step(range(tokens)))
                for o in (operands, {**operands, **damaged})
            )
            assert np.isfinite(clean).all(), f"{op}: finite operands gave what is not"
            assert mixed[others].tobytes() == clean[others].tobytes(), f"{op}: row {spoiled} spoils others"


@holds("OPS-3", *OPS, level="L2")
def the_same_operands_give_the_same_bits(subject: Subject, data: st.DataObject) -> None:
    """Every op: again on one executable, after another step, and on a backend started anew."""
    tokens = data.draw(ROWS)
    operands, programs = data.draw(rows_and_programs(tokens))
    programs["rope_table"] = lambda t, v: t.rope_table(v.positions, frequencies=(1.0, 0.01), dims=4)
    here, elsewhere = started(subject), started(subject)
    for op, build in programs.items():
        executable = compiled(here, build, tokens, **operands)
        first = executable.run(step(range(tokens))).tobytes()
        executable.run(step([tokens - 1]))
        again = executable.run(step(range(tokens))).tobytes()
        anew = compiled(elsewhere, build, tokens, **operands).run(step(range(tokens))).tobytes()
        assert first == again, f"{op}: the second run differs from the first"
        assert first == anew, f"{op}: another start of the backend gives other bits"


@holds("OPS-4", "memory_plan", *OPS)
def an_operand_that_is_read_again_is_unchanged(subject: Subject, data: st.DataObject) -> None:
    """Every op, each of its operands: the operand, plus zero times the result, is the operand."""
    subject = started(subject)
    tokens = data.draw(ROWS)
    operands, programs = data.draw(rows_and_programs(tokens))
    del programs["take_rows"]  # its result has other rows than its operand

    def read_again(build: Build, name: str) -> Build:
        def program(t: Tracer, v: SimpleNamespace) -> Value:
            y = build(t, v)
            y = t.merge_heads(y) if len(y.shape) == 3 else y
            return t.add(getattr(v, name), t.scale(y, factor=0.0))

        return program

    for op, build in programs.items():
        for name in ("x", "y"):
            kept = compiled(subject, read_again(build, name), tokens, **operands).run(step(range(tokens)))
            assert np.array_equal(kept, operands[name]), f"{op} has changed {name}, which was still needed"


@holds("OPS-5", "embedding", "take_rows", "split_heads", "merge_heads")
def moved_elements_keep_their_bits(subject: Subject, data: st.DataObject) -> None:
    """Lookups in any order, with repetitions, of first and last rows; of subnormals and both zeros."""
    subject = started(subject)
    table = data.draw(numbers(width=st.just(12)))
    last = len(table) - 1
    ids = [0, *data.draw(st.lists(st.integers(0, last), max_size=12)), last]
    rows = [len(ids) - 1, *data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=8)), 0][: len(ids)]
    x = table.astype(subject.policy.activations)[ids]

    y = compiled(subject, lambda t, v: t.embedding(v.token_ids, v.table), len(ids), table=Weight(table))
    assert y.run(step(ids)).tobytes() == x.tobytes(), "embedding gives other rows than those named"
    y = compiled(subject, lambda t, v: t.take_rows(v.table, v.logit_rows), len(ids), table=table)
    assert y.run(step(ids, rows=rows)).tobytes() == x[rows].tobytes(), "take_rows gives other rows"


@holds("OPS-5", "split_heads", "merge_heads")
def heads_lie_side_by_side(subject: Subject, data: st.DataObject) -> None:
    """Elements are named by their places."""
    subject = started(subject)
    tokens, heads, size = data.draw(ROWS), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    x = np.arange(tokens * heads * size, dtype=np.float32).reshape(tokens, -1)

    def split(t: Tracer, v: SimpleNamespace) -> Value:
        return t.split_heads(v.x, heads=heads)

    y = compiled(subject, split, tokens, x=x).run(step(range(tokens)))
    for t, h, d in np.ndindex(tokens, heads, size):
        assert y[t, h, d] == x[t, h * size + d]
    merged = compiled(subject, lambda t, v: t.merge_heads(split(t, v)), tokens, x=x)
    assert np.array_equal(merged.run(step(range(tokens))), x)


@holds("OPS-6", "add")
def a_sum_is_rounded_once(subject: Subject, data: st.DataObject) -> None:
    """Of any two magnitudes.

    A sum in float64 that is rounded again to float32 is the sum rounded once (Figueroa, 1995).
    """
    x = data.draw(numbers())
    y = data.draw(numbers(st.just(len(x)), st.just(x.shape[1])))
    opposite = data.draw(st.integers(0, x.shape[1]))
    y[:, :opposite] = -x[:, :opposite]  # exact zeros
    x[-1, -1] = y[-1, -1] = data.draw(st.sampled_from([3e38, -3e38]))  # infinity, in float32
    with np.errstate(over="ignore"):
        result = subject.apply("add", x, y)
    is_rounded(subject, result, np.add, x, y)


@holds("OPS-6", "scale")
def a_product_is_rounded_once(subject: Subject, data: st.DataObject) -> None:
    """Of any two magnitudes, the factor rounded first. In float64 the product of two float32 is exact."""
    x = data.draw(numbers())
    factor = data.draw(st.sampled_from([0.1, 1 / 3, 24**0.5, -1.0, 0.0, 2.0**-20, 1e-30, 1e30, -7e37]))
    with np.errstate(over="ignore"):
        y = subject.apply("scale", x, factor=factor)
    is_rounded(
        subject, y, np.multiply, x, np.full_like(x, subject.policy.activations.type(factor), np.float64)
    )


@holds("OPS-7", "linear")
def a_projection_is_a_sum_of_products(subject: Subject, data: st.DataObject) -> None:
    """Against the sum in decimals, for many rows and for one; some cancel, and some are huge or tiny."""
    x = data.draw(numbers(largest=1e15))
    out_width = data.draw(WIDTHS)
    weight = data.draw(numbers(st.just(out_width), st.just(x.shape[1]), largest=1e15))
    if data.draw(st.booleans()):
        x[:, 1::2] = -x[:, ::2][:, : x.shape[1] // 2]
    bias = data.draw(st.none() | numbers(st.just(1), st.just(out_width), largest=1e4))
    added = exact(np.zeros(out_width) if bias is None else bias[0])
    a, b = exact(x), exact(weight).T
    magnitude = abs(a) @ abs(b) + abs(added)
    inner = x.shape[1]
    lost = abs(a).sum(axis=1)[:, None] + abs(b).sum(axis=0) + 2 * inner + 2
    u, eta, omega = limits(subject)
    expected, bound, judged = a @ b + added, (inner + 1) * u * magnitude + eta * lost, magnitude < omega / 2
    for rows in (slice(None), slice(1)):
        y = subject.apply("linear", x[rows], Weight(weight), None if bias is None else Weight(bias[0]))
        check(y, expected[rows], bound[rows], where=judged[rows])


@holds("OPS-8", "rms_norm")
def a_row_is_divided_by_its_root_mean_square(subject: Subject, data: st.DataObject) -> None:
    """Against the formula in decimals; where the squares overflow, a zero is accepted."""
    x = data.draw(numbers(largest=data.draw(st.sampled_from([1.0, 1e4, 3e38]))))
    weight = data.draw(numbers(st.just(1), st.just(x.shape[1]), largest=1e4))[0]
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 0.5]))
    with np.errstate(over="ignore"):
        y = subject.apply("rms_norm", x, Weight(weight), eps=eps)
    u, eta, omega = limits(subject)
    a, w, width, e = exact(x), exact(weight), x.shape[1], Decimal(eps)
    squares = (a * a).sum(axis=1)[:, None]
    expected = a / np.sqrt(squares / width + e) * w
    lost = (1 + abs(w)) * (2 + Decimal(width).sqrt() + 2 / e.sqrt())
    zeroed = (squares >= omega / 2) & (y == 0)
    check(y, expected, (Decimal(width) / 2 + 12) * u * abs(expected) + eta * lost, where=~zeroed)


@holds("OPS-9", "rope_table")
def a_rope_table_holds_cosines_and_sines(subject: Subject, data: st.DataObject) -> None:
    """Against power series, at early and late positions, for any base and magnitude."""
    tokens, first = data.draw(ROWS), data.draw(st.sampled_from([0, 1, 77, 4095, 131_071]))
    frequencies, magnitude = data.draw(FREQUENCIES), data.draw(st.sampled_from([1.0, 1.25, 0.3]))

    def build(t: Tracer, v: SimpleNamespace) -> Value:
        dims = 2 * len(frequencies)
        return t.rope_table(v.positions, frequencies=frequencies, dims=dims, magnitude=magnitude)

    table = compiled(subject, build, tokens).run(step([0] * tokens, first=first))
    u, eta, _ = limits(subject)
    angles = exact(np.arange(first, first + tokens, dtype=np.float64))[:, None] * exact(np.array(frequencies))
    cosines, sines = cosine_and_sine(angles)
    bound = Decimal(magnitude) * (u + (angles + 4) * Decimal(2**-53)) + eta
    check(table[:, : len(frequencies)], Decimal(magnitude) * cosines, bound)
    check(table[:, len(frequencies) :], Decimal(magnitude) * sines, bound)


@holds("OPS-9", "rope_table", level="L3")
def every_row_has_the_angles_of_its_own_position(subject: Subject, data: st.DataObject) -> None:
    """A step of several sequences, each at its own place, against a step of each alone."""
    places = data.draw(st.lists(st.sampled_from([77, 0, 4095, 1]), min_size=2, max_size=5))
    frequencies, tokens = data.draw(FREQUENCIES), len(places)

    def build(t: Tracer, v: SimpleNamespace) -> Value:
        return t.rope_table(v.positions, frequencies=frequencies, dims=2 * len(frequencies))

    together = replace(
        step([0] * tokens),
        positions=np.array(places, np.int32),
        query_starts=np.arange(tokens + 1, dtype=np.int32),
        context_lens=np.array(places, np.int32) + np.int32(1),
        block_tables=(np.zeros((tokens, max(places) + 1), np.int32),),
    )
    executable = compiled(subject, build, tokens)
    table = executable.run(together).copy()
    for row, place in zip(table, places, strict=True):
        assert row.tobytes() == executable.run(step([0], first=place)).tobytes()


@holds("OPS-10", "rope")
def rope_turns_pairs(subject: Subject, data: st.DataObject) -> None:
    """Both pairings, in all of a head or a part of it, with tables of any numbers."""
    tokens, heads, size = data.draw(ROWS), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 16))
    dims = 2 * data.draw(st.integers(1, size // 2))
    x = data.draw(numbers(st.just(tokens), st.just(heads * size), largest=1e15)).reshape(tokens, heads, size)
    table = data.draw(numbers(st.just(tokens), st.just(dims), largest=1e15))
    u, eta, _ = limits(subject)
    c, s = exact(table[:, None, : dims // 2]), exact(table[:, None, dims // 2 :])
    for pairing in ("interleaved", "halves"):
        y = subject.apply("rope", x, table, pairing=pairing)
        first, second = pairs(dims, pairing)
        a, b = exact(x[..., first]), exact(x[..., second])
        lost = eta * (abs(a) + abs(b) + abs(c) + abs(s) + 3)
        check(y[..., first], a * c - b * s, 2 * u * (abs(a * c) + abs(b * s)) + lost)
        check(y[..., second], b * c + a * s, 2 * u * (abs(b * c) + abs(a * s)) + lost)
        rest = x[..., dims:].astype(y.dtype)
        assert y[..., dims:].tobytes() == rest.tobytes(), f"elements beyond {dims} have changed"


@holds("OPS-11", "rope", "rope_table")
def turned_products_depend_on_distance_alone(subject: Subject, data: st.DataObject) -> None:
    """One query and its keys, turned at two places in the context."""
    frequencies, pairing = data.draw(FREQUENCIES), data.draw(PAIRINGS)
    dims, rest = 2 * len(frequencies), data.draw(st.integers(0, 3))
    tokens = data.draw(st.integers(2, 9))
    near, far = data.draw(st.lists(st.integers(0, 40_000), min_size=2, max_size=2, unique=True))
    x = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).standard_normal((tokens, dims + rest))
    x = x.astype(np.float32)

    def build(t: Tracer, v: SimpleNamespace) -> Value:
        table = t.rope_table(v.positions, frequencies=frequencies, dims=dims)
        return t.rope(t.split_heads(v.x, heads=1), table, pairing=pairing)

    executable = compiled(subject, build, tokens, x=x)
    y_near, y_far = (exact(executable.run(step(range(tokens), first=at))[:, 0]) for at in (near, far))

    u, _, _ = limits(subject)
    largest_angle = Decimal(max(near, far) + tokens) * Decimal(max(frequencies))
    slip = 3 * u + 2 * u * u + (largest_angle + 4) * (2 * u + 1) * Decimal(2**-53)
    first, second = pairs(dims, pairing)

    def lengths(z: Decimals) -> Decimals:
        return np.concatenate([np.sqrt(z[:, first] ** 2 + z[:, second] ** 2), abs(z[:, dims:])], axis=1)

    before = lengths(exact(x))
    for y in (y_near, y_far):
        check(lengths(y), before, 2 * slip * before)
    check(y_near @ y_near[0], y_far @ y_far[0], 8 * (slip + slip * slip) * (before @ before[0]))


@holds("OPS-12", "gated")
def a_silu_gate_multiplies(subject: Subject, data: st.DataObject) -> None:
    """Against the formula in decimals, for gates of any magnitude."""
    gate, up = data.draw(gates())
    with np.errstate(over="ignore"):
        y = subject.apply("gated", gate, up, activation="silu")
    u, eta, omega = limits(subject)
    g, v = exact(gate), exact(up)
    decay = np.exp(-abs(g))
    expected = np.where(g < 0, g * decay, g) / (1 + decay) * v
    bound = (12 + 4 * abs(g)) * u * abs(expected) + eta * (1 + abs(g)) * (2 + abs(v))
    check(y, expected, bound, where=abs(g * v) < omega / 2)


@holds("OPS-12", "gated")
def a_gelu_gate_multiplies(subject: Subject, data: st.DataObject) -> None:
    """Against the formula in decimals, for gates of any magnitude."""
    gate, up = data.draw(gates())
    with np.errstate(over="ignore"):
        y = subject.apply("gated", gate, up, activation="gelu_tanh")
    u, eta, omega = limits(subject)
    g, v = exact(gate), exact(up)
    z = Decimal("0.7978845608028653558798921198687637") * (g + Decimal("0.044715") * g**3)  # √(2/π)
    tangent = tanh(z)
    steepness = abs(z) * (1 - tangent) * (1 + tangent)
    bound = abs(g * v) / 2 * u * (14 + 12 * steepness) + eta * (1 + abs(g)) * (2 + abs(v))
    check(y, g / 2 * (1 + tangent) * v, bound, where=abs(g * v) < omega / 2)


@holds("OPS-13", "softcap")
def a_soft_cap_is_a_scaled_tangent(subject: Subject, data: st.DataObject) -> None:
    """Against the formula in decimals, and never beyond the cap."""
    x, cap = data.draw(numbers()), data.draw(st.sampled_from([1.0, 15.3, 30.0, 50.0, 0.1]))
    with np.errstate(over="ignore"):
        y = subject.apply("softcap", x, cap=cap)
    u, eta, _ = limits(subject)
    expected = Decimal(cap) * tanh(exact(x) / Decimal(cap))
    check(y, expected, 12 * u * abs(expected) + eta * (2 + Decimal(cap)))
    assert (abs(y) <= subject.policy.activations.type(cap)).all(), "beyond the cap"


# -- What is drawn -----------------------------------------------------------------------------------------

FREQUENCIES = st.builds(
    lambda base, pairs, factor: tuple(base ** (-i / pairs) / factor for i in range(pairs)),
    base=st.sampled_from([10_000.0, 500_000.0, 1e6, 100.0]),
    pairs=st.sampled_from([1, 2, 5, 16]),
    factor=st.sampled_from([1.0, 8.0]),
)
"""Radians per position, of plain and of stretched RoPE."""


@st.composite
def numbers(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = ROWS,
    width: st.SearchStrategy[int] = WIDTHS,
    largest: float = 3e38,
) -> NDArray[np.float32]:
    """Float32 ``[rows, width]``, finite: ordinary, subnormal, tiny and large ones; zeros of either sign."""
    shape = (draw(rows), draw(width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.uniform(-1, 1, shape)
    for size in draw(st.lists(SIZES, max_size=3)):
        x[rng.random(shape) < 0.2] *= min(size, largest)
    for zero in draw(st.lists(st.sampled_from([0.0, -0.0]), max_size=2)):
        x[tuple(rng.integers(0, shape))] = zero
    return np.clip(x, -largest, largest).astype(np.float32)


@st.composite
def gates(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A gate, some of it where the activation bends and where it dies away, and what it gates."""
    gate = draw(numbers())
    bend = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).uniform(-1, 1, gate.shape)
    gate[:, ::2] = (bend * draw(st.sampled_from([1.0, 6.0, 20.0, 110.0])))[:, ::2]
    return gate, draw(numbers(st.just(len(gate)), st.just(gate.shape[1]), largest=1e4))


@st.composite
def rows_and_programs(
    draw: st.DrawFn, tokens: int, largest: float = 30.0
) -> tuple[dict[str, Any], dict[str, Build]]:
    """Operands of ordinary size, and every op with a row per token as a program over them."""
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 16, 33, 64]))
    width, dims = heads * size, 2 * draw(st.integers(1, size // 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def uniform(*shape: int) -> NDArray[np.float32]:
        return rng.uniform(-largest, largest, shape).astype(np.float32)

    pairing = draw(PAIRINGS)
    return {
        "x": uniform(tokens, width),
        "y": uniform(tokens, width),
        "table": uniform(tokens, dims),
        "gain": Weight(uniform(width)),
        "matrix": Weight(uniform(width, width)),
        "bias": Weight(uniform(width)),
    }, {
        "scale": lambda t, v: t.scale(v.x, factor=0.3),
        "add": lambda t, v: t.add(v.x, v.y),
        "rms_norm": lambda t, v: t.rms_norm(v.x, v.gain, eps=1e-5),
        "linear": lambda t, v: t.linear(v.x, v.matrix),
        "linear with bias": lambda t, v: t.linear(v.x, v.matrix, v.bias),
        "rope": lambda t, v: t.rope(t.split_heads(v.x, heads=heads), v.table, pairing=pairing),
        "gated by silu": lambda t, v: t.gated(v.x, v.y, activation="silu"),
        "gated by gelu": lambda t, v: t.gated(v.x, v.y, activation="gelu_tanh"),
        "softcap": lambda t, v: t.softcap(v.x, cap=1.5),
        "take_rows": lambda t, v: t.take_rows(v.x, v.logit_rows),
    }


# -- Programs ----------------------------------------------------------------------------------------------


def started(subject: Subject) -> Subject:
    """The subject, its backend started once for all that follows."""
    backend = subject.start()
    return replace(subject, start=lambda: backend)


def compiled(subject: Subject, build: Build, tokens: int, **operands: NDArray[Any] | Weight) -> Executable:
    """A program over operands, for up to ``tokens`` tokens, whose ids name their rows of an array."""
    tracer, weights = Tracer(), {}
    inputs = symbolic_inputs(tracer, kv_groups=1)
    values = {name: getattr(inputs, name) for name in ("token_ids", "positions", "logit_rows")}
    for name, operand in operands.items():
        if isinstance(operand, Weight):
            weights[name] = operand.tensor(name)
            values[name] = tracer.symbol(name, "weight", weights[name].shape)
        else:
            weights[name] = Weight(operand).tensor(name)
            values[name] = activation(tracer, inputs, name, operand.shape)
    return subject.compile(tracer.finish(build(tracer, SimpleNamespace(**values))), weights, tokens)


def step(ids: Sequence[int], *, first: int = 0, rows: Sequence[int] | None = None) -> StepBatch:
    """A step of one sequence: these token ids, at positions from ``first`` on."""
    tokens = len(ids)
    return replace(
        one_sequence(tokens, rows),
        token_ids=np.array(ids, np.int32),
        positions=np.arange(first, first + tokens, dtype=np.int32),
        context_lens=np.array([first + tokens], np.int32),
        block_tables=(np.zeros((1, first + tokens), np.int32),),
    )


# -- Exact arithmetic --------------------------------------------------------------------------------------


def exact(array: NDArray[Any]) -> Decimals:
    """The same numbers as decimals."""
    decimals: Decimals = np.frompyfunc(lambda number: Decimal(float(number)), 1, 1)(array)
    return decimals


def limits(subject: Subject) -> tuple[Decimal, Decimal, Decimal]:
    """u, η and Ω of the policy's dtype."""
    info = np.finfo(subject.policy.activations)
    return Decimal(subject.unit_roundoff), Decimal(float(info.tiny)), Decimal(float(info.max))


def check(
    result: FloatArray | Decimals, expected: Decimals, bound: Decimals, where: NDArray[np.bool_] | None = None
) -> None:
    """Hold every element, or those at ``where``, against its bound."""
    judged = np.broadcast_to(True if where is None else where.astype(bool), result.shape)
    if result.dtype != object:
        assert np.isfinite(result[judged]).all(), "the expected value is finite, and the result is not"
        result = exact(np.where(judged, result, 0))
    error = (result - expected).astype(np.float64)
    error[~judged] = 0
    check_bound(error, np.zeros_like(error), bound.astype(np.float64))


def is_rounded(subject: Subject, result: FloatArray, op: Callable[..., Any], *operands: NDArray[Any]) -> None:
    """The result is the exact one, rounded; or what CNV-5 allows where numbers are subnormal."""
    dtype = subject.policy.activations

    def flushed(x: NDArray[Any]) -> NDArray[Any]:
        return np.where(abs(x) < np.finfo(dtype).tiny, np.copysign(0, x), x)

    legal = np.zeros(result.shape, bool)
    with np.errstate(all="ignore"):
        for taken in (operands, [flushed(x) for x in operands]):
            y = op(*(x.astype(np.float64) for x in taken)).astype(dtype)
            for value in (y, flushed(y)):
                legal |= (result == value) & (np.signbit(result) == np.signbit(value))
    assert legal.all(), f"{int((~legal).sum())} of {legal.size} elements are not the rounded result"


def tanh(x: Decimals) -> Decimals:
    """The hyperbolic tangent, without cancellation near zero."""

    def one(z: Decimal) -> Decimal:
        if abs(z) < Decimal("1e-8"):
            return z - z**3 / 3
        decay = (-2 * abs(z)).exp()
        return ((1 - decay) / (1 + decay)).copy_sign(z)

    elementwise: Any = np.frompyfunc(one, 1, 1)
    tangents: Decimals = elementwise(x)
    return tangents


def cosine_and_sine(angles: Decimals) -> tuple[Decimals, Decimals]:
    """By their power series at 2⁻²⁰ of the angle, which is then doubled twenty times."""

    def one(angle: Decimal) -> tuple[Decimal, Decimal]:
        with localcontext(prec=60):
            small = angle / 2**20
            terms = [Decimal(1)]
            for n in range(1, 32):
                terms.append(terms[-1] * small / n)
            zero = Decimal(0)
            cosine = sum(terms[0::4], zero) - sum(terms[2::4], zero)
            sine = sum(terms[1::4], zero) - sum(terms[3::4], zero)
            for _ in range(20):
                cosine, sine = cosine * cosine - sine * sine, 2 * cosine * sine
            return cosine, sine

    elementwise: Any = np.frompyfunc(one, 1, 2)
    cosines, sines = elementwise(angles)
    return cosines, sines


def pairs(dims: int, pairing: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The elements that are first, and those that are second, of pair 0, 1, 2 …"""
    pair = np.arange(dims // 2)
    return (2 * pair, 2 * pair + 1) if pairing == "interleaved" else (pair, pair + dims // 2)
