"""Chapter *Operations*: RoPE, its table and its turns."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.program import Tracer, Value
from refengine_conformance.decimals import Decimals, check_decimals, cosine_and_sine, exact, limits
from refengine_conformance.op_operands import PAIRINGS, ROWS, numbers
from refengine_conformance.op_programs import compiled, step
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

FREQUENCIES = st.builds(
    lambda base, pairs, factor: tuple(base ** (-i / pairs) / factor for i in range(pairs)),
    base=st.sampled_from([10_000.0, 500_000.0, 1e6, 100.0]),
    pairs=st.sampled_from([1, 2, 5, 16]),
    factor=st.sampled_from([1.0, 8.0]),
)
"""Radians per position, of plain and of stretched RoPE."""


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
    check_decimals(table[:, : len(frequencies)], Decimal(magnitude) * cosines, bound)
    check_decimals(table[:, len(frequencies) :], Decimal(magnitude) * sines, bound)


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
        check_decimals(y[..., first], a * c - b * s, 2 * u * (abs(a * c) + abs(b * s)) + lost)
        check_decimals(y[..., second], b * c + a * s, 2 * u * (abs(b * c) + abs(a * s)) + lost)
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
        check_decimals(lengths(y), before, 2 * slip * before)
    check_decimals(y_near @ y_near[0], y_far @ y_far[0], 8 * (slip + slip * slip) * (before @ before[0]))


def pairs(dims: int, pairing: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The elements that are first, and those that are second, of pair 0, 1, 2 …"""
    pair = np.arange(dims // 2)
    return (2 * pair, 2 * pair + 1) if pairing == "interleaved" else (pair, pair + dims // 2)
