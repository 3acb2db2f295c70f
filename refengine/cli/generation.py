"""How answers are to be generated, as the command line asks for it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refengine.llm import LLM
    from refengine.request import Output
    from refengine.sampling import SamplingParams


@dataclass(frozen=True)
class Generation:
    """When an answer ends and how its tokens are chosen.

    Attributes:
        max_tokens: tokens at most; ``None`` for as many as the context holds.
        stop: texts that end it.
        sampling: the choice.
        samples: how many answers.
    """

    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: SamplingParams
    samples: int = 1

    def stream(self, llm: LLM, prompt_ids: Sequence[int]) -> Generator[Output]:
        """Submit a prompt and follow its answers."""
        return llm.stream(
            prompt_ids,
            max_tokens=self.max_tokens,
            stop=self.stop,
            samples=self.samples,
            **asdict(self.sampling),
        )
