"""refengine through its Engine: calls of ``Engine.step`` are timed, with scheduling and sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from serving import PeerEngine, Settings, serve

if TYPE_CHECKING:
    from refengine import LLM, Output


class Refengine:
    """An engine of refengine.

    Args:
        llm: a loaded model.
        about: what to say of it.
    """

    def __init__(self, llm: LLM, about: str) -> None:
        self._llm, self._engine, self.about = llm, llm.engine, about

    def prefill(self, tokens: list[int]) -> float:
        self._submit([tokens], 1)
        seconds = 0.0
        while self._engine.has_work:
            seconds += self._step()[0]
        return seconds

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        self._submit(prompts, steps + 1)
        first = 0
        while first < len(prompts):
            first += len(self._step()[1])
        seconds = []
        while self._engine.has_work:
            taken, outputs = self._step()
            if len(outputs) != len(prompts):
                raise RuntimeError(f"a step made {len(outputs)} tokens for {len(prompts)} requests")
            seconds.append(taken)
        if len(seconds) != steps:
            raise RuntimeError(f"{len(seconds)} steps in the place of {steps}")
        return seconds

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        self._submit([tokens], count)
        found = []
        while self._engine.has_work:
            found += [output.sampled.token for output in self._step()[1] if output.sampled]
        return found

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        return self._llm.logits(tokens).astype(np.float32, copy=False)

    def _submit(self, prompts: list[list[int]], count: int) -> None:
        from refengine import Request

        for prompt in prompts:
            self._engine.submit(Request(tuple(prompt), count))

    def _step(self) -> tuple[float, list[Output]]:
        begin = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - begin
        for output in outputs:
            if output.error is not None:
                raise output.error
        return seconds, outputs


def imports(settings: Settings) -> Callable[[], PeerEngine]:
    import refengine
    from refengine import backend

    chosen = backend.load(settings["backend"])  # imports what the backend is made of
    devices = "; ".join(device.name for device in chosen.devices())
    config = refengine.EngineConfig(
        policy=settings["policy"],
        kv_dtype="float16",
        token_budget=settings["batch"],
        max_sequences=settings["requests"],
        kv_tokens=max(settings["context"], settings["requests"] * settings["room"]),
    )
    about = f"refengine {refengine.__version__}, {chosen.name} ({devices}), {config.policy}"

    def opened() -> Refengine:
        return Refengine(refengine.load(settings["path"], backend=settings["backend"], config=config), about)

    return opened


if __name__ == "__main__":
    serve(imports)
