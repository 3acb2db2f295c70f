"""Peak memory at a full context: refengine's ways to hold weights beside llama.cpp, same file, one run.

    python benchmarks/memory.py [MODEL] [--context N] [--rounds N] [--llama-python PYTHON] [--json FILE]

Each engine computes a prompt that fills the context but for the tokens that it then generates, in a process
of its own. Printed are medians over the rounds: the process's peak RSS (``VmHWM``), what of it was there
before the model was opened, the memory of its own and the pages of files that it has at the end, the bytes
that refengine's plan promised, and speeds. llama.cpp runs where ``llama_cpp`` can be imported by PYTHON (this
one, unless another is named), through its C functions, so that nothing of llama-cpp-python's own counts; its
KV cache is float16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCH = 512
"""Tokens per step at most, in both engines."""

GENERATED = 8

VARIANTS: dict[str, dict[str, object]] = {
    "decoded, float32 KV": {},
    "decoded, float16 KV": {"kv_dtype": "float16"},
    "mapped, float32 KV": {"weight_cache": 0},
    "mapped, float16 KV": {"weight_cache": 0, "kv_dtype": "float16"},
    "in 200 MiB, float16 KV": {"memory": 200 * 2**20, "kv_dtype": "float16"},
    "streamed, float16 KV": {"memory": "least", "kv_dtype": "float16"},
}
"""refengine's variants: fields of ``EngineConfig``; ``least`` is the smallest limit that is not refused."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", nargs="?", default="smollm2")
    arguments.add_argument("--context", type=int, default=2048)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument(
        "--threads", type=int, default=2, help="of llama.cpp; OPENBLAS_NUM_THREADS for refengine"
    )
    arguments.add_argument("--llama-python", default=sys.executable)
    arguments.add_argument("--json", type=Path, help="write all measurements here")
    arguments.add_argument("--only", nargs="*", default=["llama.cpp", *VARIANTS], help="run these rows alone")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    options = arguments.parse_args()

    if options.worker:
        run = run_llama if options.worker == "llama.cpp" else run_refengine
        print(json.dumps(run(options)))
        return
    from refengine.loader import resolve

    path = str(resolve(options.model))
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name in options.only:
            python = options.llama_python if name == "llama.cpp" else sys.executable
            command = [python, __file__, path, "--worker", name]
            command += ["--context", str(options.context), "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                results.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"{name}: {(done.stderr.splitlines() or ['failed'])[-1]}", file=sys.stderr)
    print_table(options, results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def print_table(options: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> None:
    print(
        f"{options.model}, context of {options.context}: medians of {options.rounds} rounds, in 10^6 bytes\n"
    )
    print(f"{'':24}" + "".join(f"{label:>14}" for label in LABELS.values()))
    for name, measured in results.items():
        cells = (
            statistics.median(m[key] for m in measured) if key in measured[0] else None for key in LABELS
        )
        print(f"{name:24}" + "".join(f"{'' if cell is None else f'{cell:,.1f}':>14}" for cell in cells))


LABELS = {
    "peak": "peak RSS",
    "before": "before model",
    "anonymous": "own memory",
    "file": "file pages",
    "planned": "planned",
    "prefill": "prefill tok/s",
    "decode": "decode tok/s",
}


def run_refengine(options: argparse.Namespace) -> dict[str, float]:
    import refengine
    from refengine.errors import MemoryLimitError

    fields = {"kv_tokens": options.context, "max_sequences": 1, "token_budget": BATCH} | VARIANTS[
        options.worker
    ]
    before = memory()["VmRSS"]
    if fields.get("memory") == "least":
        try:
            refengine.load(
                options.model, backend="numpy", config=refengine.EngineConfig(**{**fields, "memory": 0})
            )
        except MemoryLimitError as error:
            fields["memory"] = error.needed
    llm = refengine.load(options.model, backend="numpy", config=refengine.EngineConfig(**fields))
    engine = llm.engine
    ids = token_ids(options.context, llm.model.spec.vocabulary_size)
    engine.submit(refengine.Request(tuple(ids), GENERATED))
    begin = time.perf_counter()
    while engine.has_work and not engine.step():
        pass
    prefill = time.perf_counter() - begin
    begin = time.perf_counter()
    while engine.has_work:
        engine.step()
    decode = time.perf_counter() - begin
    return figures(before, len(ids) / prefill, (GENERATED - 1) / decode) | {
        "planned": (engine.plan.fixed_bytes + engine.plan.layout.nbytes) / 1e6
    }


def run_llama(options: argparse.Namespace) -> dict[str, float]:
    import llama_cpp as c

    before = memory()["VmRSS"]
    silent = c.llama_log_callback(lambda *_: None)  # kept: it is called from C
    c.llama_log_set(silent, None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(options.model.encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = options.context, BATCH, BATCH
    params.n_threads = params.n_threads_batch = options.threads
    context = c.llama_init_from_model(model, params)
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    ids = token_ids(options.context, vocabulary)

    def compute(tokens: list[int]) -> None:
        array = (c.llama_token * len(tokens))(*tokens)
        if c.llama_decode(context, c.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")

    def prefill() -> None:
        for start in range(0, len(ids), BATCH):
            compute(ids[start : start + BATCH])

    def decode() -> None:
        for _ in range(GENERATED - 1):
            logits = c.llama_get_logits_ith(context, -1)
            compute([max(range(vocabulary), key=logits.__getitem__)])

    return figures(before, len(ids) / seconds(prefill), (GENERATED - 1) / seconds(decode))


def figures(before: float, prefill: float, decode: float) -> dict[str, float]:
    now = memory()
    return {
        "peak": now["VmHWM"],
        "before": before,
        "anonymous": now["RssAnon"],
        "file": now["RssFile"],
        "prefill": prefill,
        "decode": decode,
    }


def token_ids(context: int, vocabulary: int) -> list[int]:
    """A prompt that leaves room for what is generated."""
    return [1000 + 7 * i % (vocabulary - 1000) for i in range(context - GENERATED)]


def memory() -> dict[str, float]:
    """What Linux says of this process, in MB."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        field[0][:-1]: int(field[1]) * 1024 / 1e6 for field in fields if field[0].startswith(("Vm", "Rss"))
    }


def seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
