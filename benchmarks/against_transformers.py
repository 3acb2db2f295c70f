"""refengine's NumPy backend beside Transformers in float32: same file, same threads, one run.

    python benchmarks/against_transformers.py [MODEL] [--rounds N] [--json FILE]

Each round starts both engines, one after the other, each in a process of its own, so that neither's memory or
threads disturb the other's. Printed are medians over the rounds, and ratios: on a shared machine only
ratios from one run mean anything. Needs the dependency group ``test`` (torch, transformers).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = 512
GENERATED = 48
REQUESTS = 16
REPEATS = 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", nargs="?", default="smollm2")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--json", type=Path, help="write all measurements here")
    arguments.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    options = arguments.parse_args()

    if options.worker:
        print(json.dumps(WORKERS[options.worker](options.model)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
    for _ in range(options.rounds):
        for name, measured in rounds.items():
            command = [sys.executable, __file__, options.model, "--worker", name]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            measured.append(json.loads(output.splitlines()[-1]))
    print_table(options.model, rounds)
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))


def print_table(model: str, rounds: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        name: {key: statistics.median(m[key] for m in measured) for key in measured[0]}
        for name, measured in rounds.items()
    }
    ours, theirs = medians["refengine"], medians["transformers"]
    print(f"{model}: medians of {len(rounds['refengine'])} rounds, alternating\n")
    print(f"{'':34}{'refengine':>12}{'transformers':>14}{'ratio':>8}")
    for key, label in LABELS.items():
        print(f"{label:34}{ours[key]:>12,.1f}{theirs[key]:>14,.1f}{ours[key] / theirs[key]:>8.2f}")


LABELS = {
    "prefill": f"prefill of {PROMPT} tokens, tok/s",
    "decode": f"decode of {GENERATED} tokens, tok/s",
    "decode_many": f"the same, {REQUESTS} requests at once, tok/s",
    "load_s": "load, s",
    "peak_rss_mb": "peak RSS, MB",
}


def run_refengine(name: str) -> dict[str, float]:
    import refengine

    begin = time.perf_counter()
    llm = refengine.load(name, backend="numpy")
    load_s = time.perf_counter() - begin

    def prefill() -> None:
        llm.generate(PROMPT_IDS, max_tokens=1)

    def decode(requests: int) -> Callable[[], None]:
        for number in range(requests):
            llm.engine.submit(refengine.Request(tuple(PROMPT_IDS[number : number + 8]), GENERATED + 1))
        llm.engine.step()  # all prompts, and the first token of each

        def steps() -> None:
            while llm.engine.has_work:
                llm.engine.step()

        return steps

    return measure(prefill, decode, load_s)


def run_transformers(name: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from refengine.loader import resolve

    path = resolve(name)
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    load_s = time.perf_counter() - begin
    model.eval()

    @torch.inference_mode()
    def prefill() -> None:
        model(torch.tensor([PROMPT_IDS]), logits_to_keep=1)

    @torch.inference_mode()
    def decode(requests: int) -> Callable[[], None]:
        prompts = [PROMPT_IDS[number : number + 8] for number in range(requests)]
        first = model(torch.tensor(prompts), use_cache=True)
        cache, token = first.past_key_values, first.logits[:, -1:].argmax(-1)

        @torch.inference_mode()
        def steps() -> None:
            following = token
            for _ in range(GENERATED):
                result = model(following, past_key_values=cache, use_cache=True)
                following = result.logits[:, -1:].argmax(-1)

        return steps

    return measure(prefill, decode, load_s)


WORKERS = {"refengine": run_refengine, "transformers": run_transformers}
PROMPT_IDS = [1000 + 7 * i for i in range(PROMPT)]


def measure(
    prefill: Callable[[], None], decode: Callable[[int], Callable[[], None]], load_s: float
) -> dict[str, float]:
    """Medians of a few runs after one to warm up; ``decode(requests)`` prepares and returns what is timed."""
    prefill()
    return {
        "load_s": load_s,
        "prefill": PROMPT / statistics.median(seconds(prefill) for _ in range(REPEATS)),
        "decode": GENERATED / statistics.median(seconds(decode(1)) for _ in range(REPEATS)),
        "decode_many": REQUESTS
        * GENERATED
        / statistics.median(seconds(decode(REQUESTS)) for _ in range(REPEATS)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
