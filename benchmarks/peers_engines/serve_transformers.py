"""Transformers on the weights of the file, decoded to float32: whole calls of the model are timed.

bfloat16 is slower than float32 on CPUs without instructions for it, and no more accurate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from serving import PeerEngine, Settings, serve


class Transformers:
    """A model in float32.

    Args:
        torch: the module.
        model: the loaded model.
        about: what to say of it.
    """

    def __init__(self, torch: Any, model: Any, about: str) -> None:
        self._torch, self._model, self.about = torch, model, about

    def prefill(self, tokens: list[int]) -> float:
        return self._compute([tokens], None)[0]

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        _, result = self._compute(prompts, None)
        seconds = []
        for _ in range(steps):
            taken, result = self._compute(self._likeliest(result), result.past_key_values)
            seconds.append(taken)
        return seconds

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        _, result = self._compute([tokens], None)
        found = self._likeliest(result)[0]
        while len(found) < count:
            _, result = self._compute([found[-1:]], result.past_key_values)
            found += self._likeliest(result)[0]
        return found

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            rows: NDArray[np.float32] = self._model(self._torch.tensor([tokens])).logits[0].numpy()
        return rows

    def _compute(self, tokens: list[list[int]], past: Any) -> tuple[float, Any]:
        """Seconds and result of a call, which keeps the logits of each request's last token alone."""
        ids = self._torch.tensor(tokens)
        with self._torch.inference_mode():
            begin = time.perf_counter()
            result = self._model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - begin, result

    def _likeliest(self, result: Any) -> list[list[int]]:
        ids: list[list[int]] = result.logits[:, -1:].argmax(-1).tolist()
        return ids


def imports(settings: Settings) -> Callable[[], PeerEngine]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    path = Path(settings["path"])

    def opened() -> Transformers:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        about = f"Transformers {transformers.__version__}, PyTorch {torch.__version__}, float32"
        return Transformers(torch, model.eval(), about)

    return opened


if __name__ == "__main__":
    serve(imports)
