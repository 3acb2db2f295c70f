"""Transformers on the weights of the file, decoded: whole calls of the model are timed.

On a CPU in float32: bfloat16 is slower there without instructions for it, and no more accurate. On a GPU in
float16 with PyTorch's scaled dot product attention; a call ends when the GPU has done its work.
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
    """A model on a device.

    Args:
        torch: the module.
        model: the loaded model.
        device: ``cpu`` or ``cuda``.
        about: what to say of it.
    """

    def __init__(self, torch: Any, model: Any, device: str, about: str) -> None:
        self._torch, self._model, self._device, self.about = torch, model, device, about

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
            found = self._model(self._torch.tensor([tokens], device=self._device)).logits[0]
            rows: NDArray[np.float32] = found.float().cpu().numpy()
        return rows

    def _compute(self, tokens: list[list[int]], past: Any) -> tuple[float, Any]:
        """Seconds and result of a call, which keeps the logits of each request's last token alone."""
        ids = self._torch.tensor(tokens, device=self._device)
        with self._torch.inference_mode():
            self._wait()
            begin = time.perf_counter()
            result = self._model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            self._wait()
            return time.perf_counter() - begin, result

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def _likeliest(self, result: Any) -> list[list[int]]:
        ids: list[list[int]] = result.logits[:, -1:].argmax(-1).tolist()
        return ids


def imports(settings: Settings) -> Callable[[], PeerEngine]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    path = Path(settings["path"])
    device, dtype = ("cuda", torch.float16) if settings["device"] == "gpu" else ("cpu", torch.float32)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("this PyTorch finds no GPU")
        torch.zeros(1, device=device)  # starts it

    def opened() -> Transformers:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="sdpa"
        )
        kind = str(dtype).removeprefix("torch.")
        about = (
            f"Transformers {transformers.__version__}, PyTorch {torch.__version__}, {kind}, sdpa, {device}"
        )
        return Transformers(torch, model.to(device).eval(), device, about)

    return opened


if __name__ == "__main__":
    serve(imports)
