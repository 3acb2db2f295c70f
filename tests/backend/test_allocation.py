"""A step on NumPy takes no memory that was not planned."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine.backend import load
from refengine.models import Model
from refengine.models.model import expected_shapes
from refengine.program import golden_workspace, plan_memory, policy
from refengine.quantizer import LazyTensor
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.subject import Subject

CONSTANT, PER_TOKEN = 256 * 1024, 512
"""Bytes: NumPy's own buffers, of 8,192 elements for each operand; and a few numbers per token."""


def wide_model() -> Model:
    """Two layers with the widths of SmolLM2 135M, all weights one."""
    spec = tiny_model("llama", layers=2).spec
    layer = replace(
        spec.layers[0],
        heads=9,
        kv_heads=3,
        head_size=64,
        ffn_size=1536,
        rope=replace(spec.layers[0].rope, frequencies=(0.5,) * 32),
    )
    spec = replace(spec, hidden_size=576, layers=(layer,) * 2, context_length=4096, tied_embeddings=True)
    shapes = {role: shape for role, shape in expected_shapes(spec).items() if "bias" not in role}
    return Model(
        spec,
        {
            role: LazyTensor(role, shape, "f32", np.ones(shape, np.float32).view(np.uint8))
            for role, shape in shapes.items()
        },
    )


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("name", ["llama", "gemma3", "wide"])
def test_a_step_allocates_nothing_that_grows_with_a_width(name: str, tokens: int) -> None:
    """Beyond the logits: a constant and a little per token, in prefill and in decode, with a long context."""
    model = wide_model() if name == "wide" else tiny_model(name)
    prompts = Prompts(model, (tuple(n % 16 for n in range(500 + tokens)),), block_size=16)
    prompting = Prompting(Subject(lambda: load("numpy")), prompts, tokens=500)
    prompting.step([Chunk(0, 0, 500)])
    batch = prompts.batch([Chunk(0, 500, 500 + tokens)])
    prompting.executable.run(batch)  # chooses kernels
    tracemalloc.start()
    logits = prompting.executable.run(batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - logits.nbytes <= CONSTANT + PER_TOKEN * tokens


def test_a_plan_without_working_memory_lets_ops_allocate() -> None:
    """The count above is no illusion: without planned workspaces the same step takes much more."""
    model, chosen = wide_model(), policy("float32")
    prompts = Prompts(model, (tuple(n % 16 for n in range(200)),))
    bare = Subject(
        lambda: load("numpy"), plan=lambda program, chosen, sizes, *_: plan_memory(program, chosen, sizes)
    )
    prompting = Prompting(bare, prompts)
    batch = prompts.batch(prompts.whole)
    prompting.executable.run(batch)
    tracemalloc.start()
    logits = prompting.executable.run(batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = {"T": 200, "S": 1, "R": 200}
    most = max(golden_workspace(i, sizes, chosen) for i in model.program)
    assert CONSTANT + PER_TOKEN * 200 < peak - logits.nbytes <= CONSTANT + PER_TOKEN * 200 + most


def test_the_plan_of_a_backend_with_functions_of_its_own_has_no_room_for_golden_ones() -> None:
    """Working memory is planned where the golden function runs, natively or in another's place."""
    backend = load("numpy")
    chosen, sizes = policy("float32"), {"T": 9, "S": 1, "R": 1}
    norm = next(i for i in tiny_model("llama").program if i.op.name == "rms_norm")
    assert backend.workspace(norm, sizes, chosen) == golden_workspace(norm, sizes, chosen) > 0
    backend.native = {"rms_norm": lambda *operands, **attributes: None}
    assert backend.workspace(norm, sizes, chosen) == 0
    backend.native = {}
    assert backend.workspace(norm, sizes, chosen) == golden_workspace(norm, sizes, chosen)
