"""SmolLM2 and Gemma 3 give Transformers' logits and greedy continuations, on text that finds bugs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference.rounding import decoded_weights, deviation
from reference.tiny_checkpoints import load_gguf_reference
from transformers import PreTrainedModel

import refengine

CONTINUATION = 64

PROMPTS = {
    "plain": "The capital of France is",
    "one token": "The",
    "chat": "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "code": 'def quicksort(items: list[int]) -> list[int]:\n    """Sort."""\n    if len(items) <= 1:\n\treturn',
    "scripts": "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 한국어, 日本語, 中文：你好，世界。",
    "emoji": "Family: 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ﬁ Z\u0335a\u0337l\u0334go \U0001f9d1🏽‍🚀 =>",
    "numbers": "3.14159265358979 2^64 = 18446744073709551616; 1,000,000 × 0x1F =",
    "blank lines": "a\r\n\n\n   b\t\t\tc          d\n\n\n",
}

LONG = (
    "The lighthouse keeper wrote down the weather every evening, and every morning he read what he had "
    "written, for he did not trust the sea to remember. On the {}th day the wind came from the north. "
)


@dataclass(frozen=True)
class Case:
    """One model held three ways: refengine's, Transformers', and its weights in float64."""

    llm: refengine.LLM
    reference: PreTrainedModel
    weights: dict[str, NDArray[np.float64]]
    long_tokens: int


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def case(request: pytest.FixtureRequest) -> Case:
    path: Path = request.getfixturevalue(f"{request.param}_path")
    llm = refengine.load(str(path), backend="numpy")
    long_tokens = {"smollm2": 400, "gemma3": 620}[request.param]  # beyond Gemma's window of 512
    return Case(llm, load_gguf_reference(path), decoded_weights(llm.model), long_tokens)


def test_logits_and_greedy_continuations_are_those_of_transformers(case: Case) -> None:
    """Logits differ by no more than rounding explains, and tokens only where the top two are that close.

    All prompts run in one batch, prefill and decode mixed, and each is compared with Transformers alone.
    """
    tokenizer = case.llm.tokenizer
    prompts = {name: tokenizer.encode(text, parse_special=True) for name, text in PROMPTS.items()}
    story = "".join(LONG.format(day) for day in range(40))
    prompts["long"] = tokenizer.encode(story)[: case.long_tokens]
    end_ids, case.llm.tokenizer.end_ids = case.llm.tokenizer.end_ids, frozenset()
    try:
        completions = case.llm.generate_many(list(prompts.values()), max_tokens=CONTINUATION)
    finally:
        case.llm.tokenizer.end_ids = end_ids

    for (name, prompt), completion in zip(prompts.items(), completions, strict=True):
        generated = [sampled.token for sampled in completion.tokens]
        ids = [*prompt, *generated[:-1]]
        rows = range(len(prompt) - 1, len(ids))
        ours = case.llm.logits(ids, first=rows.start)
        with torch.no_grad():
            answer = case.reference(torch.tensor([ids]), use_cache=False, logits_to_keep=len(rows))
        theirs = answer.logits[0].numpy()
        _, rounding = deviation(case.llm.model, ids, rows, case.weights)
        bound = 2 * rounding

        worst = np.abs(ours - theirs).max(axis=1) / bound
        assert worst.max() <= 1, f"{name}: row {worst.argmax()} is off by {worst.max():.3g} of its bound"
        assert generated == ours.argmax(axis=1).tolist(), f"{name}: decoding and prefill disagree"
        second, first = np.sort(theirs, axis=1)[:, -2:].T
        clear = first - second > bound
        assert clear.mean() > 0.5, f"{name}: the bound is too wide to tell anything"
        differs = clear & (theirs.argmax(axis=1) != generated)
        assert not differs.any(), f"{name}: token {differs.argmax()} is another than Transformers'"
        print(
            f"{name}: {len(prompt)} tokens, worst {worst.max():.3f} of the bound (up to {bound.max():.2e}), "
            f"{clear.sum()} of {len(rows)} tokens decided by more than it"
        )
