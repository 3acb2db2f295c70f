"""Weights under a limit: the plan is the best of all plans, pages go back to the system, and no bit changes."""

from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine import backend
from refengine.backend import WeightPlan
from refengine.backend.weights import (
    LOOKUP_ROWS,
    PlannedWeight,
    StoredMatrix,
    Weights,
    plan_decoded,
    plan_weights,
)
from refengine.errors import NumericalError
from refengine.models import Model
from refengine.models.families import FAMILIES
from refengine.ops import linear
from refengine.ops.linear import tile_rows
from refengine.ops.scratch import Scratch
from refengine.program import POLICIES
from refengine.quantizer import LazyTensor
from refengine_conformance.prompts import Prompts
from refengine_conformance.subject import Subject, commit_all

ROWS, COLUMNS = 2500, 1024
"""Of a matrix in a file: 10 MB, three tiles."""

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts pages as Linux shows them"
)


def in_16_bits(model: Model) -> Model:
    """The same model, whose matrices are stored as float16."""
    weights = {
        role: LazyTensor(t.name, t.shape, "f16", t.decode().astype("<f2").view(np.uint8))
        if len(t.shape) > 1
        else t
        for role, t in model.weights.items()
    }
    return Model(model.spec, weights)


def recounted(model: Model, plan: WeightPlan, itemsize: int) -> tuple[int, int, int]:
    """Bytes held, mapped and streamed, by the words of the clause."""
    tables = {"token_embedding"} - ({"token_embedding"} if model.spec.tied_embeddings else set())
    held = mapped = 0
    tiles = [0]
    for role, tensor in model.weights.items():
        match plan.weights[role].holding:
            case "decoded":
                held += int(np.prod(tensor.shape)) * itemsize
            case "mapped":
                mapped += tensor.data.nbytes
            case "streamed":
                rows = LOOKUP_ROWS if role in tables else tile_rows(tensor.shape)
                tiles.append(tensor.data[:rows].nbytes)
    return held, mapped, max(tiles)


