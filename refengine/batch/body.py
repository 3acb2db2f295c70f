"""From a row's body to requests of the engine: every parameter is obeyed or refused.

The parameters are those of OpenAI's *Create chat completion* and *Create completion*, with their defaults:
``temperature`` is 1, and a completion has 16 tokens at most unless ``max_tokens`` says otherwise. A row
without ``seed`` draws with one of its own, made from its ``custom_id``, so that rows with the same prompt
differ and the same row comes out the same again. As in vLLM's API, ``top_k``, ``min_p`` and
``repetition_penalty`` are parameters too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, repeat
from types import MappingProxyType
from typing import Any, TypeVar

from refengine.batch.row import CHAT, Fault, Row
from refengine.errors import ContextLengthError, RefengineError, RequestError
from refengine.llm import LLM
from refengine.request import Request
from refengine.sampling import SamplingParams

Value = TypeVar("Value")

BAD_REQUEST, NOT_FOUND = 400, 404

CHUNK = 16
"""Rows whose conversations are rendered together, since to start the process for it takes 0.1 s."""

COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that says nothing of it."""

ROLES = ("system", "user", "assistant")

SHARED = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "logprobs"}
    | {"top_k", "min_p", "repetition_penalty"}
)
PARAMETERS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "chat": SHARED | {"messages", "max_completion_tokens", "top_logprobs"},
        "completion": SHARED | {"prompt"},
    }
)
"""What is obeyed."""

IRRELEVANT = frozenset({"user", "safety_identifier", "prompt_cache_key"})
"""Strings that tell OpenAI who asks; no answer depends on them."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "frequency_penalty": (0, 0.0),
        "presence_penalty": (0, 0.0),
        "logit_bias": ({},),
        "stream": (False,),
        "stream_options": (),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "metadata": ({},),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }
)
"""What is not implemented, each with the values that ask for nothing; null always does."""


@dataclass(frozen=True)
class Prepared:
    """A row that is ready for the engine.

    Attributes:
        row: the row.
        requests: one per prompt; none where there is a ``fault``.
        fault: why it cannot be answered.
    """

    row: Row
    requests: tuple[Request, ...] = ()
    fault: Fault | None = None


@dataclass(frozen=True)
class _Asked:
    """What a body asks for, its conversation not yet rendered.

    Attributes:
        messages: of a chat, else empty.
        prompts: of a completion, else empty.
        limit: tokens at most; ``None`` for as many as there is room for.
    """

    messages: list[dict[str, str]]
    prompts: list[list[int]]
    limit: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]
    samples: int


def prepare(rows: Iterable[Row], llm: LLM, names: Collection[str]) -> Iterator[Prepared]:
    """The requests that rows ask for, in order; `CHUNK` of them are held at a time.

    Args:
        rows: the rows.
        llm: the model.
        names: what rows may call it.
    """
    source = iter(rows)
    while chunk := [*islice(source, CHUNK)]:
        asked = [_read(row, llm, names) for row in chunk]
        chats = [each.messages for each in asked if isinstance(each, _Asked) and each.messages]
        rendered = _render(chats, llm)
        for row, each in zip(chunk, asked, strict=True):
            if isinstance(each, Fault):
                yield Prepared(row, fault=each)
            else:
                yield _prepared(row, each, [next(rendered)] if each.messages else each.prompts, llm)


def refusal(error: RefengineError) -> Fault:
    """What is told of a request that cannot be served as asked."""
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_request"
    return Fault(str(error), code, BAD_REQUEST)


class _Body:
    """A body's fields, by name; null is as good as nothing."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name: value for name, value in fields.items() if value is not None}

    def take(self, name: str, holds: Callable[[Any], bool], rule: str) -> Any:
        """A field's value, ``None`` where it is not given.

        Raises:
            RequestError: it is not of its type.
        """
        value = self._fields.get(name)
        if value is not None and not holds(value):
            raise RequestError(f"{name} must be {rule}, not {_shown(value)}")
        return value

    def integer(self, name: str) -> int | None:
        """A whole number."""
        value: int | None = self.take(name, _is_integer, "an integer")
        return value

    def number(self, name: str) -> float | None:
        """A number."""
        value: float | None = self.take(name, _is_number, "a number")
        return value

    def check(self, known: Collection[str]) -> None:
        """Refuse what nobody obeys.

        Raises:
            RequestError: a parameter is unknown, or asks for something that is not implemented.
        """
        for name, value in self._fields.items():
            if name in known:
                continue
            if name in IRRELEVANT:
                self.take(name, _is_text, "a string")
            elif (neutral := NEUTRAL.get(name)) is None:
                near = get_close_matches(name, known, n=1)
                raise RequestError(f"unknown parameter {name!r}{f': is it {near[0]}?' if near else ''}")
            elif not any(type(value) is type(each) and value == each for each in neutral):
                instead = f" or set it to {_shown(neutral[0])}" if neutral else ""
                raise RequestError(f"{name} is not supported: leave it out{instead}")


def _read(row: Row, llm: LLM, names: Collection[str]) -> _Asked | Fault:
    if row.fault is not None:
        return row.fault
    body, chat = _Body(row.body), row.url == CHAT
    try:
        model = body.take("model", _is_text, "a string")
        if model is None or model not in names:
            return _wrong_model(model, names)
        body.check(PARAMETERS["chat" if chat else "completion"])
        samples = _or(body.integer("n"), 1)
        if samples < 1:
            raise RequestError(f"n must be at least 1, not {samples}")
        stop = body.take("stop", _is_text_or_texts, "a string or a list of strings")
        return _Asked(
            _messages(body) if chat else [],
            [] if chat else _prompts(body, llm),
            _limit(body, chat),
            _sampling(body, row, samples, chat),
            (stop,) if isinstance(stop, str) else tuple(stop or ()),
            samples,
        )
    except RefengineError as error:
        return refusal(error)


