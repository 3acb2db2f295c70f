"""Rows of the output say what the engine gave, and the engine is kept full."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator
from typing import Any

import pytest
from batch.jsonl import chat, completion

from refengine import LLM, Output, Request
from refengine.batch import BatchRun, Prepared, ReadAhead, Tally, Teller, fingerprint, parse_row, prepare

ALPHABET = f"{string.ascii_lowercase}."


def run(llm: LLM, *documents: Any, engine: Any = None, window: int = 8) -> tuple[list[dict[str, Any]], Tally]:
    """The rows of the output in order, and the tally."""
    written: list[dict[str, Any]] = []
    rows = [parse_row(n, json.dumps(each).encode()) for n, each in enumerate(documents, start=1)]
    tally = Tally()

    def write(row: Any, failed: bool) -> None:
        assert failed == (row["response"] is None or row["response"]["status_code"] != 200)
        written.append(json.loads(json.dumps(row, allow_nan=False)))

    with ReadAhead(prepare(rows, llm, {"m"}), window) as work:
        teller = Teller(llm.tokenizer, fingerprint(llm))
        BatchRun(engine or llm.engine, work, teller, write, tally, clock=lambda: 1234.5).run()
    assert not llm.engine.has_work
    assert tally.rows == len(written) == len(documents)
    return written, tally


def body_of(row: dict[str, Any]) -> dict[str, Any]:
    assert row["response"]["status_code"] == 200, row
    body: dict[str, Any] = row["response"]["body"]
    return body


def test_a_chat_is_answered_as_openai_does(alphabet: LLM) -> None:
    """Every field; the token that ends the turn is counted, and no part of the text."""
    (row,), tally = run(alphabet, chat("a"))
    assert row.keys() == {"id", "custom_id", "response", "error"}
    assert (row["custom_id"], row["error"], row["response"]["request_id"][:4]) == ("a", None, "req_")
    body = body_of(row)
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "chat.completion",
        "created": 1234,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ALPHABET, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 21, "completion_tokens": 28, "total_tokens": 49},
    }
    assert tally == Tally(answered=1, prompt_tokens=21, generated_tokens=28, sampled=28)


def test_a_completion_has_a_choice_for_each_prompt_and_sample(alphabet: LLM) -> None:
    """The samples of the first prompt come first, numbered through."""
    (row,), _ = run(alphabet, completion("a", ["ab", "xy"], n=2, max_tokens=3))
    body = body_of(row)
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    told = [(each["index"], each["text"], each["finish_reason"]) for each in body["choices"]]
    assert told == [(0, "cde", "length"), (1, "cde", "length"), (2, "z.", "stop"), (3, "z.", "stop")]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}


def test_logprobs_of_a_chat(alphabet: LLM) -> None:
    """One entry for each token of the text, with its bytes and the likeliest in falling order."""
    (row,), _ = run(alphabet, chat("a", "Hi", logprobs=True, top_logprobs=2))
    content = body_of(row)["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == ALPHABET
    for each in content:
        assert each["bytes"] == list(each["token"].encode())
        assert each["top_logprobs"][0] == {key: each[key] for key in ("token", "logprob", "bytes")}
        assert 0 >= each["logprob"] > each["top_logprobs"][1]["logprob"] > -math.inf


def test_logprobs_of_a_completion(alphabet: LLM) -> None:
    """Four lists of one length; offsets are those of the tokens in the text."""
    (row,), _ = run(alphabet, completion("a", [0xE2, 0x81], logprobs=1, max_tokens=4))
    choice = body_of(row)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"bytes:\\x{byte:02x}" for byte in range(0x82, 0x86)]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert [[*top] for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]
    assert [[*top.values()] for top in logprobs["top_logprobs"]] == [[p] for p in logprobs["token_logprobs"]]
    (row,), _ = run(alphabet, completion("a", "x", logprobs=0))
    assert body_of(row)["choices"][0]["logprobs"]["top_logprobs"] == [{}, {}, {}][:3]


def test_a_stop_text_ends_an_answer(alphabet: LLM) -> None:
    """And is no part of it."""
    (row,), _ = run(alphabet, chat("a", stop=["ef"]))
    assert body_of(row)["choices"][0]["message"]["content"] == "abcd"


def test_answers_depend_on_their_rows_alone(alphabet: LLM) -> None:
    """Hot ones too: together in any order and alone, each row is the same to the bit."""
    rows = [
        chat(f"c{i}", "x" * (i % 7), temperature=40.0, max_tokens=3 + i % 5, n=1 + i % 2, logprobs=True)
        for i in range(12)
    ] + [completion(f"t{i}", "abcd"[: 1 + i % 4], temperature=30.0) for i in range(6)]
    together, _ = run(alphabet, *rows)
    backwards, _ = run(alphabet, *reversed(rows))
    alone = [run(alphabet, each)[0][0] for each in rows]

    def by_name(found: list[dict[str, Any]]) -> dict[str, Any]:
        return {each["custom_id"]: each for each in found}

    assert by_name(together) == by_name(backwards) == by_name(alone)
    texts = {json.dumps(body_of(each)["choices"]) for each in alone}
    assert len(texts) == len(rows)  # each draws with a seed of its own


def test_rows_come_in_order_of_completion(alphabet: LLM) -> None:
    """A short answer does not wait for a long one."""
    rows, _ = run(alphabet, chat("long", max_tokens=20), chat("short", max_tokens=2), chat("wrong", n=0))
    assert [row["custom_id"] for row in rows] == ["wrong", "short", "long"]


def test_errors_stand_where_answers_would(alphabet: LLM) -> None:
    """What is no request has an ``error``, what an endpoint would refuse a response with a status."""
    too_many = completion("d", n=5)
    rows, tally = run(alphabet, {"custom_id": "a"}, chat("b", n=0), chat("c"), too_many, chat("e", "x" * 300))
    by_name = {row["custom_id"]: row for row in rows}
    assert by_name["a"]["response"] is None
    assert by_name["a"]["error"]["code"] == "missing_required_parameter"
    for name, told in ("b", "n must be"), ("d", "5 samples"), ("e", "room for 256"):
        response = by_name[name]["response"]
        assert (response["status_code"], by_name[name]["error"]) == (400, None)
        assert response["body"]["error"]["type"] == "invalid_request_error"
        assert told in response["body"]["error"]["message"]
    assert (tally.answered, tally.failed) == (1, 4)


class Watched:
    """An engine that notes how full it is, and lets what a test names fail."""

    def __init__(self, llm: LLM, failing: int | None = None) -> None:
        self.engine, self.config, self.failing = llm.engine, llm.engine.config, failing
        self.under_way: dict[int, int] = {}
        self.loads: list[int] = []
        self.aborted: list[int] = []

    def submit(self, request: Request) -> int:
        number = self.engine.submit(request)
        self.under_way[number] = request.samples
        return number

    def abort(self, number: int) -> Output | None:
        self.aborted.append(number)
        self.under_way.pop(number)
        return self.engine.abort(number)

    def step(self) -> list[Output]:
        self.loads.append(sum(self.under_way.values()))
        outputs = []
        for output in self.engine.step():
            first = min(self.under_way, default=0)
            if self.failing is not None and len(self.loads) == self.failing and output.request == first:
                output = Output(output.request, None, "", "error", output.sample, ValueError("broke"))
            if output.finish_reason:
                self.under_way[output.request] -= 1
            outputs.append(output)
        return outputs


def test_the_engine_is_kept_full(alphabet: LLM) -> None:
    """Its four places are taken for as long as there are rows, and never more are asked for."""
    engine = Watched(alphabet)
    run(alphabet, *(chat(str(i), max_tokens=3 + i % 5, n=1 + i % 2) for i in range(16)), engine=engine)
    assert max(engine.loads) == 4
    assert sum(load >= 3 for load in engine.loads) > 0.6 * len(engine.loads)


def test_what_fails_in_the_engine_is_that_rows_error(alphabet: LLM) -> None:
    """With the cause; its other requests are given up, and the other rows go on."""
    engine = Watched(alphabet, failing=2)
    rows, tally = run(
        alphabet, completion("a", ["a", "b", "c"], n=2), *(chat(str(i)) for i in range(3)), engine=engine
    )
    by_name = {row["custom_id"]: row for row in rows}
    assert by_name["a"]["response"]["status_code"] == 500
    assert by_name["a"]["response"]["body"]["error"]["message"] == "ValueError: broke"
    assert [body_of(by_name[str(i)])["choices"][0]["message"]["content"] for i in range(3)] == [ALPHABET] * 3
    assert (tally.answered, tally.failed, len(engine.aborted)) == (3, 1, 2)


def test_no_more_is_read_than_is_needed(alphabet: LLM) -> None:
    """Of endless rows, those in the engine, those that are ready, and one or two between."""
    taken = 0

    def endless() -> Iterator[Prepared]:
        nonlocal taken
        while True:
            taken += 1
            row = parse_row(taken, json.dumps(completion(str(taken), max_tokens=1)).encode())
            yield next(prepare([row], alphabet, {"m"}))

    class EnoughError(Exception):
        pass

    def stop(tally: Tally) -> None:
        assert taken <= tally.rows + 4 + 8 + 2
        if tally.rows > 50:
            raise EnoughError

    with ReadAhead(endless(), 8) as work, pytest.raises(EnoughError):
        BatchRun(alphabet.engine, work, Teller(alphabet.tokenizer, "fp"), lambda *_: None, Tally()).run(stop)
    assert not alphabet.engine.has_work


def test_an_error_in_reading_comes_out() -> None:
    """Where the next item is asked for, after those that came before it; then there are no more."""

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("broke")

    with ReadAhead(failing(), 4) as work:
        assert work.get(wait=True) == 1
        with pytest.raises(ValueError, match="broke"):
            work.get(wait=True)
        assert work.get(wait=True) is None


def test_a_fingerprint_tells_models_apart(alphabet: LLM, base: LLM) -> None:
    """The same model has the same one."""
    assert fingerprint(alphabet) == fingerprint(alphabet) != fingerprint(base)
