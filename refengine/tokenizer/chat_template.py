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
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from refengine.tokenizer.chat_template_worker import main; main()"
)


class Renderer:
    """A process that renders one request. It imports what it needs while its owner does something else.

    Raises:
        TemplateError: it cannot be started.
    """

    def __init__(self) -> None:
        # -I: nothing from the working directory or the environment; it is given this process's path.
        command = [sys.executable, "-I", "-c", BOOTSTRAP, *map(str, sys.path)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise TemplateError(f"the process for the chat template cannot be started: {error}") from error

    def replies(self, request: str, deadline: float) -> list[dict[str, str]]:
        """What it answers; the process is gone when this returns or raises, Ctrl-C included.

        Raises:
            TemplateError: it takes longer than ``deadline`` seconds, or breaks off.
        """
        try:
            said, told = self._process.communicate(request.encode(), timeout=deadline)
        except subprocess.TimeoutExpired:
            raise TemplateError(f"the chat template took longer than {deadline:g} s") from None
        finally:
            self.close()
        try:
            replies: list[dict[str, str]] = json.loads(said)
        except ValueError:
            last_words = told.decode(errors="replace").strip().rpartition("\n")[2]
            status = self._process.returncode
            raise TemplateError(
                f"the process for the chat template broke off with status {status}: {last_words}"
            ) from None
        return replies

    def close(self) -> None:
        """End the process, whether it was asked or not."""
        with self._process:
            self._process.kill()


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja.

    Attributes:
        source: the template.
        bos_token, eos_token: texts of the tokens that begin and end a text; empty where there is none.
        deadline: seconds a rendering may take, about 0.1 s for its process included.
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

    def render_many(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], renderer: Renderer | None = None
    ) -> list[str | TemplateError]:
        """What ``render`` gives for each of several conversations, or raises, in about the time of one.

        They share a process: ``renderer``, where there is one already. What fails there is rendered again in
        one of its own, since others may have used up its time or its memory.

        Raises:
            RequestError: a message is malformed.
        """
        for messages in conversations:
            check_messages(messages)
        try:
            variables = [self._variables(messages, True, {}) for messages in conversations]
            replies = self._replies(variables, renderer)
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

    def _replies(
        self, variables: Sequence[Mapping[str, object]], renderer: Renderer | None = None
    ) -> list[dict[str, str]]:
        """The worker's replies for several sets of variables."""
        request = {
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
        return (renderer or Renderer()).replies(document, self.deadline)


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
