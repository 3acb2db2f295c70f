"""Running the suite: one property after the other, in a process that may be lost."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import IO, Any, cast

from refengine.errors import BackendError, BackendFailedError
from refengine_conformance.outcome import Outcome, Profile, Task
from refengine_conformance.registry import Property
from refengine_conformance.subject import Subject
from refengine_conformance.support import Prepare

START_S = 120.0
"""Seconds until a worker has started: imports, and whatever a backend does before its first answer."""

PREPARE_S = 1200.0
"""Seconds that a backend may take to prepare itself, once on a machine: see ``PreparingBackend``."""

GRACE_S = 1.0
"""Seconds over its limit that a property gets, to write down where it hangs."""

TRACE_LINES = 30


@dataclass(frozen=True)
class Result:
    """A property, the policy it was held under, and the outcome."""

    property: Property
    policy: str
    outcome: Outcome


def run_suite(
    makers: Iterable[tuple[str, Callable[[], Subject]]],
    properties: tuple[Property, ...],
    profile: Profile,
    *,
    seed: int = 0,
) -> Iterator[Result]:
    """Hold properties against subjects; yields each result as it comes.

    Nothing that a subject does ends the suite: a hang, a crash and any error are outcomes.

    Args:
        makers: name of a policy, and what makes the subject that has it; picklable.
        properties: to be held.
        profile: how hard to look.
        seed: of all drawing: the same seed draws the same examples.
    """
    with Worker() as worker:
        for policy, make in makers:
            for item in properties:
                task = Task(make, item.id, profile.examples, seed, profile.limit_s)
                yield Result(item, policy, worker.hold(task))


class Worker:
    """A process that runs properties; where it is lost, the next task gets a new one.

    So it does where a backend has failed: drivers may refuse everything to a process after that.
    """

    def __init__(self) -> None:
        self._process: _Process | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self, task: Task) -> Outcome:
        """Hold a property against a subject; never raises for what the subject does."""
        started = perf_counter()
        failing: Outcome | None = None
        try:
            process = self._send(task)
            started = perf_counter()
            while True:
                word, value = process.receive(started + task.limit_s + GRACE_S)
                if word == "done":
                    outcome: Outcome = value
                    if outcome.backend_failed:
                        self.close()
                    return outcome
                failing = value  # it looks for a simpler example now
        except WorkerLostError as lost:
            self.close()
            if failing and lost.hung:
                return failing
            what = f"no result within {task.limit_s:g} s" if lost.hung else f"the process ended: {lost.end}"
            return Outcome("hung" if lost.hung else "crashed", perf_counter() - started, what, lost.trace)

    def prepare(self, make: Callable[[], Subject]) -> None:
        """Let a subject's backend do its slow work before properties are held, whose time is limited.

        That it fails is no result: properties that need what is missing will tell.
        """
        with suppress(BackendError):
            self.call(Prepare(make), PREPARE_S)

    def call(self, function: Callable[[], Any], limit_s: float = START_S) -> Any:
        """A function's result, computed there; function and result must be picklable.

        Raises:
            BackendError: the function raised one.
            BackendFailedError: it raised something else, hung or crashed.
        """
        try:
            word, value = self._send(function).receive(perf_counter() + limit_s)
        except WorkerLostError as lost:
            self.close()
            word, value = (
                "failed",
                f"{'it hangs' if lost.hung else f'the process ended: {lost.end}'}\n{lost.trace}",
            )
        if word == "done":
            return value
        if word == "refused":
            kind, parts = value
            raise kind(**parts)
        raise BackendFailedError(
            state="the backend could not be examined",
            available="the backends of `refengine backends`",
            why=value,
            mend="reinstall the package that provides the backend, or tell its authors",
        )

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.end()
        self._process = None

    def _send(self, request: object) -> _Process:
        if self._process is None:
            self._process = _Process()
            self._process.send(sys.path)
            self._process.receive(perf_counter() + START_S)
        self._process.send(request)
        return self._process


class WorkerLostError(Exception):
    """A worker ended, or took too long.

    Attributes:
        hung: whether it took too long.
        end: in words: its signal or exit code.
        trace: the last of what it wrote to stderr: where it was.
    """

    def __init__(self, *, hung: bool, end: str, trace: str) -> None:
        self.hung, self.end, self.trace = hung, end, trace
        super().__init__(end)


class _Process:
    """A worker's process and what goes to and fro."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed in end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refengine_conformance.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={k: v for k, v in os.environ.items() if k != "PYTHONOPTIMIZE"} | {"PYTHONPATH": _path()},
        )
        self._replies: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, value: object) -> None:
        """Send a value; that nobody is there is noticed when the answer is awaited."""
        with suppress(BrokenPipeError, OSError):
            stdin = cast("IO[bytes]", self._process.stdin)
            stdin.write(pickle.dumps(value))
            stdin.flush()

    def receive(self, deadline: float) -> tuple[str, Any]:
        """The next reply.

        Raises:
            WorkerLostError: it has ended, or says nothing until the deadline.
        """
        try:
            reply = self._replies.get(timeout=max(0.0, deadline - perf_counter()))
        except queue.Empty:
            self._process.kill()
            raise self._lost(hung=True) from None
        if reply is None:
            raise self._lost(hung=False)
        return reply

    def end(self) -> None:
        """Kill it and close all files."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _listen(self) -> None:
        stdout = cast("IO[bytes]", self._process.stdout)
        with suppress(EOFError, OSError, pickle.UnpicklingError, ValueError):
            while True:
                self._replies.put(pickle.load(stdout))
        self._replies.put(None)

    def _lost(self, *, hung: bool) -> WorkerLostError:
        code = self._process.wait()
        try:
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        except ValueError:
            end = f"signal {-code}"
        self._errors.seek(0)
        return WorkerLostError(hung=hung, end=end, trace=_trace(self._errors.read().decode(errors="replace")))


def _path() -> str:
    """Where Python looks for modules here, for a process that shall find the same ones.

    ``PYTHONOPTIMIZE`` is not passed on to it: properties are made of assertions.
    """
    return os.pathsep.join(filter(None, sys.path))


def _trace(errors: str) -> str:
    """The end of what a worker wrote to stderr, without the frames that are ours and Hypothesis'."""
    lines = [line.strip() for line in errors.splitlines()]
    ours = ("/hypothesis/", "/refengine_conformance/worker.py", "<frozen runpy>", "Extension modules:")
    return "\n".join(
        [line for line in lines if line and not any(text in line for text in ours)][-TRACE_LINES:]
    )
