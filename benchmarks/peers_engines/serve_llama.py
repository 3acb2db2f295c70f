"""llama.cpp through its C functions: each ``llama_decode`` is timed, nothing of llama-cpp-python counts.

Its defaults (memory map, repacking), float16 keys and values, and flash attention as the settings say. A
sliding window holds no more than it needs, as in llama.cpp's own tools (the C default holds the whole
context). Several requests at once are sequences of one batch with a stream of the cache each, as in
llama-batched-bench. Between the timed calls the likeliest token is taken of the logits with NumPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from serving import PeerEngine, Settings, serve

PADDING = 256
"""Of the positions of a sequence: llama.cpp rounds up to it."""

EVERY_LAYER = 10_000
"""More layers than a model has: all of them go to the GPU, and the output with them."""


class LlamaCpp:
    """A model, and a context that is made anew where another number of sequences is asked for.

    Args:
        library: the module of C functions.
        settings: see ``serving``; ``flash_attention`` whether to use it.
    """

    def __init__(self, library: Any, settings: Settings) -> None:
        self._c, self._settings = library, settings
        flash = "on" if settings["flash_attention"] else "off"
        self.about = f"llama-cpp-python {library.__version__}, flash attention {flash}, "
        self.about += library.llama_print_system_info().decode().strip(" |")
        self._silent = library.llama_log_callback(lambda *_: None)  # kept: it is called from C
        library.llama_log_set(self._silent, None)
        library.llama_backend_init()
        params = library.llama_model_default_params()
        params.n_gpu_layers = EVERY_LAYER if settings["device"] == "gpu" else 0
        self._model = library.llama_model_load_from_file(settings["path"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['path']}")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(settings["batch"], 0, 1)
        self._context: Any = None
        self._sequences = 0

    def prefill(self, tokens: list[int]) -> float:
        self._empty(1)
        return self._compute([(token, i, 0) for i, token in enumerate(tokens)], {len(tokens) - 1})

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        following = self._fill(prompts)
        seconds = []
        for step in range(steps):
            rows = [(token, len(prompts[i]) + step, i) for i, token in enumerate(following)]
            seconds.append(self._compute(rows, set(range(len(rows)))))
            following = [self._likeliest(i) for i in range(len(rows))]
        return seconds

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        found = self._fill([tokens])
        while len(found) < count:
            self._compute([(found[-1], len(tokens) + len(found) - 1, 0)], {0})
            found.append(self._likeliest(0))
        return found

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        self._empty(1)
        self._compute([(token, i, 0) for i, token in enumerate(tokens)], set(range(len(tokens))))
        return np.stack([self._row(i).copy() for i in range(len(tokens))])

    def _fill(self, prompts: list[list[int]]) -> list[int]:
        """Compute prompts from an empty context; the likeliest token after each."""
        self._empty(len(prompts))
        following = []
        for sequence, prompt in enumerate(prompts):
            rows = [(token, i, sequence) for i, token in enumerate(prompt)]
            for start in range(0, len(rows), self._settings["batch"]):
                chunk = rows[start : start + self._settings["batch"]]
                self._compute(chunk, {len(chunk) - 1})
            following.append(self._likeliest(len(chunk) - 1))
        return following

    def _empty(self, sequences: int) -> None:
        """An empty context for so many sequences."""
        if sequences == self._sequences:
            self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
            return
        if self._context:
            self._c.llama_free(self._context)
        params, settings = self._c.llama_context_default_params(), self._settings
        positions = settings["context"] if sequences == 1 else settings["room"]
        params.n_ctx = sequences * -(-positions // PADDING) * PADDING
        params.n_batch = params.n_ubatch = settings["batch"]
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.flash_attn_type = int(settings["flash_attention"])
        params.swa_full = False
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._sequences = sequences

    def _compute(self, rows: list[tuple[int, int, int]], wanted: set[int]) -> float:
        """Decode rows of (token, position, sequence); seconds that it took."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in wanted
        begin = time.perf_counter()
        status = self._c.llama_decode(self._context, batch)
        self._c.llama_synchronize(self._context)
        seconds = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")
        return seconds

    def _row(self, index: int) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(
            self._c.llama_get_logits_ith(self._context, index), shape=(self._vocabulary,)
        )

    def _likeliest(self, index: int) -> int:
        return int(self._row(index).argmax())


def imports(settings: Settings) -> Callable[[], PeerEngine]:
    import llama_cpp

    if settings["device"] == "gpu" and not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("this llama-cpp-python was built without a GPU: install a build with CUDA")
    return lambda: LlamaCpp(llama_cpp, settings)


if __name__ == "__main__":
    serve(imports)
