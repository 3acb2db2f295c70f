"""What the backend says of itself, refuses, and launches."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedBackend, EmulatedRuntime

from refengine.backend import PreparingBackend
from refengine.errors import MemoryLimitError, RequestError, UnsupportedError
from refengine.ops import OPS
from refengine.program import POLICIES
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model
from refengine_cupy import info
from refengine_cupy.backend import POLICIES as CLAIMED
from refengine_cupy.backend import CupyBackend
from refengine_cupy.info import probe
from refengine_cupy.modules import modules_for
from refengine_cupy.source import text_of
from refengine_cupy.step_arrays import offsets_of, query_tiles, shape_of

PROMPTS = Prompts(tiny_model(vocabulary_size=97), ((5, 6, 7, 8, 9, 10, 11, 12, 13), (20, 21)))


def running() -> tuple[Prompting, EmulatedRuntime]:
    runtime = EmulatedRuntime()
    return Prompting(Subject(lambda: CupyBackend(runtime)), PROMPTS), runtime


def test_what_is_not_supported_has_a_reason() -> None:
    backend = EmulatedBackend()
    assert backend.support("linear", encoding="q2_k", policy="float32") is None
    assert "conv" in str(backend.support("conv", encoding=None, policy="float32"))
    assert "float64" in str(backend.support("add", encoding=None, policy="float64"))
    assert "q2_k" in str(backend.support("linear_a8", encoding="q2_k", policy="mixed8"))
    for op in OPS:
        reason = backend.support(op, encoding=None, policy="float32")
        assert reason is None or op in reason


def test_a_policy_without_kernels_is_refused_though_golden_ops_may_stand_in() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        Prompting(Subject(EmulatedBackend, policy=POLICIES["float64"], fallback=True), PROMPTS)


@pytest.mark.parametrize(
    ("status", "version", "count", "reason"),
    [
        (0, 13000, 1, None),
        (0, 13000, 0, "there is no GPU"),
        (0, 11080, 1, "too old: it offers CUDA 11.8, and 12.0"),
        (100, 13000, 0, "cuInit gives 100"),
        (None, 0, 0, "no GPU driver"),
    ],
)
def test_the_probe_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, status: int | None, version: int, count: int, reason: str | None
) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:  # noqa: N802
            return int(status or 0)

        def cuDriverGetVersion(self, out) -> None:  # noqa: N802
            ctypes.cast(out, ctypes.POINTER(ctypes.c_int))[0] = version

        def cuDeviceGetCount(self, out) -> None:  # noqa: N802
            ctypes.cast(out, ctypes.POINTER(ctypes.c_int))[0] = count

    libraries = {} if status is None else {"libcuda.so.1": Driver()}
    monkeypatch.setattr(
        info, "_library", lambda *names: next((libraries[n] for n in names if n in libraries), None)
    )
    monkeypatch.setattr(info, "find_spec", lambda name: type("Spec", (), {"origin": "somewhere"}))
    found = probe()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("name", CLAIMED)
def test_a_policy_is_prepared_by_compiling_what_its_programs_launch(name: str) -> None:
    """Each module once, in each version; that nothing is missing every launch on this device checks."""
    runtime = EmulatedRuntime()
    backend = CupyBackend(runtime)
    assert isinstance(backend, PreparingBackend)
    backend.prepare(name)
    modules = modules_for(POLICIES[name])
    assert runtime.compiled == set(modules)
    assert len(runtime.compiled) == len(modules)
    for module, version in modules:
        assert "KERNEL(" in text_of(module, version)


def test_without_cupy_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    assert probe() == "the package cupy is not installed"


def test_an_arena_without_room_is_refused() -> None:
    runtime = EmulatedRuntime()
    Prompting(Subject(lambda: CupyBackend(runtime)), PROMPTS)
    runtime.most = 70_000
    with pytest.raises(MemoryLimitError, match="bytes left for"):
        Prompting(Subject(lambda: CupyBackend(runtime)), PROMPTS)


def test_a_step_out_of_range_launches_nothing() -> None:
    prompting, runtime = running()
    batch = PROMPTS.batch(PROMPTS.whole)
    with pytest.raises(RequestError):
        prompting.executable.run(replace(batch, slot_mapping=(batch.slot_mapping[0] + 10**6,)))
    assert runtime.launched == []


def test_norms_rotation_and_writes_take_one_launch_each() -> None:
    prompting, runtime = running()
    prompting.step([Chunk(0, 0, 2)])
    launched = runtime.launched
    layers = len(PROMPTS.model.spec.layers)
    assert sum(name.startswith("rope_and_store") for name in launched) == layers
    assert not any(name in ("rope", "kv_write_f32") for name in launched)


def test_a_graph_is_recorded_when_a_shape_comes_again() -> None:
    recorded = []

    class Recording(EmulatedRuntime):
        def record(self, launches):
            recorded.append(len(launches))
            return super().record(launches)

    runtime = Recording()
    prompting = Prompting(Subject(lambda: CupyBackend(runtime)), PROMPTS)
    for position in range(4):
        prompting.step([Chunk(0, position, position + 1)])
    assert len(recorded) == 1


def test_shapes_are_rounded_so_that_growing_contexts_share_them() -> None:
    layout = PROMPTS.layout(POLICIES["float32"])
    shapes = {shape_of(PROMPTS.batch([Chunk(0, p, p + 1)]), layout) for p in range(9)}
    assert len(shapes) <= 4
    for shape in shapes:
        assert shape.blocks & (shape.blocks - 1) == 0
        offsets, end = offsets_of(shape, len(layout.groups))
        places = sorted(offsets.values())
        assert all(place % 16 == 0 for place in places)
        assert end >= max(places)


def test_tiles_of_queries_cross_no_sequence() -> None:
    prompts = Prompts(tiny_model(), (tuple(range(1, 90)), tuple(range(1, 20))))
    assert query_tiles(prompts.batch(prompts.whole)).tolist() == [0, 64, 89]
    few = Prompts(tiny_model(), ((1, 2, 3), (4,)))
    assert query_tiles(few.batch(few.whole)).size == 0


def test_logits_are_those_of_the_golden_engine_however_the_prompt_is_cut() -> None:
    whole = running()[0].step(PROMPTS.whole)
    prompting, _ = running()
    parts = [prompting.step([Chunk(0, 0, 1)]), prompting.step([Chunk(0, 1, 9), Chunk(1, 0, 2)])]
    assert np.concatenate([parts[0][0], parts[1][0]]).tobytes() == whole[0].tobytes()
    assert parts[1][1].tobytes() == whole[1].tobytes()
