"""What the real runtime queues for launches and copies, on a driver that is played: what comes before what."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import refengine_cupy
from refengine.errors import MemoryLimitError
from refengine_cupy.runtime import Await, Copy, Fetch, Launch, Work
from refengine_cupy.source import Kernel

KERNEL = Kernel("elementwise", "add", "Binary", 256)
MAIN = 1


class PlayedDriver:
    """Streams and events as CUDA defines them: what is queued, with all that must be done before it.

    Attributes:
        queued: kernels and copies in the order of their queueing: kind, argument, stream, what comes before.
    """

    class CUDARuntimeError(Exception):
        pass

    is_hip = False
    streamNonBlocking = eventDisableTiming = memcpyHostToDevice = streamCaptureModeRelaxed = 1  # noqa: N815
    memcpyDefault = 4  # noqa: N815

    def __init__(self) -> None:
        self.queued: list[tuple[str, Any, int, frozenset[int]]] = []
        self._streams: dict[int, frozenset[int]] = {}
        self._events: dict[int, frozenset[int]] = {}
        self.refuses = False

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return defaultdict(int, name=b"a played GPU")

    def streamCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        self._streams[len(self._streams) + 1] = frozenset()
        return len(self._streams)

    def eventCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        self._events[len(self._events) + 1] = frozenset()
        return len(self._events)

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        self._events[event] = self._streams[stream]

    def streamWaitEvent(self, stream: int, event: int) -> None:  # noqa: N802
        self._streams[stream] |= self._events[event]

    def memcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> None:  # noqa: N802
        copy = Fetch if kind == self.memcpyHostToDevice else Copy
        self.queue("copy", copy(source, to, nbytes), stream)

    def hostAlloc(self, nbytes: int, flags: int) -> int:  # noqa: N802
        raise self.CUDARuntimeError("out of memory")

    def queue(self, kind: str, what: Any, stream: int) -> None:
        before = self._streams[stream]
        self._streams[stream] = before | {len(self.queued)}
        self.queued.append((kind, what, stream, before))

    def before_stream(self, stream: int) -> frozenset[int]:
        return self._streams[stream]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, PlayedDriver]:
    """The runtime, loaded once more over a driver that is played."""
    cuda = PlayedDriver()

    class Driver:
        def __init__(self, device: int) -> None:
            pass

        def launch(self, function: int, *given: Any, may_overlap: bool = True) -> None:
            *_, stream, arguments = given
            cuda.queue("kernel" if may_overlap else "kernel alone", arguments, stream)

    def module(name: str, **attributes: Any) -> None:
        made = ModuleType(name)
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, name, made)

    module("cupy")
    module("cupy.cuda", runtime=cuda, compiler=SimpleNamespace())
    module("cupy_backends")
    module("cupy_backends.cuda")
    module("cupy_backends.cuda.libs", nvrtc=SimpleNamespace())
    module("refengine_cupy.driver", Driver=Driver)
    path = Path(refengine_cupy.__file__).with_name("cupy_runtime.py")
    spec = importlib.util.spec_from_file_location("played_cupy_runtime", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    runtime = loaded.CupyRuntime()
    runtime._functions[KERNEL] = 1
    return runtime, cuda


def kernel(number: int) -> Launch:
    return Launch(KERNEL, (1, 1, 1), bytes([number]))


WORK: list[Work] = [
    Copy(300, 230, 8), Fetch(100, 200, 8), Fetch(110, 210, 8), kernel(0), Await(1), kernel(1), kernel(2),
    Fetch(120, 200, 8), Fetch(130, 220, 4), Await(2), kernel(3), Await(4), kernel(4), Copy(310, 240, 4),
    kernel(5), kernel(6), Copy(250, 320, 4),
]  # fmt: skip


def test_a_fetch_follows_the_launches_before_it_and_a_launch_the_fetches_it_awaits(
    played: tuple[Any, PlayedDriver],
) -> None:
    """And nothing else but its own queue: what may overlap does. Copies stand in the queue of launches. Twice,
    as events are used again.
    """
    runtime, cuda = played
    earlier: set[int] = set()
    for _ in range(2):
        start = len(cuda.queued)
        runtime.launch(WORK)
        at, kernels, copies, awaited, alone = start, set(earlier), list[int](), 0, False
        for work in WORK:
            if isinstance(work, Await):
                awaited, alone = work.fetches, True
                continue
            kind, what, _, before = cuda.queued[at]
            if isinstance(work, Fetch):
                assert (kind, what) == ("copy", work)
                assert before - earlier == kernels - earlier | set(copies)
                assert kernels <= before
                copies.append(at)
            else:
                expected = ("copy", work) if isinstance(work, Copy) else ("kernel", work.arguments)
                assert (kind.removesuffix(" alone"), what) == expected
                assert before - earlier == kernels - earlier | set(copies[:awaited])
                kernels.add(at)
                assert kind.endswith("alone") == (isinstance(work, Launch) and alone)
                alone = isinstance(work, Copy)
            at += 1
        assert at == len(cuda.queued)
        earlier = set(range(at))


def test_fetches_do_not_wait_in_the_queue_of_launches(played: tuple[Any, PlayedDriver]) -> None:
    runtime, cuda = played
    runtime.launch(WORK)
    assert {stream for _, what, stream, _ in cuda.queued if not isinstance(what, Fetch)} == {MAIN}
    assert MAIN not in {stream for _, what, stream, _ in cuda.queued if isinstance(what, Fetch)}


def test_a_recording_ends_when_every_copy_has_joined_it(played: tuple[Any, PlayedDriver]) -> None:
    """All that was queued anywhere comes before the end of the stream that is recorded."""
    runtime, cuda = played
    runtime.record(WORK)
    assert cuda.before_stream(MAIN) == frozenset(range(len(cuda.queued)))


def test_pinned_memory_that_is_refused_is_named(played: tuple[Any, PlayedDriver]) -> None:
    runtime, _ = played
    with pytest.raises(MemoryLimitError, match=r"5\.0 MB of pinned memory for weights") as refused:
        runtime.pinned(5_000_000, "weights")
    assert refused.value.needed == 5_000_000
