"""A plan that knows what is fused has no places for what is not written, and gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedRuntime
from stored_matrices import stored_matrix

from refengine.program import MemoryPlan, Program, Tracer, plan_memory, policy, symbolic_inputs
from refengine.quantizer import LazyTensor
from refengine_conformance.subject import Subject, Weight, activation, one_sequence
from refengine_cupy import opened_products, products
from refengine_cupy.backend import CupyBackend
from refengine_cupy.half_products import rounded_bytes

WIDTH, INNER, TOKENS = 256, 320, 150


class Plain(EmulatedRuntime):
    matrix_units = warpgroups = False


class Older(EmulatedRuntime):
    warpgroups = False


DEVICES = {"plain": Plain, "older": Older, "newest": EmulatedRuntime}


def network(name: str) -> tuple[Program, dict[str, LazyTensor]]:
    """Two gated networks with a norm before each, a product between them of what nothing else reads."""
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER), "between": (WIDTH, WIDTH)}
    numbers = np.random.default_rng(4).standard_normal((200, WIDTH)).astype(np.float32)
    tensors = {"x": Weight(numbers).tensor("x"), "norm": Weight(np.ones(WIDTH, np.float32)).tensor("norm")}
    for seed, (role, shape) in enumerate(shapes.items()):
        tensors[role] = Weight(stored_matrix(name, *shape, seed), shape, name).tensor(role)
    tracer = Tracer()
    w = {role: tracer.symbol(role, "weight", tensor.shape) for role, tensor in tensors.items() if role != "x"}
    x = activation(tracer, symbolic_inputs(tracer, kv_groups=1), "x", (200, WIDTH))
    for _ in range(2):
        h = tracer.rms_norm(x, w["norm"], eps=1e-5)
        h = tracer.gated(tracer.linear(h, w["gate"]), tracer.linear(h, w["up"]), activation="silu")
        x = tracer.add(x, tracer.linear(h, w["down"]))
        x = tracer.linear(tracer.softcap(x, cap=30.0), w["between"])
    return tracer.finish(tracer.scale(x, factor=0.5)), tensors


def computed(
    device: str, policy_name: str, name: str, *, fused: bool, steps: Sequence[int] = (1, 3, 70, TOKENS)
) -> tuple[Program, MemoryPlan, list[bytes]]:
    plans: list[MemoryPlan] = []

    def planned(program: Program, *rest: object) -> MemoryPlan:
        plans.append(plan_memory(program, *(rest if fused else rest[:3])))  # type: ignore[arg-type]
        return plans[-1]

    subject = Subject(lambda: CupyBackend(DEVICES[device]()), policy=policy(policy_name), plan=planned)
    traced, tensors = network(name)
    program = subject.in_policy(traced, tensors)
    executable = subject.compile(program, tensors, TOKENS)
    return program, plans[0], [executable.run(one_sequence(tokens)).tobytes() for tokens in steps]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy_name", ["mixed16", "mixed8"])
def test_the_plan_changes_no_bit(device: str, policy_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do gates that are computed for some tokens after others, or weights opened over what was rounded."""
    monkeypatch.setattr(products, "GATED_TOKENS", 64)
    _, apart, expected = computed(device, policy_name, "q4_0", fused=False)
    _, plan, found = computed(device, policy_name, "q4_0", fused=True)
    assert found == expected
    assert plan.arena_bytes < apart.arena_bytes
    if (device, policy_name) == ("newest", "mixed16"):
        monkeypatch.setattr(opened_products, "LEAST_OPENED", 129)
        _, opened, found = computed(device, policy_name, "q4_0", fused=True)
        assert found == expected
        assert opened.arena_bytes > plan.arena_bytes


@pytest.mark.parametrize(
    ("device", "policy_name", "alone"),
    [
        ("newest", "mixed16", True),
        ("older", "mixed16", False),  # its tiles write what is gated then
        ("plain", "mixed16", True),
        ("newest", "mixed8", True),
        ("plain", "mixed8", True),
    ],
)
def test_what_is_not_written_has_no_place(device: str, policy_name: str, alone: bool) -> None:
    program, plan, _ = computed(device, policy_name, "q4_0", fused=True, steps=())
    gates = [i.operands for i in program if i.op.name == "gated"]
    assert {v.index in plan.placements for pair in gates for v in pair if v is not None} == {not alone}
    sums = [i.operands[1] for i in program if i.op.name == "add"]
    assert not any(v is not None and v.index in plan.placements for v in sums)


def test_opened_weights_lie_over_what_was_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product's activations that nothing reads again make room: its workspace has none for weights."""
    monkeypatch.setattr(opened_products, "LEAST_OPENED", 129)
    program, plan, _ = computed("newest", "mixed16", "q4_0", fused=True, steps=())
    found = {program.instructions[f.last].op.name: f.workspace for f in plan.fusions}
    assert found["linear_a16"] == rounded_bytes(TOKENS, WIDTH)
    assert found["gated"] > rounded_bytes(TOKENS, WIDTH) + 2 * INNER * WIDTH * 2
