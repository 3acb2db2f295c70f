"""The played device refuses what a GPU with wider waves would do otherwise; and kernels do none of it."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cupy_backend.emulation import (
    COMPILER,
    FLAGS,
    HEADER,
    OUTCOMES,
    EmulatedRuntime,
    NarrowRuntime,
    compiled,
)
from cupy_backend.test_products import activations, block, matrix, product

from refengine.program import POLICIES, Tracer, symbolic_inputs
from refengine_conformance.prompts import Prompting, Prompts
from refengine_conformance.subject import Subject, Weight, activation, one_sequence
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy.backend import CupyBackend
from refengine_cupy.packing import LAYOUTS
from refengine_cupy.products import STRETCH_BYTES
from refengine_cupy.source import text_of


def run(body: str, threads: int = 64) -> tuple[str, np.ndarray]:
    """How a kernel ends whose arguments are a float for each thread, and what it leaves there."""
    library = compiled(
        "trial",
        f"struct A {{ float x[64]; }};\nKERNEL(trial, A, 64) {{\nfloat *x = (float *)a.x;\n{body}\n}}\n",
    )
    x = np.arange(64, dtype=np.float32)
    one, count, none = (ctypes.c_uint(n) for n in (1, threads, 0))
    return OUTCOMES[library.run_trial(x.ctypes.data_as(ctypes.c_void_p), one, one, one, count, none)], x


def test_groups_of_32_exchange_among_themselves() -> None:
    outcome, x = run("x[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1);")
    assert outcome == ""
    assert x.tolist() == [i ^ 1 for i in range(64)]


def test_a_group_may_exchange_while_another_that_shares_a_wide_wave_does_not() -> None:
    outcome, x = run("if (threadIdx.x < 32) x[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1);")
    assert outcome == ""
    assert x[32:].tolist() == list(range(32, 64))


@pytest.mark.parametrize(
    "body",
    [
        "if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();",
        "if (threadIdx.x % 2)\n__syncthreads();\nelse\n__syncthreads();",
    ],
    ids=["groups", "threads"],
)
def test_a_barrier_is_one_for_the_whole_block(body: str) -> None:
    """Hardware counts waves: two barriers that parts of one wave reach are two for it."""
    assert run(body)[0] == "threads wait in different lines"


def test_threads_of_a_group_exchange_in_the_same_place() -> None:
    body = "x[threadIdx.x] = threadIdx.x % 4 < 2 ?\nshuffle_xor(x[threadIdx.x], 1) :\nshuffle_xor(x[threadIdx.x], 1);"
    assert run(body)[0] == "threads wait in different lines"


def test_a_thread_that_has_ended_leaves_no_number() -> None:
    outcome, x = run("if (threadIdx.x % 2) return;\nx[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1);")
    assert outcome == ""
    assert np.isnan(x[::2]).all()


@pytest.mark.parametrize(
    "body",
    [
        "x[0] = (*(const float4 *)(x + 1 + threadIdx.x)).y;",
        "*(float2 *)(x + 1) = make_float2(1, 2);",
        "u16 *half = (u16 *)((u8 *)x + threadIdx.x % 2);\nx[63] = *half;",
        "SHARED uint4 kept[64];\ncopy16(&kept[threadIdx.x], x + 1);",
        "x[0] = load_once((const uint4 *)(x + 2)).x;",
    ],
    ids=["float4", "float2", "u16", "copy16", "load_once"],
)
def test_what_is_read_at_once_begins_at_a_multiple_of_its_bytes(body: str) -> None:
    assert run(body)[0] == "misaligned address"


def test_shared_memory_is_aligned_as_its_type_is_or_as_it_says() -> None:
    """Two arrays of an odd number of floats lie one behind the other: only one can be aligned by chance."""
    body = """
        {0} SHARED float one[65];
        {0} SHARED float other[65];
        one[threadIdx.x] = other[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        const int first = threadIdx.x / 4 * 4;
        x[threadIdx.x] = (*(const float4 *)(one + first)).x + (*(const float4 *)(other + first)).x;
    """
    assert run(body.format(""))[0] == "misaligned address"
    outcome, x = run(body.format("alignas(16)"))
    assert outcome == ""
    assert x.tolist() == [i // 4 * 8 for i in range(64)]


PROMPTS = Prompts(tiny_model(), (tuple(range(1, 90)), tuple(range(1, 20))))


def test_a_model_has_the_same_bits_where_there_is_little_shared_memory() -> None:
    """Attention query by query gives what it gives by tiles."""
    wide, narrow = EmulatedRuntime(), NarrowRuntime()
    results = [
        Prompting(Subject(lambda runtime=runtime: CupyBackend(runtime)), PROMPTS).step(PROMPTS.whole)
        for runtime in (wide, narrow)
    ]
    assert any(name.startswith("attention_tiles") for name in wide.launched)
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("columns", [1280, 32 * 700])
def test_products_have_the_same_bits_where_there_is_little_shared_memory(columns: int) -> None:
    """One token, whose codes are in shared memory or too many for it."""
    x, weight = activations(1, columns), matrix("q4_0", 17, columns)
    wide, narrow = EmulatedRuntime(), NarrowRuntime()
    results = [product(lambda runtime=runtime: CupyBackend(runtime), x, weight) for runtime in (wide, narrow)]
    assert results[0].tobytes() == results[1].tobytes()
    assert wide.launched[-1] == "product_1_q4_0"
    assert narrow.launched[-1] == f"product_{1 if columns == 1280 else 4}_q4_0"


def test_a_gated_block_has_the_same_bits_where_there_is_little_shared_memory() -> None:
    """Where a token's codes are not in shared memory, none are fused into the product that makes them."""
    x, tracer = activations(1, 256), Tracer()
    roles = ("gate", "up", "down")
    value = activation(tracer, symbolic_inputs(tracer, kv_groups=1), "x", x.shape)
    y = block(tracer, value, *(tracer.symbol(role, "weight", (256, 256)) for role in roles), "silu")
    program = tracer.finish(y)
    weights = {role: matrix("q4_1", 256, 256, seed).tensor(role) for seed, role in enumerate(roles)}
    tensors = weights | {"x": Weight(x).tensor("x")}
    wide, narrow = EmulatedRuntime(), NarrowRuntime()
    narrow.shared_bytes = 35_000
    results = [
        Subject(lambda runtime=runtime: CupyBackend(runtime), policy=POLICIES["mixed8"])
        .compile(program, tensors, 1)
        .run(one_sequence(1))
        for runtime in (wide, narrow)
    ]
    assert "product_1_silu_q4_1" in wide.launched
    assert "product_4_silu_q4_1" in narrow.launched
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("encoding", LAYOUTS)
def test_what_products_have_beside_a_token_s_codes_is_counted(encoding: str, tmp_path: Path) -> None:
    kind = encoding.upper()
    text = f'#include "{HEADER}"\n{text_of("linear_a8", encoding)}\n'
    text += f"static_assert(sizeof(Stretch<{kind}, 1, STEPS_OF({kind})>) <= {STRETCH_BYTES});\n"
    source = tmp_path / "size.cpp"
    source.write_text(text)
    subprocess.run([str(COMPILER), *FLAGS, "-fsyntax-only", str(source)], check=True)
