"""Chapter *Operations*: the value that each op gives; RoPE is in `p04_rope`.

Expected values are decimal numbers of 28 digits and more, so that they are exact beside the results of every
policy, and results are held against the clauses' own bounds, with nothing added for the expectation's sake.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.ops import FloatArray
from refengine.program import Tracer, Value
from refengine_conformance.decimals import check_decimals, exact, limits, tanh
from refengine_conformance.op_operands import ROWS, WIDTHS, numbers
from refengine_conformance.op_programs import compiled, started, step
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject, Weight


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
        check_decimals(y, expected[rows], bound[rows], where=judged[rows])


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
    check_decimals(y, expected, (Decimal(width) / 2 + 12) * u * abs(expected) + eta * lost, where=~zeroed)


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
    check_decimals(y, expected, bound, where=abs(g * v) < omega / 2)


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
    check_decimals(y, g / 2 * (1 + tangent) * v, bound, where=abs(g * v) < omega / 2)


@holds("OPS-13", "softcap")
def a_soft_cap_is_a_scaled_tangent(subject: Subject, data: st.DataObject) -> None:
    """Against the formula in decimals, and never beyond the cap."""
    x, cap = data.draw(numbers()), data.draw(st.sampled_from([1.0, 15.3, 30.0, 50.0, 0.1]))
    with np.errstate(over="ignore"):
        y = subject.apply("softcap", x, cap=cap)
    u, eta, _ = limits(subject)
    expected = Decimal(cap) * tanh(exact(x) / Decimal(cap))
    check_decimals(y, expected, 12 * u * abs(expected) + eta * (2 + Decimal(cap)))
    assert (abs(y) <= subject.policy.activations.type(cap)).all(), "beyond the cap"


@st.composite
def gates(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A gate, some of it where the activation bends and where it dies away, and what it gates."""
    gate = draw(numbers())
    bend = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).uniform(-1, 1, gate.shape)
    gate[:, ::2] = (bend * draw(st.sampled_from([1.0, 6.0, 20.0, 110.0])))[:, ::2]
    return gate, draw(numbers(st.just(len(gate)), st.just(gate.shape[1]), largest=1e4))


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
