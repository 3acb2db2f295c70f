"""The Python API: text in, text out, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from cli.alphabet_model import write_model

import refengine
from refengine import LLM
from refengine.errors import BackendError, ContextLengthError, FormatError, RequestError
from refengine.loader import Checkpoint
from refengine.models import Model


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return refengine.load(str(smollm2_path), backend="numpy")


PROMPT = "The capital of France is"


def test_streaming_gives_what_generating_gives(llm: LLM) -> None:
    """The pieces of a stream, joined, are the text of the completion; each carries its token."""
    completion = llm.generate(PROMPT, max_tokens=6)
    outputs = list(llm.stream(PROMPT, max_tokens=6))
    assert "".join(output.text for output in outputs) == completion.text
    assert [output.sampled for output in outputs] == list(completion.tokens)
    assert completion.text.startswith(" Paris")
    assert completion.finish_reason == "length"
    assert list(completion.prompt_tokens) == llm.tokenizer.encode(PROMPT)


def test_a_batch_gives_each_its_own(llm: LLM) -> None:
    """Several prompts at once give what each gives alone, sampled ones too."""
    prompts = [PROMPT, "def add(a, b):", llm.tokenizer.encode("Once")]
    together = llm.generate_many(prompts, max_tokens=4, temperature=0.8, seed=3)
    assert together == [llm.generate(p, max_tokens=4, temperature=0.8, seed=3) for p in prompts]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    """The stop string is no part of the text, wherever its tokens lie."""
    whole = llm.generate(PROMPT, max_tokens=8).text
    stop = whole[2:4]
    stopped = llm.generate(PROMPT, max_tokens=8, stop=[stop])
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_chat_that_was_announced_gets_the_same_prompts(smollm2_path: Path, llm: LLM) -> None:
    """The process that was started ahead renders the first conversation, and is gone then."""
    before = psutil.Process().children()
    announced = refengine.load(str(smollm2_path), backend="numpy", chat=True)
    (renderer,) = (child for child in psutil.Process().children() if child not in before)
    for text in ("Say hi.", "<|im_end|>"):
        messages = [{"role": "user", "content": text}]
        assert announced.chat_prompt(messages) == llm.chat_prompt(messages)
        assert not renderer.is_running()


def test_a_load_that_fails_leaves_no_process(smollm2_path: Path) -> None:
    """What was started for a conversation ends with the error."""
    before = psutil.Process().children()
    with pytest.raises(BackendError):
        refengine.load(str(smollm2_path), backend="nonsense", chat=True)
    assert psutil.Process().children() == before


def test_a_chat_ends_by_itself(llm: LLM) -> None:
    """The template opens the answer, and the model's end-of-turn token closes it and is not shown."""
    prompt = llm.chat_prompt([{"role": "user", "content": "Say hi."}])
    completion = llm.generate(prompt, max_tokens=60)
    assert completion.finish_reason == "stop"
    assert completion.tokens[-1].token in llm.tokenizer.end_ids
    assert "<|im_end|>" not in completion.text


def test_logits_choose_the_next_token(llm: LLM) -> None:
    """The last row's largest logit is the greedy token; ``first`` leaves out rows and changes none."""
    logits = llm.logits(PROMPT)
    assert logits.dtype == np.float32
    assert logits[-1].argmax() == llm.generate(PROMPT, max_tokens=1).tokens[0].token
    assert np.array_equal(llm.logits(PROMPT, first=3), logits[3:])


def test_a_stream_that_is_dropped_leaves_nothing(llm: LLM) -> None:
    """Closing a stream aborts its request; a refused batch leaves none of its requests."""
    stream = llm.stream(PROMPT, max_tokens=50)
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work
    with pytest.raises(ContextLengthError):
        llm.generate_many([[1], [1] * 9000], max_tokens=1)
    assert not llm.engine.has_work
    assert not llm._outputs


@pytest.mark.parametrize("fields", [{"temprature": 1.0}, {"top_p": 3.0}, {"stop": [""]}, {"max_tokens": -1}])
def test_wrong_parameters_are_refused(llm: LLM, fields: dict) -> None:
    """A misspelt or impossible parameter is an error that names it."""
    with pytest.raises(RequestError):
        llm.generate(PROMPT, **{"max_tokens": 1} | fields)


def test_a_prompt_longer_than_the_context_is_refused(llm: LLM) -> None:
    """It says how long the prompt is and what the context holds."""
    with pytest.raises(ContextLengthError, match=r"9000 tokens.*room for 8192"):
        llm.generate([1] * 9000)


def test_a_stream_nobody_reads_costs_nothing(llm: LLM) -> None:
    """The request begins with the first token asked for."""
    llm.stream(PROMPT, max_tokens=5)
    assert not llm.engine.has_work


@pytest.mark.parametrize("rows", [256, 262])
def test_a_vocabulary_must_match_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Rows without a token, or tokens without a row: a sampled id could mean nothing, so the file is refused."""
    path = write_model(tmp_path / "model.gguf")
    whole = refengine.llm.build

    def build(checkpoint: Checkpoint) -> Model:
        model = whole(checkpoint)
        return Model(replace(model.spec, vocabulary_size=rows), model.weights)

    monkeypatch.setattr(refengine.llm, "build", build)
    with pytest.raises(FormatError, match=rf"260 entries.* {rows} rows"):
        refengine.load(str(path))
