"""Tiny backends that misbehave, and makers of their subjects: a worker imports this module."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refengine.backend.interpreter import InterpretedBackend
from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import BackendFailedError, UnsupportedError
from refengine.ops import OPS
from refengine.program import policy
from refengine_conformance import Subject

golden = OPS["rms_norm"].golden


def hang(*operands: Any, **attributes: Any) -> Any:
    while True:
        time.sleep(60)


def crash(*operands: Any, **attributes: Any) -> Any:
    return ctypes.string_at(0)


def leave(*operands: Any, **attributes: Any) -> Any:
    os._exit(0)


def slow_double(x: Any, weight: Any, **attributes: Any) -> Any:
    """Wrong, and slow enough that a simpler example is not found in time."""
    time.sleep(0.25)
    return double(x, weight, **attributes)


def refuse(*operands: Any, **attributes: Any) -> Any:
    raise UnsupportedError("not on Mondays")


def raise_error(*operands: Any, **attributes: Any) -> Any:
    raise KeyError("a lookup gone wrong")


def double(x: Any, weight: Any, **attributes: Any) -> Any:
    y = golden(x, weight, **attributes)
    y *= 2
    return y


class Unsteady:
    """Wrong at its first call."""

    calls = 0

    def __call__(self, x: Any, weight: Any, **attributes: Any) -> Any:
        Unsteady.calls += 1
        y = golden(x, weight, **attributes)
        y *= 2 if Unsteady.calls == 1 else 1
        return y


class Lacking(InterpretedBackend):
    """Computes nothing, and says so."""

    name = "lacking"
    native = MappingProxyType({})


class Narrow(NumpyBackend):
    """Lacks what it takes for wide rows, and says so."""

    def support(self, op: str, *, encoding: str | None, policy: str) -> str | None:
        return "no rows wider than 8" if op == "rms_norm" else None


def prepared() -> Path:
    """What a prepared backend leaves for other processes."""
    return Path(os.environ["SUSPECT_CACHE"]) / "prepared"


def slow_unless_prepared(x: Any, weight: Any, **attributes: Any) -> Any:
    if not prepared().exists() or prepared().read_text() != "float32":
        time.sleep(60)
    return golden(x, weight, **attributes)


def failure(why: str) -> BackendFailedError:
    return BackendFailedError(state="the backend failed", available="others", why=why, mend="start again")


def lose(*operands: Any, **attributes: Any) -> Any:
    Lost.failed = True
    raise failure("an address that is misaligned")


def narrow_double(x: Any, weight: Any, **attributes: Any) -> Any:
    if x.shape[-1] > 8:
        raise UnsupportedError("no rows wider than 8")
    return double(x, weight, **attributes)


def narrow(x: Any, weight: Any, **attributes: Any) -> Any:
    if x.shape[-1] > 8:
        raise UnsupportedError("no rows wider than 8")
    return golden(x, weight, **attributes)


class Preparing(NumpyBackend):
    """Slow until it has been prepared for its policy, by whichever process."""

    native = MappingProxyType({**NumpyBackend.native, "rms_norm": slow_unless_prepared})

    def prepare(self, policy: str) -> None:
        prepared().write_text(policy)


class Unpreparable(NumpyBackend):
    """Cannot be prepared."""

    def prepare(self, policy: str) -> None:
        raise RuntimeError("no compiler here")


class Lost(NumpyBackend):
    """Does not start in a process where it has failed."""

    failed = False
    native = MappingProxyType({**NumpyBackend.native, "rms_norm": lose})

    def __init__(self) -> None:
        if Lost.failed:
            raise failure("the device is gone")
        super().__init__()


class Chatty(NumpyBackend):
    """Prints to stdout."""

    def memory(self) -> Any:
        print("hello")
        return super().memory()

    def upload(self, *args: Any) -> Any:
        print("uploading", flush=True)
        return super().upload(*args)


@dataclass(frozen=True)
class PreparingSubject:
    """In the place of ``BackendSubject``."""

    backend: str
    policy: str
    fallback: bool

    def __call__(self) -> Subject:
        return Subject(Preparing, policy=policy(self.policy))


def preparing() -> Subject:
    return Subject(Preparing)


def unpreparable() -> Subject:
    return Subject(Unpreparable)


def losing() -> Subject:
    return Subject(Lost)


def subject_with(function: Any) -> Subject:
    """A subject whose ``rms_norm`` is this function."""
    natives = MappingProxyType({**NumpyBackend.native, "rms_norm": function})
    return Subject(type("Suspect", (NumpyBackend,), {"native": natives}))


def hanging() -> Subject:
    return subject_with(hang)


def crashing() -> Subject:
    return subject_with(crash)


def refusing() -> Subject:
    return subject_with(refuse)


def raising() -> Subject:
    return subject_with(raise_error)


def doubling() -> Subject:
    return subject_with(double)


def unsteady() -> Subject:
    return subject_with(Unsteady())


def lacking() -> Subject:
    return Subject(Lacking)


def narrow_subject(function: Any) -> Subject:
    native = MappingProxyType({**NumpyBackend.native, "rms_norm": function})
    return Subject(type("NarrowSuspect", (Narrow,), {"native": native}), fallback=True)


def narrow_and_right() -> Subject:
    return narrow_subject(narrow)


def narrow_and_wrong() -> Subject:
    return narrow_subject(narrow_double)


def chatty() -> Subject:
    return Subject(Chatty, policy=policy("float64"))


def leaving() -> Subject:
    return subject_with(leave)


def slowly_doubling() -> Subject:
    return subject_with(slow_double)


def path() -> list[str]:
    return sys.path


def inject(*operands: Any, **attributes: Any) -> Any:
    raise ValueError("<script>alert()</script>")


def injecting() -> Subject:
    return subject_with(inject)


def unmakeable() -> Subject:
    raise RuntimeError("it cannot be made")
