"""Rows of the output: OpenAI's completion objects, and what there is instead of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refengine.batch.row import CHAT, Fault, Row
from refengine.request import FinishReason, Output, Request
from refengine.sampling import Sampled
from refengine.tokenizer import Tokenizer

SERVER_ERROR = 500


@dataclass
class Choice:
    """A sample of a request, as far as it has come.

    Attributes:
        stop_ids: the request's: tokens that end it and are no part of its text.
        text: what can be shown.
        sampled: every token, the one that ended it included.
        finish_reason: ``None`` while it goes on.
    """

    stop_ids: frozenset[int]
    text: str = ""
    sampled: list[Sampled] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, output: Output) -> None:
        """Note what a step gave."""
        self.text += output.text
        if output.sampled is not None:
            self.sampled.append(output.sampled)
        self.finish_reason = output.finish_reason

    @property
    def shown(self) -> list[Sampled]:
        """The tokens without one that only says that this is the end."""
        ended = bool(self.sampled) and self.sampled[-1].token in self.stop_ids
        return self.sampled[:-1] if ended else self.sampled


@dataclass(frozen=True)
class Teller:
    """Tells answers as a model's.

    Attributes:
        tokenizer: the model's.
        fingerprint: OpenAI's ``system_fingerprint``.
    """

    tokenizer: Tokenizer
    fingerprint: str

    def answer(
        self, row: Row, requests: Sequence[Request], choices: Sequence[Choice], created: int
    ) -> dict[str, Any]:
        """The row of an answer.

        Args:
            row: the question.
            requests: its requests.
            choices: their samples, those of the first request first.
            created: seconds since 1970.
        """
        chat = row.url == CHAT
        prompt = sum(len(request.prompt) for request in requests)
        generated = sum(len(choice.sampled) for choice in choices)
        logprobs = requests[0].sampling.logprobs is not None
        tell = self._chat_choice if chat else self._text_choice
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{row.digest.hex()}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": row.body["model"],
            "choices": [tell(index, choice, logprobs) for index, choice in enumerate(choices)],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": generated,
                "total_tokens": prompt + generated,
            },
            "system_fingerprint": self.fingerprint,
        }
        return _response(row, 200, body)

    def _chat_choice(self, index: int, choice: Choice, logprobs: bool) -> dict[str, Any]:
        content = [
            {
                **self._named(sampled.token, sampled.logprob),
                "top_logprobs": [self._named(id, logprob) for id, logprob in sampled.top_logprobs],
            }
            for sampled in choice.shown
        ]
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": {"content": content, "refusal": None} if logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _text_choice(self, index: int, choice: Choice, logprobs: bool) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._text_logprobs(choice.shown) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _text_logprobs(self, shown: Sequence[Sampled]) -> dict[str, Any]:
        """Lists with an entry for each token; offsets count characters of the text from its start."""
        decoder = self.tokenizer.stream_decoder(skip_special=True, continuation=True)
        offsets, length = [], 0
        for sampled in shown:
            offsets.append(length)
            length += len(decoder.push(sampled.token))
        return {
            "tokens": [self._name(sampled.token) for sampled in shown],
            "token_logprobs": [sampled.logprob for sampled in shown],
            "top_logprobs": [
                {self._name(id): logprob for id, logprob in sampled.top_logprobs} for sampled in shown
            ],
            "text_offset": offsets,
        }

    def _named(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._name(id), "logprob": logprob, "bytes": [*self.tokenizer.token_bytes(id)]}

    def _name(self, id: int) -> str:
        """A token's text; one that is not whole characters is ``bytes:\\xe2\\x82``."""
        data = self.tokenizer.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def failure(row: Row, fault: Fault) -> dict[str, Any]:
    """The row of an error: an endpoint's reply, or what is wrong with a line that is no request to one."""
    told = {"code": fault.code, "message": fault.message}
    if fault.status is None:
        return {"id": row.id, "custom_id": row.custom_id, "response": None, "error": told}
    kind = "server_error" if fault.status >= SERVER_ERROR else "invalid_request_error"
    return _response(row, fault.status, {"error": {**told, "type": kind, "param": None}})


def is_fault(row: Mapping[str, Any]) -> bool:
    """Whether a row of an output tells an error."""
    response = row["response"]
    return not isinstance(response, dict) or response.get("status_code") != 200


def system_fingerprint(row: Mapping[str, Any]) -> str | None:
    """Of the model that answered; ``None`` where a row does not tell."""
    response = row["response"]
    body = response.get("body") if isinstance(response, dict) else None
    found = body.get("system_fingerprint") if isinstance(body, dict) else None
    return found if isinstance(found, str) else None


def _response(row: Row, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{row.digest.hex()}", "body": body}
    return {"id": row.id, "custom_id": row.custom_id, "response": response, "error": None}
