"""Synthetic vocabularies of a little over 300 tokens, as the metadata keys of a GGUF file.

Each covers every text: the byte-level one has all 256 bytes and some merges, the SentencePiece ones have byte
tokens to fall back to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # gguf.TokenType

_MERGES = (
    "Ġ t|h e|i n|Ġ a|e r|o n|r e|Ġt he|a n|Ġ s|e n|a t|o r|i s|Ġ w|Ġ o|e s|n d|in g|Ġ c|i t|o u|e d|Ġa nd|"
    "Ġ f|Ġ b|a r|Ġt o|Ġo f|a l|Ġ in|Ġ p|o m|Ġ m|a s|Ġ d|i c|Ġ h|l e|r o|l l|1 2|Ġ 1|. Ċ|Ċ Ċ|Ġ Ġ|ĠĠ ĠĠ|à ¸|ð Ł"
)
_PIECES = "th in er an on re ▁t ▁a he the ▁the nd en at ing ▁s ▁w is or ▁o and ▁and es ▁of ▁to ▁▁ ▁in ll"
_CHARACTERS = "▁abcdefghijklmnopqrstuvwxyz.,!?\n"


def _byte_level() -> dict[str, Any]:
    """A GPT-2 style BPE: 256 bytes, what the merges make of them, three control tokens and a user's one."""
    merges = _MERGES.split("|")
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *special, "<tool>"],
        "tokenizer.ggml.token_type": [_NORMAL] * len(tokens) + [_CONTROL] * len(special) + [_USER_DEFINED],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    }


def _sentencepiece(special: Sequence[str], *, bos: int, eos: int, space_prefix: bool) -> dict[str, Any]:
    """`special`, <0x00>…<0xFF>, then pieces and lower-case letters, the likelier the earlier.

    Capitals, digits and other scripts have no piece and fall back to bytes.
    """
    pieces = [*_PIECES.split(), *_CHARACTERS]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "tokenizer.ggml.scores": [0.0] * (len(special) + 256) + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [
            *(_UNKNOWN if token == "<unk>" else _CONTROL for token in special),
            *[_BYTE] * 256,
            *[_NORMAL] * len(pieces),
        ],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.unknown_token_id": special.index("<unk>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


BYTE_LEVEL: Mapping[str, Any] = _byte_level()

MISTRAL: Mapping[str, Any] = _sentencepiece(["<unk>", "<s>", "</s>"], bos=1, eos=2, space_prefix=True)

GEMMA: Mapping[str, Any] = {
    **_sentencepiece(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        bos=2,
        eos=1,
        space_prefix=False,
    ),
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.chat_template": "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
}
