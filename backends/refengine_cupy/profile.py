"""Where a step's time goes on the device, kernel by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from cupy.cuda import runtime as cuda

from refengine_cupy.cupy_runtime import CupyRuntime
from refengine_cupy.executable import CupyExecutable
from refengine_cupy.runtime import Await, Copy, Fetch, Launch, Work


def by_kernel(executable: CupyExecutable, step: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Microseconds and launches by kernel, of one step that is run for it, costliest first.

    Kernels run alone here, each between two events: what they would overlap is not seen.
    """
    runtime = executable._runtime
    if not isinstance(runtime, CupyRuntime):
        return {}
    timed = _Timed(runtime)
    executable._runtime = timed
    executable._steps.clear()
    try:
        step()
    finally:
        executable._runtime = runtime
        executable._steps.clear()
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"launches": 0, "us": 0.0})
    for name, seconds in timed.taken:
        found[name]["launches"] += 1
        found[name]["us"] += round(seconds * 1e6, 1)
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


class _Timed:
    """A runtime that waits for every kernel."""

    def __init__(self, runtime: CupyRuntime) -> None:
        self._runtime, self.taken = runtime, list[tuple[str, float]]()
        self._events = cuda.eventCreate(), cuda.eventCreate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def launch(self, launches: Sequence[Work]) -> None:
        start, end = self._events
        for launch in launches:
            if isinstance(launch, Fetch):
                self._runtime.launch([launch, Await(1)])
            if isinstance(launch, Copy):
                self._runtime.launch([launch])
            if not isinstance(launch, Launch):
                continue
            self._runtime.launch([launch])  # once to load it
            cuda.eventRecord(start, self._runtime.stream)
            self._runtime.launch([launch])
            cuda.eventRecord(end, self._runtime.stream)
            cuda.eventSynchronize(end)
            self.taken.append((launch.kernel.name, cuda.eventElapsedTime(start, end) / 1e3))

    def record(self, launches: Sequence[Work]) -> Callable[[], None]:
        return lambda: self.launch(launches)
