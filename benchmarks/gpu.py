"""refengine on a GPU: Llama-2-7B's shape with random weights in Q4_0, beside Transformers in float16.

    python benchmarks/gpu.py [--parts decode,prefill,batch,memory,profile,tokens,unordered,transformers]
                             [--policy mixed8 mixed16 float32] [--json FILE]

Everything is measured through ``Engine.step``: scheduling, the copy of the results and sampling included.
*Device* figures are those of the executable alone, from the copy of a step's arrays to that of what it gives.
Memory is the driver's: what it has given out, less what it had given out before the first context; the
context itself, and the code of kernels, are stated apart. It is measured with float16 KV and with int8.
*Tokens* are those of SmolLM2 and Gemma 3, continued greedily, beside the golden engine's: the NumPy backend
under float32. *Unordered* are cuBLAS's products of a layer's shapes in float16, beside ours: what it costs
that a row's sums have one order. Every part is a process of its own; all but Transformers and those of cuBLAS
are run under every policy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from peers_figures import common_beginning

SHAPE = "llama-2-7b"
CONTEXTS = (1, 2048, 7936)
GENERATED = 128
REQUESTS = 64
MARKS = (2048, 8192)
KV_DTYPES = ("float16", "int8")
PARTS = ("decode", "prefill", "batch", "memory", "profile", "tokens", "unordered", "transformers")
WITHOUT_POLICY = ("unordered", "transformers")
POLICIES = ("mixed8", "mixed16", "float32")
GOLDEN_MODELS = ("smollm2", "gemma3-270m")
GOLDEN_PROMPTS = (
    "Why is the sky blue?",
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
)
GOLDEN_TOKENS = 24


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path, default=Path("/tmp/llama-2-7b-q4_0.gguf"))
    arguments.add_argument("--shape", default=SHAPE)
    arguments.add_argument("--policy", nargs="+", default=["mixed8"], choices=POLICIES)
    arguments.add_argument("--parts", default=",".join(PARTS))
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        options.policy = options.policy[0]
        print("RESULT " + json.dumps(WORKERS[options.worker](options)))
        return
    asked = jobs(options.parts.split(","), options.policy)
    if not options.model.exists() and any(part != "tokens" for _, part in asked):
        making = [sys.executable, "-m", "refengine", "synth", str(options.model), "--shape", options.shape]
        subprocess.run([*making, "--uniform", "--context", "8192"], check=True, capture_output=True)
    found: dict[str, Any] = {}
    for policy, part in asked:
        given = ["--worker", part, "--model", options.model, "--shape", options.shape]
        given += ["--policy", policy] if policy else []
        started = perf_counter()
        run = subprocess.run(
            [sys.executable, __file__, *map(str, given)], capture_output=True, text=True, check=False
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[-1][7:]) if lines else {"failed": run.stderr[-1500:]}
        (found.setdefault(policy, {}) if policy else found)[part] = result
        seconds = perf_counter() - started
        print(policy or "", part, json.dumps(result, indent=1), f"({seconds:.0f} s)", flush=True)
        if options.json:  # after every part: a run takes long
            options.json.write_text(json.dumps(found, indent=1))


def jobs(parts: list[str], policies: list[str]) -> list[tuple[str | None, str]]:
    """What is run, in order: parts under every policy, and last those that have none."""
    ours = [(policy, part) for policy in policies for part in parts if part not in WITHOUT_POLICY]
    return [*ours, *((None, part) for part in parts if part in WITHOUT_POLICY)]


class Measured:
    """An engine whose executable tells how long it took."""

    def __init__(self, options: argparse.Namespace, **config: Any) -> None:
        from refengine import Engine, EngineConfig, loader, models
        from refengine.backend import load

        before = memory_in_use()
        backend = load("cupy")
        self.context = memory_in_use() - before
        started = perf_counter()
        model = models.build(loader.open(str(options.model)))
        settings = {"policy": options.policy, "token_budget": 2048, "max_sequences": 1, **config}
        self.engine = Engine(model, backend, EngineConfig(**settings))
        self.load_seconds = perf_counter() - started
        self.vocabulary = model.spec.vocabulary_size
        self.device_seconds: list[float] = []
        for name in ("run", "run_candidates"):
            if hasattr(self.engine._executable, name):
                self._time(name)
        self.before = before

    def _time(self, name: str) -> None:
        compute = getattr(self.engine._executable, name)

        def timed(*given: Any) -> Any:
            began = perf_counter()
            result = compute(*given)
            self.device_seconds.append(perf_counter() - began)
            return result

        setattr(self.engine._executable, name, timed)

    def submit(self, prompt: int, generated: int, seed: int = 0) -> int:
        from refengine import Request

        ids = np.random.default_rng(seed).integers(3, self.vocabulary, prompt)
        return self.engine.submit(Request(tuple(int(i) for i in ids), max_tokens=generated))

    def steps(self) -> list[tuple[float, float, int]]:
        """Run until all requests end: of each step its seconds, the device's, and the tokens that it gave."""
        taken = []
        while self.engine.has_work:
            began = perf_counter()
            outputs = self.engine.step()
            failed = [output for output in outputs if output.finish_reason == "error"]
            if failed:
                raise RuntimeError(str(failed[0]))
            taken.append((perf_counter() - began, self.device_seconds[-1], len(outputs)))
        return taken

    @property
    def held(self) -> int:
        """Bytes of the device, the context left out."""
        return memory_in_use() - self.before - self.context