@pytest.mark.parametrize("policy", ["float32", "float64"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plan_counts_what_a_recount_counts(family: str, policy: str) -> None:
    """At every limit: the sums are those of the weights, and stay within the limit where anything does."""
    model, chosen = in_16_bits(tiny_model(family)), POLICIES[policy]
    least = plan_weights(model.program, model.weights, chosen, 0).total
    fastest = plan_weights(model.program, model.weights, chosen, None)
    for limit in (0, least - 1, *range(least, fastest.total + 2000, 997)):
        plan = plan_weights(model.program, model.weights, chosen, limit)
        assert set(plan.weights) == set(model.weights)
        assert (plan.held, plan.mapped, plan.streamed) == recounted(model, plan, chosen.activations.itemsize)
        assert plan.total <= max(limit, least)


def test_no_choice_takes_less_than_the_least() -> None:
    """Of all ways to hold the weights of one layer, a limit of nothing gets the smallest."""
    model, chosen = in_16_bits(tiny_model(layers=1)), POLICIES["float32"]
    plan = plan_weights(model.program, model.weights, chosen, 0)
    matrices = [role for role, tensor in model.weights.items() if len(tensor.shape) > 1]
    vectors = sum(t.size for t in model.weights.values() if len(t.shape) == 1) * 4
    totals = []
    for holdings in itertools.product(("decoded", "mapped", "streamed"), repeat=len(matrices)):
        sizes: dict[str, list[int]] = {"decoded": [vectors], "mapped": [0], "streamed": [0]}
        for role, holding in zip(matrices, holdings, strict=True):
            tensor = model.weights[role]
            rows = min(LOOKUP_ROWS, tensor.shape[0]) if role == "token_embedding" else tensor.shape[0]
            per_row = {"decoded": 4, "mapped": 2, "streamed": 2}[holding] * tensor.shape[1]
            sizes[holding].append(per_row * (rows if holding == "streamed" else tensor.shape[0]))
        totals.append(sum(sizes["decoded"]) + sum(sizes["mapped"]) + max(sizes["streamed"]))
    assert plan.total == min(totals)


def test_room_goes_to_the_file_first_and_then_to_decoding() -> None:
    """Nothing is decoded while anything is streamed but what is left over; without a limit only tables stay."""
    model, chosen = in_16_bits(tiny_model(layers=4)), POLICIES["float32"]
    program, weights = model.program, model.weights
    assert plan_weights(program, weights, chosen, None).weights["token_embedding"].holding == "mapped"
    stored = sum(t.nbytes for t in weights.values())
    mapped = plan_weights(program, weights, chosen, stored)
    assert {w.holding for r, w in mapped.weights.items() if len(weights[r].shape) > 1} == {"mapped"}
    more = plan_weights(program, weights, chosen, stored + weights["layers.0.q"].nbytes)
    assert [role for role, w in more.weights.items() if w != mapped.weights[role]] == ["layers.0.q"]
    less = plan_weights(program, weights, chosen, stored - 1)
    assert [role for role, w in less.weights.items() if w.holding == "streamed"] == ["token_embedding"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_everything_decoded(family: str) -> None:
    """The plan of a backend that only decodes has every weight in the policy's dtype."""
    model = tiny_model(family)
    plan = plan_decoded(model.program, model.weights, POLICIES["float64"])
    assert (plan.mapped, plan.streamed) == (0, 0)
    assert plan.total == plan.held == 8 * sum(tensor.size for tensor in model.weights.values())


def logits(model: Model, policy: str, plan: WeightPlan | None, steps: int = 2) -> list[bytes]:
    """The bits of the same step, taken more than once."""
    chosen, numpy = POLICIES[policy], backend.load("numpy")
    prompts = Prompts(model, ((1, 2, 3, 4, 5, 6, 7), (96, 0, 50)))
    layout = prompts.layout(chosen)
    cache = numpy.create_cache(layout)
    commit_all(cache, layout)
    arena = Subject(lambda: numpy, chosen).plan(model.program, chosen, {"T": 10, "S": 10, "R": 10})
    weights = numpy.upload(model.weights, chosen, plan)
    executable = numpy.compile(model.program, chosen, arena, weights, layout, cache)
    results = [executable.run(prompts.batch(prompts.whole)).tobytes() for _ in range(steps)]
    if plan is not None:
        assert (numpy.memory().weights, numpy.memory().mapped) == (plan.held, plan.mapped + plan.streamed)
    return results


@pytest.mark.parametrize("policy", ["float32", "float64"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_limit_changes_no_bit(family: str, policy: str) -> None:
    """The smallest limit, one that maps everything, one in between, a large one and none: the same logits."""
    model = in_16_bits(tiny_model(family))
    stored = sum(tensor.nbytes for tensor in model.weights.values())
    expected = logits(model, policy, None)
    for limit in (0, stored // 2, stored, 2 * stored, 10 * stored, None):
        plan = plan_weights(model.program, model.weights, POLICIES[policy], limit)
        assert logits(model, policy, plan) == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("limit", [0, 40_000, None])
def test_damage_is_found_however_a_weight_is_held(family: str, limit: int | None) -> None:
    """An infinity in the last row of any weight but the table: the first step refuses it, by name."""
    model = tiny_model(family)
    for role in sorted(model.weights.keys() - {"token_embedding"}):
        tensor = model.weights[role]
        values = tensor.decode()
        values.flat[-1] = np.inf
        spoilt = LazyTensor(tensor.name, tensor.shape, "f32", values.view(np.uint8))
        damaged = Model(model.spec, {**model.weights, role: spoilt})
        plan = plan_weights(damaged.program, damaged.weights, POLICIES["float32"], limit)
        with pytest.raises(NumericalError, match=f"tensor {tensor.name} holds NaN"):
            logits(damaged, "float32", plan)


@pytest.fixture
def stored(tmp_path: Path) -> LazyTensor:
    """A matrix in a mapped file, none of whose pages the process has touched."""
    path = tmp_path / "matrix"
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype("<f4")
    path.write_bytes(bytes(100) + values.tobytes() + bytes(200_000))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    data = mapped[100 : 100 + values.nbytes].reshape(ROWS, 4 * COLUMNS)
    return LazyTensor("matrix", (ROWS, COLUMNS), "f32", data)


def resident(array: np.ndarray) -> int:
    """Bytes of the mapping around an array that this process has in memory, as Linux tells."""
    address = array.__array_interface__["data"][0]
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, stop = (int(end, 16) for end in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "Rss:":
            return int(rest[0]) * 1024
    raise AssertionError("the array lies in no mapping")


@needs_linux
def test_a_streamed_matrix_leaves_no_page(stored: LazyTensor) -> None:
    """While tiles pass, no more than one is in memory; behind them nothing is. A mapped matrix stays."""
    scratch, step = Scratch(), tile_rows(stored.shape)
    assert step < ROWS / 2
    streamed, most = StoredMatrix(stored, np.dtype(np.float32), streamed=True), 0
    for start in range(0, ROWS, step):
        streamed.tile(start, min(start + step, ROWS), scratch)
        most = max(most, resident(stored.data))
    assert most == 0
    StoredMatrix(stored, np.dtype(np.float32), streamed=False).tile(0, ROWS, scratch)
    assert resident(stored.data) >= stored.nbytes


@needs_linux
def test_a_streamed_table_leaves_no_page(stored: LazyTensor) -> None:
    """Rows from all over the file are read, more than are looked up at a time, and given back."""
    table, rows = StoredMatrix(stored, np.dtype(np.float32), streamed=True), np.arange(0, ROWS, 7)
    assert len(rows) > 2 * LOOKUP_ROWS
    found = table[rows]
    assert resident(stored.data) == 0
    assert np.array_equal(found, stored.data.view("<f4")[rows])


@needs_linux
def test_a_decoded_weight_leaves_no_page(stored: LazyTensor) -> None:
    """What is decoded for good needs its file no more."""
    plan = WeightPlan({"w": PlannedWeight("f32", stored.nbytes, "decoded", stored.nbytes)})
    weights = Weights({"w": stored}, POLICIES["float32"], plan)
    assert weights.held == 0
    decoded = weights.operand("w")
    assert weights.held == stored.nbytes
    assert resident(stored.data) == 0
    assert np.array_equal(decoded, stored.data.view("<f4"))


def test_tiles_of_a_mapped_file_multiply_as_arrays_do(stored: LazyTensor) -> None:
    """Three tiles and a bias, in both dtypes: the product is that of the decoded matrix, bit by bit."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        x = np.random.default_rng(1).standard_normal((5, COLUMNS)).astype(dtype)
        bias = np.arange(ROWS).astype(dtype)
        for streamed in (False, True):
            matrix = StoredMatrix(stored, dtype, streamed=streamed)
            expected = linear(x, stored.decode().astype(dtype), bias)
            assert linear(x, matrix, bias).tobytes() == expected.tobytes()


def test_pages_of_other_memory_are_left_alone() -> None:
    """Bytes in ordinary memory, in a writeable mapping or with gaps between rows keep what they hold."""
    plain = np.arange(256, dtype=np.uint8).reshape(4, 64)
    writeable = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    writeable[:] = 7
    arrays: Mapping[str, np.ndarray] = {
        "plain": plain,
        "writeable": writeable.reshape(1024, 1024),
        "gaps": writeable.reshape(1024, 1024)[:, :512],
    }
    for name, array in arrays.items():
        before = array.copy()
        tensor = LazyTensor(name, (len(array), array.shape[1] // 4), "f32", array)
        tensor.pages.release()
        assert np.array_equal(array, before), name
