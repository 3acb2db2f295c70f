"""The engines that are compared, and processes that have one each."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ENGINES = Path(__file__).with_name("peers_engines")

SETTLING = 0.05
"""Seconds between two questions: OpenMP's threads spin for some milliseconds after their last work."""


PATIENCE = 1200
"""Seconds after which a process that does not answer is ended."""


@dataclass(frozen=True)
class Contestant:
    """An engine with its settings.

    Attributes:
        name: what the results call it.
        engine: ``refengine``, ``llama.cpp`` or ``transformers``.
        python: the interpreter that has it.
        script: what serves it, in ``peers_engines``.
        settings: its own, beside those that all share.
        rounds: how many rounds it takes part in, ``None`` for all.
        blas_threads: of NumPy's BLAS: 1 where nothing of the engine goes through it, as it takes memory.
    """

    name: str
    engine: str
    python: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int | None = None
    blas_threads: int = 1


class EngineFailedError(Exception):
    """A contestant's process ended; the text is the last line that it wrote."""


class EngineProcess:
    """A contestant at work on a file; returns from construction when it has its first token.

    Args:
        contestant: who.
        settings: those that all share, see ``peers_engines/serving.py``.

    Attributes:
        first_token_s: seconds from the start of the process to its first token: interpreter, imports,
            opening the file, a short prompt.
        about: version and settings, in its own words.
        baseline: resident bytes / 10^6 after the imports, before the file was opened.
        device_baseline: likewise of the device's memory; ``None`` on a CPU.

    Raises:
        EngineFailedError: it could not be started.
    """

    def __init__(self, contestant: Contestant, settings: dict[str, Any]) -> None:
        self.contestant = contestant
        threads = str(settings["threads"])
        environment = os.environ | {
            "REFENGINE_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": str(min(contestant.blas_threads, settings["threads"])),
        }
        command = [
            contestant.python,
            str(ENGINES / contestant.script),
            json.dumps(settings | contestant.settings),
        ]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        begin = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._errors.close()
            raise EngineFailedError(f"{contestant.python}: {error.strerror}") from error
        hello = self._answer()
        self.first_token_s = time.perf_counter() - begin
        self.about: str = hello["about"]
        self.baseline: float = hello["baseline"]
        self.device_baseline: float | None = hello.get("device_baseline")

    def ask(self, what: str, **question: Any) -> Any:
        """A measurement; see ``peers_engines/serving.py``.

        Raises:
            EngineFailedError: the process ended in the middle of it.
        """
        time.sleep(SETTLING)
        if self._process.stdin is None:
            raise EngineFailedError("the process has no input")
        try:
            self._process.stdin.write(json.dumps({"what": what} | question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why is told below
        return self._answer()

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _answer(self) -> Any:
        line, pipe = "", self._process.stdout
        if pipe is not None:
            if not select.select([pipe], [], [], PATIENCE)[0]:
                self._process.kill()
                self.close()
                raise EngineFailedError(f"no answer within {PATIENCE} s")
            line = pipe.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        said = [text for text in self._errors.read().splitlines() if text.strip()]
        self.close()
        raise EngineFailedError(said[-1] if said else f"exit status {status}")


def rotated(contestants: Sequence[T], turn: int) -> list[T]:
    """Another one is the first at every turn."""
    if not contestants:
        return []
    start = turn % len(contestants)
    return [*contestants[start:], *contestants[:start]]
