"""A conversation to token ids, in which only the template writes control tokens.

Templates write control tokens by name, such as ``<|im_end|>``, and nothing in the rendered text tells who
wrote a name. So names that stand in messages are broken before rendering, by a character that occurs nowhere
else; it is taken out again when the control tokens have been found, and a broken name is text like any other.
Messages without such names are rendered as they are.

What this leaves to the template: one that cuts messages into pieces and joins these anew, or that writes a
part of a name itself and has a message complete it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from refengine.errors import RefengineError, RequestError, TemplateError
from refengine.tokenizer.chat_template import ChatTemplate, Renderer, check_messages
from refengine.tokenizer.special_tokens import SpecialTokens
from refengine.tokenizer.tokenizer import Tokenizer

PRIVATE_USE = range(0xE000, 0xF900)
"""Code points that Unicode gives no meaning, so that neither templates nor trimming do."""


def chat_prompts(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    renderer: Renderer | None = None,
) -> list[list[int] | RefengineError]:
    """The token ids of conversations, ready for the answer; names of control tokens in messages are text.

    An error concerns its conversation alone, and stands in its place: RequestError where the vocabulary
    cannot express it, TemplateError where the template failed. They are rendered by ``renderer``, where there
    is one already.

    Raises:
        RequestError: messages are malformed.
    """
    for messages in conversations:
        check_messages(messages)
    said = json.dumps(conversations, ensure_ascii=False)
    names = _Names(tokenizer.control_names, said + template.source + template.bos_token + template.eos_token)

    def ids(text: str | TemplateError) -> list[int] | RefengineError:
        if isinstance(text, TemplateError):
            return text
        try:
            return tokenizer.encode(text, add_special=False, parse_special=True, mark=names.mark)
        except RequestError as error:
            return error

    unnamed = [names.broken(messages) for messages in conversations]
    return [*map(ids, template.render_many(unnamed, renderer))]


class _Names:
    """Breaks names of control tokens.

    Args:
        names: the names; one of a single character cannot be broken.
        texts: all that is rendered.

    Attributes:
        mark: a character that is neither in a name nor in the texts.

    Raises:
        RequestError: the texts hold every character that could be the mark.
    """

    def __init__(self, names: Collection[str], texts: str) -> None:
        self._names = [name for name in names if len(name) > 1]
        self._whole = SpecialTokens({name: number for number, name in enumerate(self._names)})
        self._begun = {name[:length] for name in self._names for length in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)
        taken = {*texts, *"".join(self._names)}
        mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in taken), None)
        if mark is None:
            raise RequestError("the messages hold every character for private use, and one is needed here")
        self.mark = mark

    def broken(self, value: Any) -> Any:
        """A JSON value, with the names in its strings broken."""
        if isinstance(value, Mapping):
            return {key: self.broken(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.broken(each) for each in value]
        return self._broken(value) if isinstance(value, str) else value

    def _broken(self, text: str) -> str:
        """A text with a mark after the first character of each name, and after one that begins at its end.

        The latter could go on in the next message, or in what the template writes.
        """
        words = text.rstrip()
        if any(words[-length:] in self._begun for length in range(1, self._longest)):
            text = words + self.mark + text[len(words) :]
        before = ""
        while text != before:  # once more after a change, for names that overlap
            before, text = text, "".join(map(self._apart, self._whole.split(text)))
        return text

    def _apart(self, piece: str | int) -> str:
        """A piece of a text as it is, or a name by its number with a mark in it."""
        if isinstance(piece, str):
            return piece
        name = self._names[piece]
        return name[0] + self.mark + name[1:]
