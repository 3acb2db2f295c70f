"""Products of codes have the golden op's bits, whichever kernel computes them."""

from __future__ import annotations

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedBackend, EmulatedRuntime
from stored_matrices import stored_matrix

from refengine.backend import load
from refengine.program import POLICIES, MemoryPlan, Program, Tracer, plan_memory, symbolic_inputs
from refengine_conformance.subject import Subject, Weight, activation, one_sequence
from refengine_cupy.backend import CupyBackend
from refengine_cupy.packing import LAYOUTS

MIXED8 = POLICIES["mixed8"]


def activations(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, columns])
    sizes = np.exp(3 * rng.standard_normal((200, 1)))
    return (rng.standard_normal((200, columns)) * sizes).astype(np.float32)[:tokens]


def matrix(name: str, rows: int, columns: int, seed: int = 0) -> Weight:
    return Weight(stored_matrix(name, rows, columns, seed), (rows, columns), name)


def product(start, x: np.ndarray, weight: Weight, bias: np.ndarray | None = None) -> np.ndarray:
    subject, tracer = Subject(start, policy=MIXED8), Tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    codes = tracer.quantize_a8(activation(tracer, inputs, "x", x.shape))
    weights = {"x": Weight(x).tensor("x"), "w": weight.tensor("w")}
    operands = [codes, tracer.symbol("w", "weight", weight.shape)]
    if bias is not None:
        weights["b"] = Weight(bias).tensor("b")
        operands.append(tracer.symbol("b", "weight", bias.shape))
    program = tracer.finish(tracer.linear_a8(*operands))
    return subject.compile(program, weights, len(x)).run(one_sequence(len(x)))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 6, 40, 140])
def test_products_have_the_golden_bits(name: str, tokens: int) -> None:
    """One row by one, a few together, and tiles of three sizes, with rows and groups that fill none of them."""
    x, weight = activations(tokens, 1280), matrix(name, 83, 1280)
    bias = activations(1, 83, seed=1)[0]
    ours, golden = (product(start, x, weight, bias) for start in (EmulatedBackend, lambda: load("numpy")))
    assert ours.tobytes() == golden.tobytes()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["q4_0", "int4_g32", "int8_g64"])
def test_long_rows_are_added_in_order_across_stretches(name: str, tokens: int) -> None:
    """More groups than are multiplied between two barriers, and not a multiple of four."""
    columns = 32 * (330 if name == "int8_g64" else 331)
    x, weight = activations(tokens, columns), matrix(name, 17, columns)
    ours, golden = (product(start, x, weight) for start in (EmulatedBackend, lambda: load("numpy")))
    assert ours.tobytes() == golden.tobytes()


def block(tracer: Tracer, x, gate, up, down, activation: str):
    codes = tracer.quantize_a8(x)
    h = tracer.gated(tracer.linear_a8(codes, gate), tracer.linear_a8(codes, up), activation=activation)
    return tracer.add(x, tracer.linear_a8(tracer.quantize_a8(h), down))


