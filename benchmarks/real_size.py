"""Memory at a real model's size: a synthetic file, a full context, planned bytes beside the process's.

    python benchmarks/real_size.py FILE [--context 2048 8192] [--kv float16 int8 int4] [--whole] [--json OUT]

Each engine runs in a process of its own, with its tokenizer, weights as stored (none kept decoded) and one
sequence. The cache is brought to its context by filling its blocks with zeros, and the last steps are
computed there; with ``--whole`` every token is. Printed in 10^9 bytes: what the plan says of the engine, what
the engine has counted at its peak, what the system says of the process (``VmHWM``), and the slope of the plan
per position of context beside the bytes of keys and values themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("file")
    arguments.add_argument("--context", type=int, nargs="+", default=[2048, 8192])
    arguments.add_argument("--kv", nargs="+", default=["float16", "int8", "int4"])
    arguments.add_argument("--token-budget", type=int, default=64)
    arguments.add_argument("--whole", action="store_true", help="compute every token of the context")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    results = []
    print(
        f"{'KV':10}{'context':>8}{'planned':>10}{'counted':>10}{'process':>10}{'difference':>12}{'slope':>8}"
    )
    for kv in options.kv:
        for context in options.context:
            command = [
                sys.executable,
                __file__,
                options.file,
                "--worker",
                "--kv",
                kv,
                "--context",
                str(context),
            ]
            command += ["--token-budget", str(options.token_budget), *["--whole"][: options.whole]]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            results.append(found)
            print(
                f"{kv:10}{context:8}{found['planned'] / 1e9:10.4f}{found['counted'] / 1e9:10.4f}"
                f"{found['process'] / 1e9:10.4f}{(found['process'] - found['counted']) / 1e6:9.1f} MB"
                f"{found['slope']:8.4f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measure(options: argparse.Namespace) -> dict[str, object]:
    from refengine import Engine, EngineConfig, Request
    from refengine.backend.numpy_backend import NumpyBackend
    from refengine.forecast import forecast
    from refengine.loader import read_gguf
    from refengine.memory_report import process_memory
    from refengine.models import Model, build
    from refengine.tokenizer import build_tokenizer

    (context,), (kv,) = options.context, options.kv
    checkpoint = read_gguf(options.file)
    tokenizer = build_tokenizer(checkpoint.metadata)
    model = build(checkpoint)
    model = Model(replace(model.spec, context_length=max(context, model.spec.context_length)), model.weights)
    config = EngineConfig(
        kv_dtype=kv, max_sequences=1, token_budget=options.token_budget, kv_tokens=context, weight_cache=0
    )
    engine = Engine(model, NumpyBackend(), config, tokenizer)
    told = forecast(engine.plan, context - 1, 1, context - 2)
    shorter = forecast(engine.plan, context // 2 - 1, 1, context // 2 - 2)
    slope = (told.peak.total - shorter.peak.total) / (context - context // 2) / told.position_bytes

    vocabulary = model.spec.vocabulary_size
    ids = tuple(1000 + 7 * i % (vocabulary - 1000) for i in range(context - 2))
    engine.submit(Request(ids, 2))
    if not options.whole:
        skip_to(engine, (context - 2) // options.token_budget * options.token_budget)
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
    return {
        "kv": kv, "context": context, "planned": told.peak.total, "counted": engine.memory().peak.total,
        "process": process_memory()[1], "slope": slope, "peak": str(engine.memory().peak),
    }  # fmt: skip


def skip_to(engine, position: int) -> None:
    """Bring the one request to a position as if all before had been computed: its blocks hold zeros."""
    manager, cache, budget = engine._memory, engine._cache, engine.config.token_budget
    for start in range(0, position, budget):
        manager.grow(0, start + budget)
        cache.settle()
        for pool in range(len(engine.plan.layout.groups)):
            zeros = np.zeros(engine.plan.layout.block_bytes(pool), np.uint8)
            for block in set(manager.tables(0)[pool].blocks.tolist()) - {-1}:
                cache._storage.write(pool, block, zeros)
        engine._observe(0)
        manager.release_passed(0, start + budget)
        cache.settle()
    engine._sequences[0].computed = position


if __name__ == "__main__":
    main()
