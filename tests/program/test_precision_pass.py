"""The precision pass: which products are computed otherwise, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine.models import Model
from refengine.ops import OPS
from refengine.program import POLICIES, Program, Tracer, Value, apply_policy, plan_memory
from refengine.program.plan import golden_workspace
from refengine.quantizer import ENCODINGS

CODED = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"} | {
    f"int{bits}_g{group}" for bits in (4, 8) for group in (32, 64, 128)
}


def products(columns: int = 512) -> Program:
    """Three products of one activation and one of another, with weights ``a`` to ``d``; ``b`` has a bias."""
    tracer = Tracer()
    shapes = {"a": (8, columns), "b": (columns, columns), "c": (columns, columns), "d": (9, columns)}
    w = {name: tracer.symbol(f"layers.3.{name}", "weight", shape) for name, shape in shapes.items()}
    table = tracer.symbol("table", "weight", (50, columns))
    x = tracer.embedding(tracer.symbol("token_ids", "input", ("T",)), table)
    bias = tracer.symbol("layers.3.bias", "weight", (columns,))
    tracer.linear(x, w["a"])
    h = tracer.add(tracer.linear(x, w["b"], bias), tracer.linear(x, w["c"]))
    return tracer.finish(tracer.linear(tracer.scale(h, factor=2.0), w["d"]))


def encodings(name: str, **others: str) -> dict[str, str]:
    return {f"layers.3.{w}": others.get(w, name) for w in "abcd"} | {"table": name}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_products_of_stored_integers_are_coded(encoding: str) -> None:
    """Those of these encodings; codes are made once, right before the first product that reads them."""
    program = apply_policy(products(), POLICIES["mixed8"], encodings(encoding))
    names = [i.op.name for i in program]
    if encoding in CODED:
        assert names == [
            "embedding", "quantize_a8", "linear_a8", "linear_a8", "linear_a8",
            "add", "scale", "quantize_a8", "linear_a8",
        ]  # fmt: skip
        codes = [i.operands[0] for i in program if i.op.name == "linear_a8"]
        assert len({v.index for v in codes if v is not None}) == 2
        assert all(v is not None and v.shape == ("T", 16, 48) and v.dtype == np.uint8 for v in codes)
        assert len(program.instructions[3].operands) == 3
    else:
        assert names == [i.op.name for i in products()]


def test_weights_of_other_encodings_keep_their_products() -> None:
    """Beside coded ones, in one program."""
    program = apply_policy(products(), POLICIES["mixed8"], encodings("q4_0", b="bf16", d="q2_k"))
    names = [i.op.name for i in program if "linear" in i.op.name]
    assert names == ["linear_a8", "linear", "linear_a8", "linear"]
    assert sum(i.op.name == "quantize_a8" for i in program) == 1


def test_products_of_rows_that_are_no_whole_groups_stay() -> None:
    """An encoding with blocks of 32 has none, but the pass does not rely on it."""
    program = apply_policy(products(columns=40), POLICIES["mixed8"], encodings("q8_0"))
    assert "linear_a8" not in program.op_counts


@pytest.mark.parametrize("name", POLICIES)
def test_all_else_stays_as_it_is(model: Model, name: str) -> None:
    """Ops, shapes, attributes and layers, in their order; and each value is defined once, before it is read."""
    coded = {role: "q8_0" if role.endswith("q") else "q4_k" for role in model.weights}
    program = apply_policy(model.program, POLICIES[name], coded)
    kept = [i for i in program if i.op.name != "quantize_a8"]
    assert len(kept) == len(model.program)
    for new, old in zip(kept, model.program, strict=True):
        assert new.op.name in (old.op.name, f"{old.op.name}_a8", f"{old.op.name}_a16")
        assert (new.attributes, new.layer, new.result.shape) == (old.attributes, old.layer, old.result.shape)
        for a, b in zip(new.operands, old.operands, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or a.kind != "weight" or a.name == b.name
    defined: dict[int, Value] = {}
    for instruction in program:
        for value in instruction.operands:
            if value is not None and value.kind == "result":
                assert defined[value.index] is value
        assert instruction.result.index not in defined
        defined[instruction.result.index] = instruction.result
    leaves = {v.index for v in program.leaves}
    assert not leaves & defined.keys()
    assert len({v.name for v in program.leaves}) == len(leaves)
    assert defined[program.output.index] is program.output
    assert (program is model.program) == (POLICIES[name].products == "plain")


def test_float16_products_are_all() -> None:
    """Whatever the encoding."""
    program = apply_policy(products(), POLICIES["mixed16"], encodings("f32", a="q4_k"))
    assert {i.op.name for i in program if "linear" in i.op.name} == {"linear_a16"}


def test_codes_have_a_place_of_their_own_size() -> None:
    """48 bytes per 32 activations, whatever the dtype of the others; and that is what the op's results have."""
    program = apply_policy(products(), POLICIES["mixed8"], encodings("q8_0"))
    policy = POLICIES["mixed8"]
    plan = plan_memory(program, policy, {"T": 7}, lambda i, s: golden_workspace(i, s, policy))
    sizes = {
        i.op.name: plan.placements[i.result.index].nbytes for i in program if i.result is not program.output
    }
    assert sizes["quantize_a8"] == 7 * 16 * 48
    assert sizes["embedding"] == 7 * 512 * 4
    assert OPS["quantize_a8"].golden(np.zeros((7, 512), np.float32)).nbytes == 7 * 16 * 48
