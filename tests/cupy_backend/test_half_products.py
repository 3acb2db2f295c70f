"""Products of float16 numbers: their operands, their bound, and bits that no company changes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedBackend, EmulatedRuntime
from stored_matrices import stored_matrix

from refengine.program import POLICIES, Tracer, symbolic_inputs
from refengine.quantizer import decode
from refengine_conformance.bounds import check_bound
from refengine_conformance.subject import Subject, Weight, activation, one_sequence
from refengine_cupy import opened_products
from refengine_cupy.backend import CupyBackend
from refengine_cupy.half_products import STAGES, TILES, few_bytes, group_bytes, many_bytes, one_bytes
from refengine_cupy.packing import LAYOUTS, PLAIN
from refengine_cupy.source import text_of

MIXED16 = POLICIES["mixed16"]
TOKENS = (1, 8, 30, 64, 150)
"""Of every version one, with rows and tokens that fill no tile."""

U = 2.0**-24


class OlderRuntime(EmulatedRuntime):
    """A device whose warps use matrix units each by itself."""

    warpgroups = False


def activations(tokens: int, columns: int) -> np.ndarray:
    """The first rows of always the same ones; some of them too large for float16."""
    rng = np.random.default_rng(columns)
    sizes = np.exp(4 * rng.standard_normal((200, 1)))
    return (rng.standard_normal((200, columns)) * sizes * 40).astype(np.float32)[:tokens]


def matrix(name: str, rows: int, columns: int, seed: int = 0) -> Weight:
    return Weight(stored_matrix(name, rows, columns, seed), (rows, columns), name)


def product(x: np.ndarray, weight: Weight, *bias: Weight) -> np.ndarray:
    return Subject(EmulatedBackend, policy=MIXED16).apply("linear", x, weight, *bias)


def halves(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float16).astype(np.float64)


def decoded(weight: Weight) -> np.ndarray:
    return decode(weight.encoding, weight.array).reshape(weight.shape)


@pytest.mark.parametrize("name", [*LAYOUTS, *PLAIN])
def test_weights_are_their_decoded_values_rounded_once(name: str) -> None:
    """Read off by multiplying with rows that hold a single 1: row by row and by tiles."""
    weight = matrix(name, 40, 256)
    expected = halves(decoded(weight)).T
    assert np.array_equal(product(np.eye(256, dtype=np.float32), weight), expected)
    few = np.eye(256, dtype=np.float32)[5::37]
    assert np.array_equal(product(few, weight), expected[5::37])


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "q6_k", "f16", "f32"])
def test_results_keep_their_bound_and_a_row_its_bits(name: str) -> None:
    columns = 1280 if name != "f16" else 1283  # of which rows lie nowhere in particular
    x, weight = activations(150, columns), matrix(name, 83, columns)
    bias = np.random.default_rng(1).standard_normal(83).astype(np.float32)
    whole = product(x, weight, Weight(bias))
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    power = 2.0 ** np.where(largest > 2**15, np.ceil(np.log2(largest)) - 15, 0)
    rounded, w = halves(x.astype(np.float64) / power) * power, halves(decoded(weight))
    bound = (columns + 1) * U * (np.abs(rounded) @ np.abs(w).T + np.abs(bias))
    check_bound(whole, rounded @ w.T + bias, bound)
    for tokens in TOKENS:
        assert product(x[:tokens], weight, Weight(bias)).tobytes() == whole[:tokens].tobytes()
    older = Subject(lambda: CupyBackend(OlderRuntime()), policy=MIXED16)
    for tokens in (64, 150):
        assert older.apply("linear", x[:tokens], weight, Weight(bias)).tobytes() == whole[:tokens].tobytes()


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "f16"])
@pytest.mark.parametrize("room", [1, 2**30])
def test_opened_weights_give_a_row_the_same_bits(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, and two blocks of rows at a time."""
    weight, columns = matrix(name, 330, 768), 768
    x = activations(200, columns)
    bias = Weight(np.random.default_rng(1).standard_normal(330).astype(np.float32))
    closed = product(x, weight, bias)
    monkeypatch.setattr(opened_products, "LEAST_OPENED", 129)
    monkeypatch.setattr(opened_products, "OPENED_BYTES", room)
    runtimes = []

    def start() -> CupyBackend:
        runtimes.append(EmulatedRuntime())
        return CupyBackend(runtimes[-1])

    found = Subject(start, policy=MIXED16).apply("linear", x, weight, bias)
    assert found.tobytes() == closed.tobytes()
    launched = [name for name in runtimes[-1].launched if name.startswith(("open", "multiply"))]
    assert len(launched) == (4 if room == 1 else 2)


def test_a_row_with_infinity_has_no_numbers_and_spoils_no_other() -> None:
    weight, found = matrix("q4_0", 17, 256), []
    for spoiled in (0.0, 1e30):
        x, tracer = np.random.default_rng(0).standard_normal((20, 256), np.float32) / 1e20, Tracer()
        x[3, 7] = spoiled
        inputs = symbolic_inputs(tracer, kv_groups=1)
        value = tracer.scale(activation(tracer, inputs, "x", x.shape), factor=1e20)
        y = tracer.linear(value, tracer.symbol("w", "weight", weight.shape))
        tensors = {"x": Weight(x).tensor("x"), "w": weight.tensor("w")}
        subject = Subject(EmulatedBackend, policy=MIXED16)
        program = subject.in_policy(tracer.finish(y), tensors)
        found.append(subject.compile(program, tensors, 20).run(one_sequence(20)))
    others = [t for t in range(20) if t != 3]
    assert not np.isfinite(found[1][3]).any()
    assert np.isfinite(found[0]).all()
    assert found[1][others].tobytes() == found[0][others].tobytes()


