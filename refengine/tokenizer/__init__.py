"""Text <-> token ids, and chat templates.

What a name needs is imported when it is first used: the process that renders a chat template wants nothing
of this package but its own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refengine.tokenizer.chat_prompt import chat_prompts
    from refengine.tokenizer.chat_template import ChatTemplate, Renderer
    from refengine.tokenizer.stream import StreamDecoder
    from refengine.tokenizer.tokenizer import Tokenizer, build_tokenizer

_HOMES = {
    "ChatTemplate": "refengine.tokenizer.chat_template",
    "Renderer": "refengine.tokenizer.chat_template",
    "StreamDecoder": "refengine.tokenizer.stream",
    "Tokenizer": "refengine.tokenizer.tokenizer",
    "build_tokenizer": "refengine.tokenizer.tokenizer",
    "chat_prompts": "refengine.tokenizer.chat_prompt",
}

__all__ = ["ChatTemplate", "Renderer", "StreamDecoder", "Tokenizer", "build_tokenizer", "chat_prompts"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
