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
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Settings = dict[str, Any]
"""``path`` of the file; ``threads``; ``batch``, tokens per step at most; ``context``, positions of a request
alone; ``requests`` at once, and ``room``, positions of each of these; ``first``, the prompt of the first
token; and what one engine alone needs."""


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
            holds between the two is its baseline.
    """
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to the standard error
    os.dup2(2, 1)
    settings: Settings = json.loads(sys.argv[1])
    opened = imports(settings)
    before = memory()["VmRSS"]
    engine = opened()
    engine.greedy(settings["first"], 1)

    def tell(answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    tell({"about": engine.about, "baseline": before})
    for line in sys.stdin:
        question = json.loads(line)
        what = question.pop("what")
        if what == "memory":
            tell(memory())
        elif what == "prefill":
            tell([engine.prefill(**question)])
        elif what == "decode":
            tell(engine.decode(**question))
        elif what == "greedy":
            tell(engine.greedy(**question))
        elif what == "logits":
            file = question.pop("file")
            np.save(file, engine.logits(**question))
            tell(file)
        else:
            raise ValueError(f"{what!r} is no question")


def memory() -> dict[str, float]:
    """What Linux says of this process, in 10^6 bytes."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        field[0][:-1]: int(field[1]) * 1024 / 1e6
        for field in fields
        if field[0].startswith(("VmHWM", "VmRSS", "Rss"))
    }
