"""refengine on a GPU: Llama-2-7B's shape with random weights in Q4_0, beside Transformers in float16.

    python benchmarks/gpu.py [--parts decode,prefill,batch,memory,profile,transformers] [--json FILE]

Everything is measured through ``Engine.step``: scheduling, the copy of the logits and sampling included.
*Device* figures are those of ``Executable.run`` alone, from the copy of a step's arrays to that of the
logits. Memory is the driver's: what it has given out, less what it had given out before the first context;
the context itself, and the code of kernels, are stated apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

SHAPE = "llama-2-7b"
CONTEXTS = (1, 2048, 7936)
GENERATED = 128
REQUESTS = 64
PARTS = ("decode", "prefill", "batch", "memory", "profile", "transformers")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path, default=Path("/tmp/llama-2-7b-q4_0.gguf"))
    arguments.add_argument("--shape", default=SHAPE)
    arguments.add_argument("--policy", default="mixed8")
    arguments.add_argument("--parts", default=",".join(PARTS))
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        print("RESULT " + json.dumps(WORKERS[options.worker](options)))
        return
    if not options.model.exists():
        making = [sys.executable, "-m", "refengine", "synth", str(options.model), "--shape", options.shape]
        subprocess.run([*making, "--uniform", "--context", "8192"], check=True, capture_output=True)
    found: dict[str, Any] = {}
    for part in options.parts.split(","):
        given = [
            "--worker",
            part,
            "--model",
            options.model,
            "--policy",
            options.policy,
            "--shape",
            options.shape,
        ]
        started = perf_counter()
        run = subprocess.run(
            [sys.executable, __file__, *map(str, given)], capture_output=True, text=True, check=False
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        found[part] = json.loads(lines[-1][7:]) if lines else {"failed": run.stderr[-1500:]}
        print(part, json.dumps(found[part], indent=1), f"({perf_counter() - started:.0f} s)", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


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
        run = self.engine._executable.run

        def timed(batch: Any) -> Any:
            began = perf_counter()
            logits = run(batch)
            self.device_seconds.append(perf_counter() - began)
            return logits

        self.engine._executable.run = timed  # type: ignore[method-assign]
        self.before = before

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
    for tokens in (2048, 8192):
        measured = Measured(options, kv_tokens=tokens)
        measured.submit(tokens - 8, 8)
        generated = 0
        while generated < 7:
            generated += len(measured.engine.step())
        counted = measured.engine.backend.memory()
        found[str(tokens)] = {
            "held_MB": measured.held / 1e6,
            "context_MB": measured.context / 1e6,
            "counted_MB": counted.total / 1e6,
        }
        del measured
    return found


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Device time by kernel, measured by events around each launch, of one decoding and one prefill step."""
    from refengine_cupy.profile import by_kernel

    measured = Measured(options, kv_tokens=8192)
    found = {}
    for name, prompt in (("decode at 1", 1), ("decode at 2048", 2048), ("prefill 2048", 2048)):
        measured.submit(prompt, 4)
        if name.startswith("decode"):
            measured.engine.step()
        found[name] = by_kernel(measured.engine._executable, measured.engine.step)  # type: ignore[arg-type]
        measured.steps()
    return found


def transformers(options: argparse.Namespace) -> dict[str, Any]:
    """The peer: the same shape in float16, scaled dot product attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=8448,
    )  # fmt: skip
    torch.set_default_dtype(torch.float16)
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
        found["allocated_MB_at_2048"] = torch.cuda.max_memory_allocated() / 1e6
        found["reserved_MB_at_2048"] = torch.cuda.max_memory_reserved() / 1e6
    return found


WORKERS = {
    "decode": decode,
    "prefill": prefill,
    "batch": batch,
    "memory": memory,
    "profile": profile,
    "transformers": transformers,
}


if __name__ == "__main__":
    main()
