"""Chat templates: a conversation to the prompt its model was trained on.

A template comes with the model file, from whoever made it, and Jinja's sandbox bounds neither time nor
memory. So rendering runs in a process of its own (`refengine.tokenizer.chat_template_worker`), which
gets nothing but data, can open no file, has an address-space limit where the platform knows one, and is
killed at a deadline.

The dialect is that of Transformers' ``apply_chat_template``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from refengine.errors import RequestError, TemplateError

MAX_SOURCE_CHARACTERS = 2**18
MAX_OUTPUT_CHARACTERS = 2**22
ADDRESS_SPACE_BYTES = 2**29
DEADLINE_SECONDS = 5.0

RESERVED = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"),
        *("bos_token", "eos_token", "unk_token", "pad_token"),
    )
)
"""Names a template may count on, which no request may give a meaning of its own."""

BOOTSTRAP = (
    "import json, sys; request = json.load(sys.stdin); sys.path[:] = request.pop('path'); "
    "from refengine.tokenizer.chat_template_worker import main; main(request)"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja.

    Attributes:
        source: the template.
        bos_token, eos_token: texts of the tokens that begin and end a text; empty where there is none.
        deadline: seconds a rendering may take, the start of its process (about 0.1 s) included.
        clock: the time that ``strftime_now`` tells.

    Raises:
        TemplateError: the source is longer than `MAX_SOURCE_CHARACTERS`.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    deadline: float = DEADLINE_SECONDS
    clock: Callable[[], datetime] = datetime.now

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"the chat template is {len(self.source)} characters long, above {MAX_SOURCE_CHARACTERS}"
            )

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: object
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: the turns, oldest first: ``{"role": text, "content": text}``, or with a list of
                ``{"type": "text", "text": text}`` as content, where the template takes that.
            add_generation_prompt: end with what introduces the assistant's answer.
            extra: further variables of the template, such as ``enable_thinking``; JSON values.

        Raises:
            RequestError: a message is not of that form, or an extra variable is not JSON or is `RESERVED`.
            TemplateError: the template is wrong, refuses the conversation (the text is its own), takes longer
                than the deadline, writes more than `MAX_OUTPUT_CHARACTERS`, or needs too much memory.
        """
        check_messages(messages)
        if taken := sorted(RESERVED & extra.keys()):
            raise RequestError(f"{', '.join(taken)} cannot be set for a chat template: the name is reserved")
        (reply,) = self._replies([self._variables(messages, add_generation_prompt, extra)])
        return _text(reply)

    def render_many(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[str | TemplateError]:
        """What ``render`` gives for each of several conversations, or raises, in about the time of one.

        They share a process. What fails there is rendered again in one of its own, since others may have used
        up its time or its memory.

        Raises:
            RequestError: a message is malformed.
        """
        for messages in conversations:
            check_messages(messages)
        try:
            replies = self._replies([self._variables(messages, True, {}) for messages in conversations])
        except TemplateError:
            replies = [{} for _ in conversations]
        return [
            reply["text"] if "text" in reply else self._attempt(messages)
            for messages, reply in zip(conversations, replies, strict=True)
        ]

    def _attempt(self, messages: Sequence[Mapping[str, Any]]) -> str | TemplateError:
        try:
            return self.render(messages)
        except TemplateError as error:
            return error

    def _variables(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, extra: Mapping[str, object]
    ) -> dict[str, object]:
        return {
            **extra,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "tools": None,
            "documents": None,
        }

    def _replies(self, variables: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
        """The worker's replies for several sets of variables."""
        request = {
            "path": [str(entry) for entry in sys.path],
            "source": self.source,
            "variables": variables,
            "now": self.clock().isoformat(),
            "max_output_characters": MAX_OUTPUT_CHARACTERS,
            "address_space_bytes": ADDRESS_SPACE_BYTES,
            "seconds": self.deadline,
        }
        try:
            document = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"a chat template's variables must be JSON values: {error}") from None
        return _run(document, self.deadline)


def check_messages(messages: object) -> None:
    """Raises `RequestError` where messages are not as `ChatTemplate.render` wants them."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise RequestError(f"message {index} must be an object of 'role' and 'content', and nothing else")
        if not isinstance(message["role"], str):
            raise RequestError(f"the role of message {index} must be a string")
        content = message["content"]
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if not _is_text_part(part):
                raise RequestError(
                    f"the content of message {index} must be a string, or a list of "
                    '{"type": "text", "text": a string}'
                )


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, Mapping)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _text(reply: Mapping[str, str]) -> str:
    if "error" in reply:
        raise TemplateError(f"the chat template failed: {reply['error']}")
    return reply["text"]


def _run(request: str, deadline: float) -> list[dict[str, str]]:
    """Renders in a process of its own, which is gone when this returns or raises, Ctrl-C included."""
    try:
        # -I: nothing from the working directory or the environment; the request brings this process's path.
        command = [sys.executable, "-I", "-c", BOOTSTRAP]
        worker = subprocess.run(command, input=request.encode(), capture_output=True, timeout=deadline)
    except subprocess.TimeoutExpired:
        raise TemplateError(f"the chat template took longer than {deadline:g} s") from None
    except OSError as error:
        raise TemplateError(f"the process for the chat template cannot be started: {error}") from error
    try:
        replies: list[dict[str, str]] = json.loads(worker.stdout)
    except ValueError:
        last_words = worker.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise TemplateError(
            f"the process for the chat template broke off with status {worker.returncode}: {last_words}"
        ) from None
    return replies
