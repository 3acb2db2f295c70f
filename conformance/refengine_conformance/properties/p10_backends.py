"""Chapter *Backends*: what a backend says of itself, and errors about it."""

from __future__ import annotations

import ast
import inspect
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from refengine.backend import registry
from refengine.backend.info import BackendInfo
from refengine.errors import (
    BackendError,
    BackendFailedError,
    BackendNotInstalledError,
    UnknownBackendError,
    UnsupportedError,
)
from refengine.ops import OPS
from refengine.program import POLICIES
from refengine.quantizer import ENCODINGS
from refengine_conformance.backend_prompts import prompts
from refengine_conformance.memory_use import checked_memory
from refengine_conformance.prompts import Prompting
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject

ABOVE = frozenset({"engine", "scheduler", "sampling", "stopping", "request", "llm", "cli", "server"})
"""Modules of refengine that a backend has no business with."""


@holds("BCK-1", "backend")
def a_backend_says_what_it_is(subject: Subject, data: st.DataObject) -> None:
    """Name, devices, support and memory are there and mean something, before anything else is asked for."""
    backend = subject.start()
    assert backend.name
    assert isinstance(backend.import_bytes, int)
    assert backend.import_bytes >= 0
    devices = backend.devices()
    assert devices
    for device in devices:
        assert device.name
        assert device.total_bytes is None or device.total_bytes > 0
        if device.own_memory:
            assert device.free_bytes is None or 0 <= device.free_bytes <= (device.total_bytes or inf)
            assert device.context_bytes >= 0
        else:
            assert (device.free_bytes, device.context_bytes) == (None, 0)
    op, policy = data.draw(st.sampled_from(sorted(OPS))), data.draw(st.sampled_from(sorted(POLICIES)))
    encoding = data.draw(st.none() | st.sampled_from(sorted(ENCODINGS)))
    reason = backend.support(op, encoding=encoding, policy=policy)
    assert reason is None or (isinstance(reason, str) and reason.strip())
    checked_memory(backend.memory())


@holds("BCK-1", "backend")
def a_backend_imports_nothing_above_it(subject: Subject, data: st.DataObject) -> None:
    """The source of its classes names no module of the engine or the ways in."""
    for cls in type(subject.start()).__mro__:
        with suppress(TypeError):
            above = _imports(inspect.getfile(cls)) & ABOVE
            assert not above, f"{cls.__module__} imports refengine.{', refengine.'.join(sorted(above))}"


@holds("BCK-2", "backend")
def what_does_not_exist_is_not_supported(subject: Subject, data: st.DataObject) -> None:
    """An op, an encoding or a policy of an unknown name gives a reason that names it."""
    backend = subject.start()
    unknown = data.draw(st.text("abcxyz_", min_size=1, max_size=9).map(lambda t: f"no_{t}"))
    asked = {"op": "linear", "encoding": "f32", "policy": "float32"}
    asked[data.draw(st.sampled_from(sorted(asked)))] = unknown
    reason = backend.support(asked.pop("op"), **asked)
    assert unknown in str(reason), f"{unknown}: {reason!r}"


@holds("BCK-2", "backend", tier="models")
def an_op_is_native_or_refused_with_its_reason(subject: Subject, data: st.DataObject) -> None:
    """What it claims to support runs; what it does not is refused, unless fallback is asked for."""
    case = data.draw(prompts())
    program = case.model.program
    backend = subject.start()
    reasons = [backend.support(op, encoding=None, policy=subject.policy.name) for op in program.op_counts]
    missing = [reason for reason in reasons if reason]
    try:
        Prompting(replace(subject, fallback=False), case).step(case.whole)
    except UnsupportedError as error:
        assert missing, f"refused, although every op is supported: {error}"
        assert all(reason in str(error) for reason in missing), f"{error} does not say {missing}"
    else:
        assert not missing, f"ran although {missing}, and nobody asked for golden ops"


@holds("BCK-13", "registry")
def errors_about_backends_have_four_parts(subject: Subject, data: st.DataObject) -> None:
    """Unknown, not installed, or failed to start: its name, what is available, why, and how to mend it."""
    name = data.draw(st.text("abcdefgh-", min_size=1, max_size=9)) + "-suspect"
    cause = data.draw(st.text("ijklmnop ", min_size=1, max_size=20).map(lambda t: f"cause {t}".strip()))
    kind = data.draw(st.sampled_from([UnknownBackendError, BackendNotInstalledError, BackendFailedError]))
    probe = cause if kind is BackendNotInstalledError else None
    info = BackendInfo("a suspect", f"pip install {name}", lambda: probe, 9)

    def start() -> None:
        raise OSError(cause)

    points = {registry.BACKENDS: _EntryPoint(name, start), registry.INFOS: _EntryPoint(name, info)}

    def with_suspect(group: str) -> EntryPoints:
        added = [] if kind is UnknownBackendError else [points[group]]
        return EntryPoints([*entry_points(group=group), *added])

    with patch.object(registry, "entry_points", with_suspect):
        try:
            subject.load(name)
        except BackendError as error:
            assert type(error) is kind, f"{type(error).__name__}, not {kind.__name__}"
            assert name in error.state
            assert "numpy" in error.available
            assert error.why if kind is UnknownBackendError else cause in error.why
            assert "--backend" in error.mend if kind is UnknownBackendError else info.install in error.mend
            assert all(part in str(error) for part in (error.state, error.available, error.why, error.mend))
        else:
            raise AssertionError("a backend was loaded that cannot be")


class _EntryPoint(EntryPoint):
    """An entry point whose object is at hand."""

    def __init__(self, name: str, target: object) -> None:
        super().__init__(name, "suspect:object", "suspect")
        vars(self)["target"] = target

    def load(self) -> Any:
        return vars(self)["target"]


@cache
def _imports(path: str) -> frozenset[str]:
    """Modules of refengine that a source file imports: ``refengine.ops.norm`` is ``ops``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(name.split(".")[1] for name in names if name.startswith("refengine."))
