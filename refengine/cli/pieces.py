"""Tokens as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refengine.errors import RequestError

if TYPE_CHECKING:
    from refengine.tokenizer import Tokenizer


def piece(tokenizer: Tokenizer, id: int) -> str:
    """A token as a Python literal: ``' the'``, or ``b'\\xe2\\x82'`` where it is not whole characters."""
    data = tokenizer.token_bytes(id)
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def token_json(tokenizer: Tokenizer, id: int) -> dict[str, Any]:
    """A token for JSON: its id, its text with U+FFFD for what is not UTF-8, and its bytes."""
    data = tokenizer.token_bytes(id)
    return {"id": id, "text": data.decode(errors="replace"), "bytes": list(data)}


def parse_ids(text: str) -> list[int]:
    """Token ids from text: numbers separated by spaces or commas, in brackets or not.

    Raises:
        RequestError: something else is in it.
    """
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError:
        raise RequestError(f"token ids are numbers separated by spaces or commas, not {text!r}") from None
