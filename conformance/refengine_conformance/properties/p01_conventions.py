"""Chapter *Conventions*."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.backend import plan_activations
from refengine.errors import UnsupportedError
from refengine.ops import OPS
from refengine.program import Program, Tracer, symbolic_inputs
from refengine.quantizer import LazyTensor
from refengine_conformance.bits import check_bits
from refengine_conformance.bounds import check_bound
from refengine_conformance.registry import holds
from refengine_conformance.strategies import activations
from refengine_conformance.subject import Input, Subject, Weight, activation, one_sequence

NUMBERS = st.builds(math.ldexp, st.integers(-(2**24), 2**24), st.integers(-40, 20)) | st.just(-0.0)
"""Numbers of float32 whose sums, and whose products with an ordinary factor, are far from subnormal."""


def matrix(
    data: st.DataObject, numbers: st.SearchStrategy[float], rows: int, width: int
) -> NDArray[np.float32]:
    """Float32 ``[rows, width]``."""
    drawn = data.draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))
    return np.array(drawn, np.float32).reshape(rows, width)


def nearest(exact: Fraction, dtype: np.dtype[Any]) -> float:
    """The nearest number of a dtype; of two, the one whose last bit is zero. For values of ordinary size."""
    guess = dtype.type(float(exact))
    candidates = [
        guess,
        np.nextafter(guess, dtype.type(-math.inf)),
        np.nextafter(guess, dtype.type(math.inf)),
    ]
    return float(
        min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(f"u{c.itemsize}")) & 1))
    )


@holds("CNV-1", "embedding", "take_rows")
def moved_numbers_keep_their_bits(subject: Subject, data: st.DataObject) -> None:
    """Zeros of either sign, subnormal and largest numbers arrive as they were, under every policy."""
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    x = matrix(data, st.floats(width=32, allow_nan=False, allow_infinity=False), rows, width)
    expected = x.astype(subject.policy.activations)
    check_bits(subject.apply("embedding", Input("token_ids"), Weight(x)), expected)
    taken = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
    check_bits(subject.apply("take_rows", x, Input("logit_rows"), rows=taken), expected[taken])


@holds("CNV-2", "add", "scale")
def sums_and_products_are_rounded_once(subject: Subject, data: st.DataObject) -> None:
    """Against rational arithmetic; some sums lie half-way between two numbers, or next to that."""
    dtype, u = subject.policy.activations, subject.unit_roundoff
    x, y = (matrix(data, NUMBERS, 2, 4) for _ in "xy")
    half_way = data.draw(st.sampled_from([1, 3, 5, 7]))  # 1 + 3u lies half-way between 1 + 2u and 1 + 4u
    x[0, 0], y[0, 0] = 1, u * (half_way + data.draw(st.sampled_from([0, 2**-20, -(2**-20)])))
    factor = data.draw(st.sampled_from([0.1, 3.0, -1 / 3, 2.0**-10, 1e5]))
    total, scaled = subject.apply("add", x, y), subject.apply("scale", x, factor=factor)
    held = Fraction(float(dtype.type(factor)))
    for a, b, s, p in zip(x.flat, y.flat, total.flat, scaled.flat, strict=True):
        assert s == nearest(Fraction(float(a)) + Fraction(float(b)), dtype), f"{a!r} + {b!r} = {s!r}"
        assert p == nearest(Fraction(float(a)) * held, dtype), f"{a!r} · {factor!r} = {p!r}"


@holds("CNV-3", "add", "scale")
def rounded_results_are_within_half_an_ulp(subject: Subject, data: st.DataObject) -> None:
    """With the ulp of the exact value, a power of two by its definition."""
    info = np.finfo(subject.policy.activations)
    factor = data.draw(st.sampled_from([0.7, 3.0, -1e-3]))
    x, y = (matrix(data, NUMBERS, 2, 4) for _ in "xy")
    total, scaled = subject.apply("add", x, y), subject.apply("scale", x, factor=factor)
    held = Fraction(float(info.dtype.type(factor)))
    for a, b, s, p in zip(x.flat, y.flat, total.flat, scaled.flat, strict=True):
        for result, exact in ((s, Fraction(float(a)) + Fraction(float(b))), (p, Fraction(float(a)) * held)):
            exponent = (
                math.frexp(float(abs(exact)))[1] - 1 if exact else info.minexp
            )  # 2^e ≤ |exact| < 2^(e+1)
            exponent -= abs(exact) < Fraction(2) ** exponent  # where float() rounded up to a power of two
            ulp = Fraction(2) ** (max(exponent, int(info.minexp)) - info.nmant)
            assert abs(Fraction(float(result)) - exact) <= ulp / 2, f"{result!r} is not {float(exact)!r}"


@holds("CNV-4", "linear")
def sums_keep_the_bound_of_their_operands(subject: Subject, data: st.DataObject) -> None:
    """Products are exact in float64, and ``fsum`` rounds products + bias - y once: that is the error."""
    x = data.draw(activations(rows=st.integers(1, 9)))
    inner = x.shape[1]
    weight = data.draw(activations(rows=st.integers(1, 5), width=st.just(inner)))
    bias = data.draw(st.none() | activations(rows=st.just(1), width=st.just(len(weight))).map(lambda b: b[0]))
    y = subject.apply("linear", x, Weight(weight), None if bias is None else Weight(bias))
    offsets = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
    products = x[:, None, :].astype(np.float64) * weight
    terms = np.concatenate([products, np.broadcast_to(offsets[:, None], (*y.shape, 1))], axis=-1)
    error = [
        [math.fsum([*t, -result]) for t, result in zip(*row, strict=True)]
        for row in zip(terms.tolist(), y.tolist(), strict=True)
    ]
    check_bound(error, np.zeros(y.shape), (inner + 1) * subject.unit_roundoff * np.abs(terms).sum(axis=-1))


@holds("CNV-5", "scale")
def only_subnormal_numbers_may_be_flushed(subject: Subject, data: st.DataObject) -> None:
    """Products near the smallest normal number are exact, or zero of the same sign where CNV-5 allows it."""
    dtype = subject.policy.activations
    smallest = float(np.finfo(dtype).smallest_normal)
    x = matrix(data, st.integers(-64, 64).map(lambda n: n / 16), 2, 4)
    normal = (
        np.array(data.draw(st.sampled_from([4.0, 1.0, 0.25]))) * smallest
    )  # a factor, itself normal or not
    y = subject.apply("scale", x, factor=float(normal))
    for a, result in zip(x.astype(np.float64).flat, y.flat, strict=True):
        exact = float(a) * float(normal)  # of 7 bits, far above the least subnormal number
        legal = {exact, 0.0} if abs(exact) < smallest or normal < smallest else {exact}
        assert float(result) in legal, f"{result!r}, expected one of {legal}"
        assert np.signbit(result) == np.signbit(exact), f"{result!r} has lost its sign"


@holds("CNV-6", "add")
def addition_commutes(subject: Subject, data: st.DataObject) -> None:
    """x + y is y + x, bit by bit."""
    x, y = (matrix(data, NUMBERS, 2, 5) for _ in "xy")
    check_bits(subject.apply("add", x, y), subject.apply("add", y, x))


@holds("CNV-7", "add")
def one_plus_u_is_one(subject: Subject, data: st.DataObject) -> None:
    """At every power of two 2^e: u·2^e is lost, and the least that is more than it counts as 2·u·2^e."""
    u = {"float32": 2.0**-24, "float64": 2.0**-53}[subject.policy.name]
    one = 2.0 ** data.draw(st.integers(-20, 20))
    ones, steps = np.full((1, 2), one, np.float32), np.array([[u, u * (1 + 2**-23)]]) * one
    assert subject.apply("add", ones, steps).tolist() == [[one, one + 2 * u * one]]
    assert subject.unit_roundoff == u


@holds("CNV-8", "add", "scale", "linear", "rms_norm")
def results_have_the_dtype_of_the_policy(subject: Subject, data: st.DataObject) -> None:
    """Nothing is promoted, whatever is applied."""
    x = data.draw(activations(rows=st.integers(1, 3)))
    weight = Weight(np.ones((2, x.shape[1]), np.float32))
    name = data.draw(st.sampled_from(["add", "scale", "linear", "rms_norm"]))
    result = {
        "add": lambda: subject.apply("add", x, x),
        "scale": lambda: subject.apply("scale", x, factor=0.1),
        "linear": lambda: subject.apply("linear", x, weight),
        "rms_norm": lambda: subject.apply("rms_norm", x, Weight(weight.array[0]), eps=1e-6),
    }[name]()
    assert result.dtype == subject.policy.activations, f"{name} gives {result.dtype}"


@holds("CNV-8", "add", "scale")
def values_are_rounded_between_instructions(subject: Subject, data: st.DataObject) -> None:
    """(x · f) + y in one program: the product is rounded before the sum is, unlike in a fused operation."""
    dtype = subject.policy.activations
    factor = data.draw(st.sampled_from([0.1, 1 / 3, 3.0]))
    held = dtype.type(factor)
    x = matrix(data, st.floats(1, 2**20, width=32), 2, 3)
    products = [nearest(Fraction(float(a)) * Fraction(float(held)), dtype) for a in x.flat]
    y = (
        -np.array(products).astype(np.float32).reshape(x.shape)
    )  # most of the product cancels; its rounding stays
    tracer = Tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    left, right = (activation(tracer, inputs, name, x.shape) for name in "xy")
    program = tracer.finish(tracer.add(tracer.scale(left, factor=factor), right))
    weights = {name: Weight(array).tensor(name) for name, array in (("x", x), ("y", y))}
    result = subject.compile(program, weights, len(x)).run(one_sequence(len(x)))
    for product, b, r in zip(products, y.flat, result.flat, strict=True):
        expected = nearest(Fraction(product) + Fraction(float(b)), dtype)
        assert r == expected, f"{product!r} + {b!r} = {r!r}, expected {expected!r}"


@holds("CNV-9", "linear")
def sums_of_integers_are_exact(subject: Subject, data: st.DataObject) -> None:
    """Products of integers whose magnitudes add up to no more than 1/u."""
    inner = data.draw(st.sampled_from([1, 2, 7, 32, 33, 100]))
    most = min(math.isqrt(int(1 / subject.unit_roundoff) // inner), 2**24)  # float32 has the integers to 2^24
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    lowest = data.draw(st.sampled_from([-most, most // 2]))  # of either sign, or adding up
    x, weight = (rng.integers(lowest, most + 1, (rows, inner)) for rows in (3, 4))
    y = subject.apply("linear", x.astype(np.float32), Weight(weight.astype(np.float32)))
    expected = x @ weight.T  # int64: no more than 2^53
    assert (y == expected).all(), f"{y.tolist()}, expected {expected.tolist()}"


@holds("CNV-10", "embedding", "linear")
def weights_are_float32_numbers(subject: Subject, data: st.DataObject) -> None:
    """Q4_1 weights whose d · q + m has more digits than float32, looked up and multiplied by one."""
    d, m = data.draw(st.floats(2**-7, 1, width=16)), data.draw(st.floats(32768, 65504, width=16))
    low = data.draw(st.lists(st.integers(0, 15), min_size=16, max_size=16))
    block = struct.pack("<ee16B", d, m, *low)
    table = Weight(np.frombuffer(block * 2, np.uint8).reshape(2, 20), (2, 32), "q4_1")
    row = np.array([d * q + m for q in low] + [m] * 16).astype(np.float32)
    expected = np.stack([row, row]).astype(subject.policy.activations)
    check_bits(subject.apply("embedding", Input("token_ids"), table), expected)
    assert np.array_equal(subject.apply("linear", np.eye(32, dtype=np.float32), table), expected.T)


@holds("CNV-11", "backend")
def support_is_kept_and_refusals_have_reasons(subject: Subject, data: st.DataObject) -> None:
    """What is supported runs; what is not, or does not exist, has a reason, and is refused in a program."""
    backend, policy = subject.start(), subject.policy.name
    unknown = data.draw(st.text("abcdefgh_", min_size=1, max_size=12).filter(lambda name: name not in OPS))
    for op, held in ((unknown, policy), ("add", f"{policy}_{unknown}")):
        assert backend.support(op, encoding=None, policy=held), f"no reason why {op!r} lacks {held!r}"
    x, ones = np.ones((2, 4), np.float32), Weight(np.ones(4, np.float32))
    calls: dict[str, tuple[list[Any], dict[str, Any], str | None]] = {
        "add": ([x, x], {}, None),
        "scale": ([x], {"factor": 2.0}, None),
        "linear": ([x, Weight(np.eye(4, dtype=np.float32))], {}, "f32"),
        "rms_norm": ([x, ones], {"eps": 1e-6}, "f32"),
    }
    op = data.draw(st.sampled_from(sorted(calls)))
    operands, attributes, encoding = calls[op]
    used = (("embedding", "f32"), (op, encoding))  # the first brings x in
    reasons = [r for name, held in used if (r := backend.support(name, encoding=held, policy=policy))]
    try:
        result = replace(subject, fallback=False).apply(op, *operands, **attributes)
    except UnsupportedError:
        assert reasons, f"{op} was said to be supported, and is refused"
    else:
        assert not reasons, f"{op} ran, in spite of this: {reasons}"
        assert np.isfinite(result).all()


@holds("CNV-12", "linear", "rms_norm", level="L2")
def the_same_step_gives_the_same_bits(subject: Subject, data: st.DataObject) -> None:
    """Twice on one executable, on another one, and after a new start."""
    program, weights, tokens = norm_and_projection(data)
    executable, batch = subject.compile(program, weights, tokens), one_sequence(tokens)
    first = executable.run(batch)
    for again in (executable, subject.compile(program, weights, tokens)):
        check_bits(again.run(batch), first)


@holds("CNV-13", "linear", "rms_norm", level="L3")
def a_row_has_the_bits_it_would_have_alone(subject: Subject, data: st.DataObject) -> None:
    """Some of the tokens, in another order and number, have the rows they had among all."""
    program, weights, tokens = norm_and_projection(data)
    together = subject.compile(program, weights, tokens).run(one_sequence(tokens))
    some = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens))
    batch = replace(one_sequence(len(some)), token_ids=np.array(some, np.int32))
    check_bits(subject.compile(program, weights, len(some)).run(batch), together[some])


@holds("CNV-14", "backend", "memory_plan", level="M")
def memory_stays_within_the_plan(subject: Subject, data: st.DataObject) -> None:
    """Before the first step and after each, of any size up to the planned one."""
    program, weights, tokens = norm_and_projection(data)
    backend = subject.start()
    executable = replace(subject, start=lambda: backend).compile(program, weights, tokens)
    sizes = {"T": tokens, "S": tokens, "R": tokens}
    plan = plan_activations(backend, program, subject.policy, sizes, weights, subject.plan)
    planned = plan.arena_bytes
    compiled = backend.memory()
    for size in (tokens, data.draw(st.integers(1, tokens)), tokens):
        executable.run(one_sequence(size))
        held = backend.memory()
        assert held.arena <= planned, f"{held.arena} bytes of arena are held, and {planned} were planned"
        assert (held.arena, held.kv_cache) == (compiled.arena, compiled.kv_cache), "a step has changed them"
        assert held.kv_cache == 0, "there is no layer that caches anything"


def norm_and_projection(data: st.DataObject) -> tuple[Program, dict[str, LazyTensor], int]:
    """linear(rms_norm(x)): a Program, its weights, and how many tokens it has."""
    x = data.draw(activations())
    weights = {
        "x": x,
        "norm": data.draw(activations(rows=st.just(1), width=st.just(x.shape[1])))[0],
        "projection": data.draw(activations(rows=st.sampled_from([1, 5, 16]), width=st.just(x.shape[1]))),
    }
    tracer = Tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    norm, projection = (tracer.symbol(n, "weight", weights[n].shape) for n in ("norm", "projection"))
    hidden = tracer.rms_norm(activation(tracer, inputs, "x", x.shape), norm, eps=1e-5)
    program = tracer.finish(tracer.linear(hidden, projection, None))
    return program, {name: Weight(array).tensor(name) for name, array in weights.items()}, len(x)
