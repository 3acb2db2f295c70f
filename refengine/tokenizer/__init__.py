"""Text <-> token ids, and chat templates."""

from refengine.tokenizer.chat_prompt import chat_prompts
from refengine.tokenizer.chat_template import ChatTemplate
from refengine.tokenizer.stream import StreamDecoder
from refengine.tokenizer.tokenizer import Tokenizer, build_tokenizer

__all__ = ["ChatTemplate", "StreamDecoder", "Tokenizer", "build_tokenizer", "chat_prompts"]