def memory_in_use() -> int:
    """Bytes of the device's memory that its driver has given out."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """One request: tokens per second behind contexts of several lengths."""
    measured = Measured(options, kv_tokens=8192)
    weights = measured.engine.backend.memory().weights
    found: dict[str, Any] = {"load_s": measured.load_seconds, "weights_MB": weights / 1e6}
    for context in CONTEXTS:
        measured.submit(context, GENERATED + 8)
        steps = [step for step in measured.steps() if step[2]][-GENERATED:]
        whole, device = (statistics.median(step[i] for step in steps) for i in (0, 1))
        kv = (context + GENERATED / 2) * 2 * 32 * 4096 * 2
        found[str(context)] = {
            "tok_s": 1 / whole,
            "device_tok_s": 1 / device,
            "device_GB_s": (weights + kv) / device / 1e9,
        }
    return found


def prefill(options: argparse.Namespace) -> dict[str, Any]:
    """2,048 tokens in one step."""
    measured = Measured(options, kv_tokens=2112)
    times = []
    for seed in range(4):
        measured.submit(2048, 1, seed)
        times.append(measured.steps()[0])
    return {
        "tok_s": 2048 / min(t[0] for t in times[1:]),
        "device_tok_s": 2048 / min(t[1] for t in times[1:]),
        "all_ms": [round(t[1] * 1e3, 1) for t in times],
    }


def batch(options: argparse.Namespace) -> dict[str, Any]:
    """Many requests at once, each with 64 tokens of prompt."""
    found = {}
    for requests in (1, 4, 16, REQUESTS):
        measured = Measured(options, max_sequences=requests, kv_tokens=256 * requests)
        for seed in range(requests):
            measured.submit(64, 64, seed)
        steps = [step for step in measured.steps() if step[2] == requests][4:]
        whole, device = (statistics.median(step[i] for step in steps) for i in (0, 1))
        found[str(requests)] = {"tok_s": requests / whole, "device_tok_s": requests / device}
        del measured
    return found


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """What the driver has given out behind 2,048 and 8,192 tokens, before the request ends."""
    found: dict[str, Any] = {}
    for kv_dtype in KV_DTYPES:
        found[kv_dtype] = {}
        for tokens in MARKS:
            measured = Measured(options, kv_tokens=tokens, kv_dtype=kv_dtype)
            measured.submit(tokens - 8, 8)
            generated = 0
            while generated < 7:
                generated += len(measured.engine.step())
            counted = measured.engine.backend.memory()
            found[kv_dtype][str(tokens)] = {
                "held_MB": measured.held / 1e6,
                "context_MB": measured.context / 1e6,
                "counted_MB": counted.total / 1e6,
            }
            del measured
    return found


def tokens(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens of real models beside the golden engine's: how many are the same, from the first on."""
    return {model: same_tokens(model, "cupy", options.policy) for model in GOLDEN_MODELS}


def same_tokens(model: str, backend: str, policy: str) -> dict[str, Any]:
    """Of every prompt the tokens that a backend continues it with as the golden engine does.

    Args:
        model: a name or a path.
        backend: computes under ``policy``; the golden one under float32.
    """
    import refengine
    from refengine import EngineConfig

    prompts, continued = [], []
    for name, under in (("numpy", "float32"), (backend, policy)):
        llm = refengine.load(model, backend=name, config=EngineConfig(policy=under, kv_tokens=1024))
        prompts = [llm.tokenizer.encode(text) for text in GOLDEN_PROMPTS]
        continued.append([greedy(llm.engine, prompt, GOLDEN_TOKENS) for prompt in prompts])
        del llm
    same = [common_beginning(ours, golden) for golden, ours in zip(*continued, strict=True)]
    return {
        "same": same,
        "of": [len(golden) for golden in continued[0]],
        "golden": continued[0],
        "found": continued[1],
    }


