"""What a precision policy costs: logits under each beside those under float64.

    OPENBLAS_NUM_THREADS=1 python benchmarks/policy_quality.py [MODEL] [--tokens N] [--policy NAME …]

Every token of ``prose.txt`` is predicted from those before it. Of each prediction: the Kullback–Leibler
divergence from that under float64 (in nats), and whether the likeliest token is the same. The mixed policies
keep keys and values in float16; ``--kv-dtype float32`` shows what products alone cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from kv_quality import compare
from numpy.typing import NDArray

from refengine import EngineConfig, load

POLICIES = ("float32", "mixed16", "mixed8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", nargs="?", default="smollm2")
    arguments.add_argument("--tokens", type=int, default=1000)
    arguments.add_argument("--policy", nargs="+", default=POLICIES)
    arguments.add_argument("--kv-dtype")
    arguments.add_argument("--backend", default="numpy")
    options = arguments.parse_args()

    expected = logits(options.model, "float64", None, options.tokens, "numpy")
    print(f"{options.model}: {len(expected)} tokens, beside float64\n")
    print(f"{'policy':12}{'KLD mean':>11}{'median':>11}{'99 %':>11}{'same top':>10}")
    for policy in options.policy:
        found = logits(options.model, policy, options.kv_dtype, options.tokens, options.backend)
        q = compare(policy, expected, found, 0)
        print(
            f"{policy:12}{q.mean:>11.2e}{q.median:>11.2e}{q.percentile_99:>11.2e}{q.same_top:>9.2%}",
            flush=True,
        )


def logits(model: str, policy: str, kv_dtype: str | None, tokens: int, backend: str) -> NDArray[np.floating]:
    """Logits after each token of the text."""
    text = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
    config = EngineConfig(
        policy=policy,
        kv_dtype=kv_dtype,
        token_budget=256,
        max_sequences=1,
        logit_rows=256,
        kv_tokens=2048,
        weight_cache=0 if policy == "float64" else None,
    )
    llm = load(model, backend=backend, config=config)
    ids = llm.tokenizer.encode(text, add_special=True)[:tokens]
    return llm.engine.prompt_logits(ids)


if __name__ == "__main__":
    main()
