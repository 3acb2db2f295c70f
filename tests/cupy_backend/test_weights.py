"""Weights lie on the device without loss, and what is not a number is refused."""

from __future__ import annotations

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedBackend, EmulatedRuntime
from stored_matrices import HALVES, stored_matrix

from refengine.backend.weights import WeightPlan
from refengine.errors import MemoryLimitError, NumericalError
from refengine.quantizer import ENCODINGS, LazyTensor, decode, encoding
from refengine_conformance.subject import Input, Subject, Weight
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy.packing import LAYOUTS, pack, packed_bytes, plane_bytes
from refengine_cupy.weights import DeviceWeights, plan_packed


@pytest.mark.parametrize("name", LAYOUTS)
def test_looked_up_rows_are_the_decoded_ones(name: str) -> None:
    """Packed by planes, read back by the kernels: every weight has the bits of its definition."""
    data = stored_matrix(name, 37, 512)
    rows = Subject(EmulatedBackend).apply("embedding", Input("token_ids"), Weight(data, (37, 512), name))
    assert rows.tobytes() == decode(name, data).reshape(37, 512).tobytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_planes_have_the_planned_bytes(name: str) -> None:
    """Rows are rounded up to tiles of 16, and nothing is added but what aligns planes."""
    planes = pack(name, stored_matrix(name, 33, 512), 512)
    assert {plane: values.nbytes for plane, values in planes.items()} == plane_bytes(name, 33, 512)
    stored = 48 * encoding(name).row_bytes(512)
    assert stored <= sum(plane_bytes(name, 33, 512).values()) <= stored * 1.03
    assert packed_bytes(name, 33, 512) - sum(plane_bytes(name, 33, 512).values()) < 4 * 256


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_every_encoding_has_a_place(name: str) -> None:
    """Its own, or that of float32."""
    assert packed_bytes(name, 16, 256) >= 16 * encoding(name).row_bytes(256)


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, halves in HALVES.items() for at in halves])
def test_a_scale_that_is_not_finite_is_refused(name: str, at: int) -> None:
    data = stored_matrix(name, 20, 256)
    data[19, at : at + 2] = np.array([0x7C00], "<u2").view(np.uint8)
    tensor = LazyTensor("blk.3.weight", (20, 256), name, data)
    with pytest.raises(NumericalError, match=r"tensor blk\.3\.weight holds NaN or infinity"):
        DeviceWeights(EmulatedRuntime(), {"w": tensor})


def test_weights_take_what_is_planned() -> None:
    model, backend = tiny_model(), EmulatedBackend()
    plan = plan_packed(model.program, model.weights)
    backend.upload(model.weights, Subject(EmulatedBackend).policy, plan)
    assert backend.memory().weights == plan.total == plan.held


def test_weights_without_room_are_refused_and_counted_nowhere() -> None:
    """The device's memory is asked for before anything is packed."""
    model, backend = tiny_model(), EmulatedBackend()
    backend._runtime.most = 1000
    with pytest.raises(MemoryLimitError, match="weights"):
        backend.upload(model.weights, Subject(EmulatedBackend).policy)
    assert backend.memory().total == 0


def test_only_planned_weights_are_taken() -> None:
    model, runtime = tiny_model(), EmulatedRuntime()
    plan = plan_packed(model.program, model.weights)
    some = WeightPlan(dict(list(plan.weights.items())[:2]))
    held = DeviceWeights(runtime, model.weights, some)
    assert held.held == some.total