def greedy(engine: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation: ``count`` tokens, or fewer where the model ends it."""
    from refengine import Request

    engine.submit(Request(tuple(prompt), max_tokens=count))
    found = []
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            found += [output.sampled.token] if output.sampled else []
    return found


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Device time by kernel, measured by events around each launch, of one decoding and one prefill step."""
    from refengine_cupy.profile import by_kernel

    measured = Measured(options, kv_tokens=8192)
    found = {}
    steps = (("decode at 1", 1), ("decode at 2048", 2048), ("prefill 2048", 2048))
    for name, prompt in steps:
        measured.submit(prompt, 4)
        if name.startswith("decode"):
            measured.engine.step()
        found[name] = by_kernel(measured.engine._executable, measured.engine.step)  # type: ignore[arg-type]
        measured.steps()
    del measured
    measured = Measured(options, max_sequences=REQUESTS, kv_tokens=256 * REQUESTS)
    for seed in range(REQUESTS):
        measured.submit(64, 8, seed)
    while len(measured.engine.step()) < REQUESTS:
        pass
    found[f"decode of {REQUESTS} at 64"] = by_kernel(measured.engine._executable, measured.engine.step)  # type: ignore[arg-type]
    return found


def unordered(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a layer's products by cuBLAS in float16, whose order of sums depends on the shape; and
    of turning integers into float16 before, as a prefill with stored weights would have to.
    """
    import torch

    shapes = {"q, k, v": (12288, 4096), "output": (4096, 4096), "gate, up": (22016, 4096)}
    shapes["down"] = (4096, 11008)
    found: dict[str, Any] = {}
    for tokens in (1, REQUESTS, 2048):
        found[str(tokens)] = {}
        for name, (rows, columns) in shapes.items():
            # Of each several, so that the second-level cache holds none.
            weights = torch.randn(4, rows, columns, device="cuda", dtype=torch.float16)
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
            calls = [partial(torch.matmul, x, weight.T) for weight in weights]
            found[str(tokens)][name] = median_us(torch, calls)
    integers = torch.zeros(4, 22016, 4096, device="cuda", dtype=torch.int8)
    found["int8 to float16, gate and up"] = median_us(torch, [some.half for some in integers])
    return found


def median_us(torch: Any, calls: list[Any]) -> float:
    """Median microseconds of a call, on the device, in a graph of all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(), graph.replay(), end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def transformers(options: argparse.Namespace) -> dict[str, Any]:
    """The peer: the same shape in float16, scaled dot product attention; memory by the driver, too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=8448,
    )  # fmt: skip
    torch.set_default_dtype(torch.float16)
    before = memory_in_use()
    torch.zeros(1, device="cuda")  # starts it
    context = memory_in_use() - before
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 32000, (1, 2048), device="cuda")
    found: dict[str, Any] = {}
    with torch.inference_mode():
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            began = perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            times.append(perf_counter() - began)
        found["prefill_tok_s"] = 2048 / min(times[1:])
        cache, token, times = out.past_key_values, ids[:, :1], []
        for _ in range(48):
            began = perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(perf_counter() - began)
        found["decode_tok_s_at_2048"] = 1 / statistics.median(times[8:])
        found["context_MB"] = context / 1e6
        found["2048"] = taken(torch, before + context)
        del out, cache
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cache, ids = None, torch.randint(3, 32000, (1, MARKS[1]), device="cuda")
        for start in range(0, MARKS[1], MARKS[0]):  # as many at once as refengine takes in a step
            some = ids[:, start : start + MARKS[0]]
            out = model(some, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        found["8192"] = taken(torch, before + context)
    return found


def taken(torch: Any, before: int) -> dict[str, float]:
    """What PyTorch has allocated and reserved at most, and what the driver has given to it by now."""
    torch.cuda.synchronize()
    return {
        "held_MB": (memory_in_use() - before) / 1e6,
        "allocated_MB": torch.cuda.max_memory_allocated() / 1e6,
        "reserved_MB": torch.cuda.max_memory_reserved() / 1e6,
    }


WORKERS = {
    "decode": decode,
    "prefill": prefill,
    "batch": batch,
    "memory": memory,
    "profile": profile,
    "tokens": tokens,
    "unordered": unordered,
    "transformers": transformers,
}


if __name__ == "__main__":
    main()