def _render(chats: list[list[dict[str, str]]], llm: LLM) -> Iterator[list[int] | RefengineError]:
    if not chats:
        return iter(())
    try:
        return iter(llm.chat_prompts(chats))
    except RequestError as error:  # there is no template
        return repeat(error)


def _prepared(row: Row, asked: _Asked, prompts: Sequence[list[int] | RefengineError], llm: LLM) -> Prepared:
    end_ids = frozenset(llm.tokenizer.end_ids)
    requests = []
    try:
        for ids in prompts:
            if isinstance(ids, RefengineError):
                raise ids
            limit = _room(llm, len(ids)) if asked.limit is None else asked.limit
            requests.append(
                Request(tuple(ids), limit, asked.sampling, end_ids, asked.stop, samples=asked.samples)
            )
    except RefengineError as error:
        return Prepared(row, fault=refusal(error))
    return Prepared(row, tuple(requests))


def _sampling(body: _Body, row: Row, samples: int, chat: bool) -> SamplingParams:
    seed = _or(body.integer("seed"), row.seed)
    if seed + samples > 2**64:
        raise RequestError(f"seed + n must be at most 2**64: sample i is drawn with seed + i, not {seed}")
    return SamplingParams(
        temperature=_or(body.number("temperature"), 1.0),
        top_k=_or(body.integer("top_k"), 0),
        top_p=_or(body.number("top_p"), 1.0),
        min_p=_or(body.number("min_p"), 0.0),
        repetition_penalty=_or(body.number("repetition_penalty"), 1.0),
        seed=seed,
        logprobs=_chat_logprobs(body) if chat else body.integer("logprobs"),
    )


def _chat_logprobs(body: _Body) -> int | None:
    """How many alternatives to report; a chat says whether in one parameter, and how many in another."""
    asked = body.take("logprobs", lambda value: isinstance(value, bool), "true or false")
    top = body.integer("top_logprobs")
    if top is not None and not asked:
        raise RequestError("top_logprobs needs logprobs to be true")
    return _or(top, 0) if asked else None


def _limit(body: _Body, chat: bool) -> int | None:
    """Tokens at most; ``None`` for as many as there is room for."""
    limits = {name: body.integer(name) for name in ("max_tokens", "max_completion_tokens")}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(set(given.values())) > 1:
        raise RequestError("max_tokens and max_completion_tokens contradict each other: give one of them")
    for name, value in given.items():
        if value < 1:
            raise RequestError(f"{name} must be at least 1, not {value}")
        return value
    return None if chat else COMPLETION_TOKENS


def _room(llm: LLM, prompt: int) -> int:
    context = llm.engine.context_length
    if prompt >= context:
        raise ContextLengthError(
            f"the prompt has {prompt} tokens, and there is room for {context}: shorten the prompt"
        )
    return context - prompt


def _messages(body: _Body) -> list[dict[str, str]]:
    messages = body.take("messages", lambda value: isinstance(value, list), "a list of messages")
    if not messages:
        raise RequestError("messages must hold at least one message")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, str]:
    """A message as chat templates take it: its content is one string, of parts one line each."""
    if not isinstance(message, dict):
        raise RequestError(f"messages[{index}] must be an object, not {_shown(message)}")
    fields = {name: value for name, value in message.items() if value is not None}
    if unknown := sorted(fields.keys() - {"role", "content"}):
        raise RequestError(f"messages[{index}]: {unknown[0]} is not supported; there are role and content")
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES:
        raise RequestError(f"messages[{index}]: role must be one of {', '.join(ROLES)}, not {_shown(role)}")
    if isinstance(content, list):
        content = "\n".join(_part(index, part) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"messages[{index}]: content must be a string or a list of texts")
    return {"role": role, "content": content}


def _part(index: int, part: Any) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    raise RequestError(
        f'messages[{index}]: only parts {{"type": "text", "text": …}} are supported, not {_shown(part)}'
    )


def _prompts(body: _Body, llm: LLM) -> list[list[int]]:
    """The prompts of a completion: a text, token ids, or a list of either."""
    prompt = body.take("prompt", lambda value: isinstance(value, str | list), "a string or a list")
    if prompt is None:
        raise RequestError("prompt is missing")
    prompts = [prompt] if isinstance(prompt, str) or all(map(_is_integer, prompt)) else prompt
    return [_prompt(each, llm) for each in prompts]


def _prompt(prompt: Any, llm: LLM) -> list[int]:
    if isinstance(prompt, str):
        return llm.tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(map(_is_integer, prompt)):
        return prompt
    raise RequestError(f"prompt must be text, token ids, or a list of these, not {_shown(prompt)}")


def _wrong_model(model: str | None, names: Collection[str]) -> Fault:
    here = f"here it is {' or '.join(map(repr, sorted(names)))}"
    if model is None:
        return Fault(f"model is missing; {here}", "missing_required_parameter", BAD_REQUEST)
    more = "--model-name lets rows call it something else"
    return Fault(f"there is no model {model!r}; {here}, and {more}", "model_not_found", NOT_FOUND)


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _shown(value: Any) -> str:
    """A value for a message, not at any length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
