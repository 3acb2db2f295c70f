"""An engine in a process of its own, which measures what it is asked to: JSON lines in, JSON lines out.

Standard library and NumPy only: every engine's interpreter imports this. The process says hello once it has
its first token; the parent has the time from the start of the process until then.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from device_memory import DeviceMemory, Nvml
from numpy.typing import NDArray

T = TypeVar("T")

Settings = dict[str, Any]
"""``path`` of the file; ``threads``; ``batch``, tokens per step at most; ``context``, positions of a request
alone; ``requests`` at once, and ``room``, positions of each of these; ``first``, the prompt of the first
token; ``device``, ``cpu`` or ``gpu``; and what one engine alone needs."""


class PeerEngine(Protocol):
    """What every engine can be asked. Timed is what computes logits, and nothing that prepares it.

    Attributes:
        about: version and settings, for the reader of the results.
    """

    about: str

    def prefill(self, tokens: list[int]) -> float:
        """Seconds until there are the logits of the last of these tokens, in an empty context."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of so many steps that add a token to every prompt; the prompts are not timed."""
        ...

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest continuation, token by token."""
        ...

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits ``[tokens, vocabulary]`` after each token."""
        ...


def serve(imports: Callable[[Settings], Callable[[], PeerEngine]]) -> None:
    """Answer until the parent has no more questions.

    Args:
        imports: imports all that the engine is made of, and gives what opens the file. What the process
            holds between the two is its baseline; on a GPU, which the import starts, the context among it.
    """
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to the standard error
    os.dup2(2, 1)
    settings: Settings = json.loads(sys.argv[1])
    device = DeviceMemory(Nvml()) if settings["device"] == "gpu" else None
    during = _unwatched if device is None else device.during
    opened = during(lambda: imports(settings))
    before, context = memory()["VmRSS"], None if device is None else device.held

    def begin() -> PeerEngine:
        engine = opened()
        engine.greedy(settings["first"], 1)
        return engine

    engine = during(begin)

    def tell(answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    tell({"about": engine.about, "baseline": before, "device_baseline": context})
    for line in sys.stdin:
        question = json.loads(line)
        if question["what"] == "device_peak" and device is not None:
            asked = question["asked"]
            tell(device.peak_during(lambda asked=asked: answer(engine, asked)))
        else:
            tell(during(lambda question=question: answer(engine, question)))


def answer(engine: PeerEngine, question: dict[str, Any]) -> object:
    """What an engine says to a question.

    Raises:
        ValueError: it is none.
    """
    given = {name: value for name, value in question.items() if name not in ("what", "file")}
    match question["what"]:
        case "memory":
            return memory()
        case "prefill":
            return [engine.prefill(**given)]
        case "decode":
            return engine.decode(**given)
        case "greedy":
            return engine.greedy(**given)
        case "logits":
            np.save(question["file"], engine.logits(**given))
            return question["file"]
    raise ValueError(f"{question['what']!r} is no question")


def _unwatched(action: Callable[[], T]) -> T:
    return action()


def memory() -> dict[str, float]:
    """What Linux says of this process, in 10^6 bytes."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        field[0][:-1]: int(field[1]) * 1024 / 1e6
        for field in fields
        if field[0].startswith(("VmHWM", "VmRSS", "Rss"))
    }