@pytest.mark.parametrize("activation_name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q6_k", "int4_g128", "int8_g32"])
def test_a_fused_block_gives_a_row_the_same_bits_in_any_company(name: str, activation_name: str) -> None:
    """Gate, up, activation, codes, down and residual: fused for one row, in part for several, by tiles for many."""
    runtimes = []

    def start() -> CupyBackend:
        runtimes.append(EmulatedRuntime())
        return CupyBackend(runtimes[-1])

    weights = {
        "gate": matrix(name, 256, 256, 1),
        "up": matrix(name, 256, 256, 2),
        "down": matrix(name, 256, 256, 3),
    }
    found = {}
    for tokens in (1, 4, 20):
        x, tracer = activations(tokens, 256), Tracer()
        inputs = symbolic_inputs(tracer, kv_groups=1)
        value = activation(tracer, inputs, "x", x.shape)
        symbols = [tracer.symbol(role, "weight", (256, 256)) for role in weights]
        # twice, so that x lives on as in a model
        y = block(tracer, block(tracer, value, *symbols, activation_name), *symbols, activation_name)
        tensors = {role: weight.tensor(role) for role, weight in weights.items()} | {
            "x": Weight(x).tensor("x")
        }
        subject = Subject(start, policy=MIXED8)
        found[tokens] = subject.compile(tracer.finish(y), tensors, tokens).run(one_sequence(tokens))
    fused = [name for name in runtimes[0].launched if "quantize" in name]
    assert len(fused) < len([name for name in runtimes[1].launched if "quantize" in name])
    assert np.isfinite(found[1]).all()
    assert found[1].tobytes() == found[4][:1].tobytes() == found[20][:1].tobytes()
    assert found[4].tobytes() == found[20][:4].tobytes()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "columns", "from_row"),
    [
        ("q4_0", 256, False),
        ("q4_0", 608, True),
        ("q4_1", 8192, True),
        ("q8_0", 4640, True),
        ("q6_k", 8448, False),
    ],
)
def test_a_token_s_row_is_normed_by_the_products_that_read_it(
    name: str, columns: int, from_row: bool, fused: bool
) -> None:
    """With the bits of the norm's own kernel, which runs for several tokens; also where plans know of no fusions."""
    runtimes, found = [], {}

    def start() -> CupyBackend:
        runtimes.append(EmulatedRuntime())
        return CupyBackend(runtimes[-1])

    def planned(program: Program, *rest: object) -> MemoryPlan:
        return plan_memory(program, *(rest if fused else rest[:3]))  # type: ignore[arg-type]

    inner = 256 if name == "q6_k" else 64
    shapes = {
        "gate": (inner, columns),
        "up": (inner, columns),
        "down": (columns, inner),
        "last": (48, columns),
    }
    stored = {role: matrix(name, *shape, seed) for seed, (role, shape) in enumerate(shapes.items())}
    for tokens in (1, 3, 70):
        x, tracer = activations(tokens, columns), Tracer()
        value = activation(tracer, symbolic_inputs(tracer, kv_groups=1), "x", x.shape)
        scale = tracer.symbol("scale", "weight", (columns,))
        gate, up, down, last = (tracer.symbol(role, "weight", shape) for role, shape in shapes.items())
        h = tracer.rms_norm(value, scale, eps=1e-5)
        h = tracer.gated(tracer.linear(h, gate), tracer.linear(h, up), activation="silu")
        h = tracer.add(value, tracer.linear(h, down))
        y = tracer.linear(tracer.rms_norm(h, scale, eps=1e-5), last)
        numbers = np.linspace(1, 2, columns).astype(np.float32)
        tensors = {role: weight.tensor(role) for role, weight in stored.items()}
        tensors |= {"x": Weight(x).tensor("x"), "scale": Weight(numbers).tensor("scale")}
        subject = Subject(start, policy=MIXED8, plan=planned)
        program = subject.in_policy(tracer.finish(y), tensors)
        found[tokens] = subject.compile(program, tensors, tokens).run(one_sequence(tokens))
    norms = [[n for n in runtime.launched if n.startswith("norm")] for runtime in runtimes]
    assert [len(launched) for launched in norms] == [0 if from_row else 2, 2, 2]
    assert np.isfinite(found[70]).all()
    assert found[1].tobytes() == found[3][:1].tobytes()
    assert found[3].tobytes() == found[70][:3].tobytes()


@pytest.mark.parametrize("fused", [True, False])
def test_no_product_norms_a_row_that_its_result_lies_over(fused: bool) -> None:
    """Other blocks may read the row still: where a plan knows of no fusions, it gives the row's place away."""
    runtime, plans = EmulatedRuntime(), []

    def planned(program: Program, *rest: object) -> MemoryPlan:
        plans.append(plan_memory(program, *(rest if fused else rest[:3])))  # type: ignore[arg-type]
        return plans[-1]

    x, weight, tracer = activations(1, 1280), matrix("q4_0", 1280, 1280), Tracer()
    value = activation(tracer, symbolic_inputs(tracer, kv_groups=1), "x", x.shape)
    h = tracer.rms_norm(value, tracer.symbol("scale", "weight", (1280,)), eps=1e-5)
    y = tracer.scale(tracer.linear(h, tracer.symbol("w", "weight", weight.shape)), factor=0.5)
    tensors = {"x": Weight(x).tensor("x"), "scale": Weight(np.ones(1280, np.float32)).tensor("scale")}
    tensors["w"] = weight.tensor("w")
    subject = Subject(lambda: CupyBackend(runtime), policy=MIXED8, plan=planned)
    program = subject.in_policy(tracer.finish(y), tensors)
    subject.compile(program, tensors, 1).run(one_sequence(1))
    places = {i.op.name: plans[0].placements.get(i.result.index) for i in program}
    row, result = places["embedding"], places["linear_a8"]
    assert row is not None
    assert result is not None
    over = row.offset < result.offset + result.nbytes and result.offset < row.offset + row.nbytes
    assert over != fused
    assert ("norm_8192" in runtime.launched) == over
