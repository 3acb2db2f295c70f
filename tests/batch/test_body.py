"""Every parameter of a body is obeyed or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from batch.jsonl import chat, completion
from cli.alphabet_model import END, chat_ids

from refengine import LLM, Request, SamplingParams
from refengine.batch import Fault, Prepared, Row, parse_row, prepare


def row_of(document: dict[str, Any]) -> Row:
    return parse_row(1, json.dumps(document).encode())


def prepared(llm: LLM, document: dict[str, Any]) -> Prepared:
    (found,) = prepare([row_of(document)], llm, {"m"})
    return found


def request_of(llm: LLM, document: dict[str, Any]) -> Request:
    found = prepared(llm, document)
    assert found.fault is None, found.fault
    (request,) = found.requests
    return request


def fault_of(llm: LLM, document: dict[str, Any]) -> Fault:
    found = prepared(llm, document)
    assert found.fault is not None
    assert not found.requests
    return found.fault


def test_a_chat_goes_through_the_template(alphabet: LLM) -> None:
    """Parts of a message are lines; what it says is text, whatever it says."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "<|im_end|>"}]
    request = request_of(alphabet, chat("x", messages=messages))
    assert list(request.prompt) == chat_ids(("system", "a\nb"), ("user", "<|im_end|>"))
    assert request.stop_ids == {END} | request.stop_ids


def test_parameters_are_obeyed(alphabet: LLM) -> None:
    """Each arrives in the request."""
    request = request_of(
        alphabet,
        chat("x", max_tokens=5, max_completion_tokens=5, temperature=0.5, top_p=0.9, seed=4, stop=["a", "b"],
             n=2, logprobs=True, top_logprobs=3, top_k=7, min_p=0.1, repetition_penalty=1.5, user="me"),
    )  # fmt: skip
    assert request.max_tokens == 5
    assert request.sampling == SamplingParams(0.5, 7, 0.9, 0.1, 1.5, 4, 3)
    assert (request.stop, request.samples) == (("a", "b"), 2)
    request = request_of(alphabet, completion("x", max_tokens=3, stop="z", logprobs=0))
    assert (request.max_tokens, request.stop, request.sampling.logprobs) == (3, ("z",), 0)


def test_the_defaults_are_openais(alphabet: LLM) -> None:
    """Temperature 1; 16 tokens of a completion, and of a chat as many as there is room for; a seed of its own."""
    for document, limit in (chat("x"), 256 - len(chat_ids(("user", "Hi")))), (completion("x"), 16):
        del document["body"]["temperature"]
        seed = row_of(document).seed
        assert request_of(alphabet, document).sampling == SamplingParams(temperature=1.0, seed=seed)
        assert request_of(alphabet, document).max_tokens == limit


def test_null_is_as_good_as_nothing(alphabet: LLM) -> None:
    """Clients write null for what they do not set."""
    nothing = dict.fromkeys(["max_tokens", "temperature", "n", "stop", "logprobs", "tools", "audio"])
    assert request_of(alphabet, chat("x", **nothing)) == request_of(alphabet, chat("x", temperature=1))


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("<|im_end|>", [list(b"<|im_end|>")]),
    ],
)
def test_a_completion_takes_prompts_in_every_form(alphabet: LLM, prompt: Any, ids: list[list[int]]) -> None:
    """A text, token ids, or a list of either; in a text, names of control tokens are text."""
    requests = prepared(alphabet, completion("x", prompt)).requests
    assert [list(request.prompt) for request in requests] == ids


NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "stream": False,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "user": "someone",
}


def test_what_asks_for_nothing_is_accepted(alphabet: LLM) -> None:
    """The neutral values of parameters that are not implemented."""
    assert request_of(alphabet, chat("x", **NEUTRAL)) == request_of(alphabet, chat("x"))


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"temprature": 1}, "is it temperature?"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported: leave it out or set it to 0"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"stream": True}, "stream is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"audio": {}}, "audio is not supported: leave it out"),
        ({"prompt": "a"}, "unknown parameter 'prompt'"),
        ({"user": 1}, "user must be a string"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "contradict"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 2}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
        ({"n": 0}, "n must be at least 1"),
        ({"stop": [1]}, "stop must be"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logprobs": 3}, "logprobs must be true or false"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"messages": []}, "at least one"),
        ({"messages": None}, "at least one"),
        ({"messages": "Hi"}, "a list of messages"),
        ({"messages": ["Hi"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role must be one of system, user, assistant"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name is not supported"),
        ({"messages": [{"role": "user"}]}, "content must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(alphabet: LLM, parameters: dict[str, Any], told: str) -> None:
    """The error names the parameter."""
    fault = fault_of(alphabet, chat("x", **parameters))
    assert (fault.status, fault.code) == (400, "invalid_request")
    assert told in fault.message


@pytest.mark.parametrize(
    ("prompt", "parameters", "told"),
    [
        (None, {}, "prompt is missing"),
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([[]], {}, "empty"),
        ([1, "a"], {}, "prompt must be text, token ids"),
        ("a", {"logprobs": True}, "logprobs must be an integer"),
        ("a", {"echo": True}, "echo is not supported"),
        ("a", {"best_of": 3}, "best_of is not supported"),
        ("a", {"max_completion_tokens": 3}, "unknown parameter 'max_completion_tokens'"),
    ],
)
def test_completions_are_as_strict(alphabet: LLM, prompt: Any, parameters: dict[str, Any], told: str) -> None:
    """Parameters of chats alone are unknown there."""
    fault = fault_of(alphabet, completion("x", prompt, **parameters))
    assert fault.status == 400
    assert told in fault.message


def test_the_model_must_be_this_one(alphabet: LLM) -> None:
    """Another name, or none, is refused: the answer would not be that model's."""
    fault = fault_of(alphabet, chat("x", model="gpt-4o-mini"))
    assert (fault.status, fault.code) == (404, "model_not_found")
    assert "--model-name" in fault.message
    assert fault_of(alphabet, chat("x", model=None)).code == "missing_required_parameter"


def test_a_prompt_without_room_for_an_answer_is_refused(alphabet: LLM) -> None:
    """It says how many tokens there is room for."""
    fault = fault_of(alphabet, chat("x", "a" * 300))
    assert fault.code == "context_length_exceeded"
    assert "room for 256" in fault.message


def test_a_model_without_template_does_not_chat(base: LLM) -> None:
    """It completes."""
    assert "no chat template" in fault_of(base, chat("x")).message
    assert request_of(base, completion("x", "a")).prompt == (97,)


def test_rows_come_in_order_whatever_they_are(alphabet: LLM) -> None:
    """Chats, completions and errors, more than are rendered together."""
    documents = [
        (chat(str(i), str(i)), completion(str(i), "a"), chat(str(i), n=0), {"custom_id": str(i)})[i % 4]
        for i in range(40)
    ]
    rows = [row_of(document) for document in documents]
    found = list(prepare(iter(rows), alphabet, {"m"}))
    assert [each.row for each in found] == rows
    assert [each.fault is None for each in found] == [True, True, False, False] * 10
    prompts = [[*each.requests[0].prompt] for each in found[::4]]
    assert prompts == [chat_ids(("user", str(i))) for i in range(0, 40, 4)]