def block(tracer: Tracer, x, scale, roles, activation_name: str):
    normed = tracer.rms_norm(x, scale, eps=1e-5)
    gate, up, down = roles
    h = tracer.gated(tracer.linear(normed, gate), tracer.linear(normed, up), activation=activation_name)
    return tracer.add(x, tracer.linear(h, down))


@pytest.mark.parametrize("activation_name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("columns", [256, 608])
def test_a_fused_block_gives_a_row_the_same_bits_in_any_company(
    columns: int, activation_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm, gate, up, activation, down and residual: fused however many tokens there are."""
    monkeypatch.setattr(opened_products, "LEAST_OPENED", 129)
    runtimes, found = [], {}

    def start() -> CupyBackend:
        runtimes.append(EmulatedRuntime())
        return CupyBackend(runtimes[-1])

    roles = ("gate", "up", "down")
    stored = {role: matrix("q4_0", columns, columns, seed) for seed, role in enumerate(roles)}
    for tokens in (1, 30, 70, 140):
        x, tracer = activations(tokens, columns), Tracer()
        inputs = symbolic_inputs(tracer, kv_groups=1)
        value = activation(tracer, inputs, "x", x.shape)
        scale = tracer.symbol("scale", "weight", (columns,))
        symbols = [tracer.symbol(role, "weight", (columns, columns)) for role in roles]
        y = block(
            tracer, block(tracer, value, scale, symbols, activation_name), scale, symbols, activation_name
        )
        tensors = {role: weight.tensor(role) for role, weight in stored.items()}
        tensors |= {"x": Weight(x).tensor("x"), "scale": Weight(np.linspace(1, 2, columns)).tensor("scale")}
        subject = Subject(start, policy=MIXED16)
        program = subject.in_policy(tracer.finish(y), tensors)
        found[tokens] = subject.compile(program, tensors, tokens).run(one_sequence(tokens))
    kernels = [
        [name.split("_q")[0] for name in runtime.launched if "embedding" not in name] for runtime in runtimes
    ]

    def opened(name: str, before: str) -> list[str]:
        return [before, "open", name]

    assert kernels == [
        [f"one_{activation_name}", "one"] * 2,
        ["norm_halves_8192", f"few_32_{activation_name}", "round_rows", "few_32"] * 2,
        ["norm_halves_8192", f"many_{activation_name}", "round_rows", "many_1"] * 2,
        [
            *opened(f"multiply_{activation_name}_192", "norm_halves_8192"),
            *opened("multiply_192", "round_rows"),
        ]
        * 2,
    ]
    assert np.isfinite(found[1]).all()
    assert found[1].tobytes() == found[30][:1].tobytes() == found[70][:1].tobytes()
    assert found[70].tobytes() == found[140][:70].tobytes()
    assert found[30].tobytes() == found[70][:30].tobytes()


@pytest.mark.parametrize("encoding", LAYOUTS)
def test_shared_memory_is_what_the_kernels_lay_out(encoding: str, tmp_path: Path) -> None:
    """The compiler's sizes of the structures, against the host's formulas."""
    header = Path(__file__).with_name("emulation.h")
    few = {
        most: f"sizeof(FewTokens<PackedRow<E>, {tiles}, {most // 8}, 0>::Sums)"
        for most, tiles in TILES.items()
    }
    for module, asked, expected in (
        ("linear_a16_tiles", ["sizeof(Stage<E>)"], [many_bytes(LAYOUTS[encoding]) // STAGES]),
        ("linear_a16", few.values(), [few_bytes(most, gated=False) // 8 for most in few]),
        (
            "linear_a16_one",
            ["sizeof(OneToken<E, 0>::Memory)", "sizeof(OneToken<E, 1>::Memory)"],
            [one_bytes(LAYOUTS[encoding], 0, gated=gated) for gated in (False, True)],
        ),
        (
            "linear_a16_warpgroups",
            ["sizeof(ManyMemory<E, 1>)", "sizeof(ManyMemory<E, 2>)"],
            [group_bytes(LAYOUTS[encoding], 1), group_bytes(LAYOUTS[encoding], 2)],
        ),
        (
            "multiply_panels",
            ["sizeof(PanelMemory<128>)", "sizeof(PanelMemory<192>)"],
            [opened_products.panel_bytes(128), opened_products.panel_bytes(192)],
        ),
    ):
        source, program = tmp_path / f"{module}.cpp", tmp_path / module
        text = f'#include "{header}"\n{text_of(module, encoding)}\n#include <cstdio>\ntypedef {encoding.upper()} E;\n'
        text += "int main() {" + "".join(f'printf("%d ", (int){size});' for size in asked) + "}\n"
        source.write_text(text)
        subprocess.run(
            ["g++", "-std=c++17", "-w", "-fno-strict-aliasing", str(source), "-o", str(program)], check=True
        )
        found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
        assert [int(n) for n in found] == expected
