"""What the precision of the KV cache costs: logits over each KV dtype beside those over float32.

    OPENBLAS_NUM_THREADS=1 python benchmarks/kv_quality.py [MODEL] [--tokens N] [--kv-dtype NAME …]

Every token of ``prose.txt`` is predicted from those before it. Of each prediction: the Kullback–Leibler
divergence from that over float32 (in nats), and whether the likeliest token is the same. Bytes are those that
a token adds to the cache in all layers, scales included; layers with a window stop growing when it is full.
The exact copies beside a sealed cache (the first block and the current one of each sequence) are not among
them: they take the same for any context.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refengine import EngineConfig, load

KV_DTYPES = ("float16", "int8", "int8/int4", "int4/int8", "int4")
ROWS = 64
"""Rows of logits compared at once."""


@dataclass(frozen=True)
class Quality:
    """How predictions over one KV dtype differ from those over float32."""

    kv_dtype: str
    bytes_per_token: float
    mean: float
    median: float
    percentile_99: float
    same_top: float


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", nargs="?", default="smollm2")
    arguments.add_argument("--tokens", type=int, default=1000)
    arguments.add_argument("--kv-dtype", nargs="+", default=KV_DTYPES)
    arguments.add_argument("--json", type=Path, help="write all figures here")
    options = arguments.parse_args()

    expected, nbytes = logits(options.model, "float32", options.tokens)
    print(f"{options.model}: {len(expected)} tokens, beside a float32 cache of {nbytes:,.0f} bytes a token\n")
    print(f"{'keys/values':12}{'bytes/token':>12}{'KLD mean':>11}{'median':>11}{'99 %':>11}{'same top':>10}")
    found = []
    for kv_dtype in options.kv_dtype:
        found.append(compare(kv_dtype, expected, *logits(options.model, kv_dtype, options.tokens)))
        q = found[-1]
        print(
            f"{kv_dtype:12}{q.bytes_per_token:>12,.0f}{q.mean:>11.2e}{q.median:>11.2e}{q.percentile_99:>11.2e}"
            f"{q.same_top:>9.2%}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(q) for q in found], indent=1))


def logits(model: str, kv_dtype: str, tokens: int) -> tuple[NDArray[np.floating], float]:
    """Logits after each token of the text, and bytes that a token adds to the cache."""
    text = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
    config = EngineConfig(
        kv_dtype=kv_dtype, token_budget=256, max_sequences=1, logit_rows=256, kv_tokens=2048
    )
    llm = load(model, backend="numpy", config=config)
    ids = llm.tokenizer.encode(text, add_special=True)[:tokens]
    layout = llm.engine.plan.layout
    nbytes = sum(
        layout.block_bytes(number) / layout.block_size
        for number, pool in enumerate(layout.groups)
        if not pool.recent
    )
    return llm.engine.prompt_logits(ids), nbytes


def compare(
    kv_dtype: str, expected: NDArray[np.floating], logits: NDArray[np.floating], nbytes: float
) -> Quality:
    divergence, same = [], []
    for start in range(0, len(expected), ROWS):
        rows = slice(start, start + ROWS)
        p, q = log_softmax(expected[rows]), log_softmax(logits[rows])
        divergence.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    kld = np.concatenate(divergence)
    mean, median, percentile = kld.mean(), np.median(kld), np.percentile(kld, 99)
    return Quality(
        kv_dtype, nbytes, float(mean), float(median), float(percentile), float(np.mean(np.concatenate(same)))
    )


def log_softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    y -= y.max(axis=1, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=1, keepdims=True))
    return y


if __name__ == "__main__":
    main()
