"""Chapter *Operations*: what holds of every op."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.program import Tracer, Value
from refengine_conformance.op_operands import PAIRINGS, ROWS
from refengine_conformance.op_programs import Build, compiled, started, step
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject, Weight

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
