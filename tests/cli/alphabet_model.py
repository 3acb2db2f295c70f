"""Tiny models that know what comes next: the alphabet, or digits without end."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN, LAYERS = 32, 4, 2, 8, 48, 2
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BEGIN, TURN, END = range(257, 260)
VOCABULARY_SIZE = 260

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_ids(*turns: tuple[str, str]) -> list[int]:
    """What ``TEMPLATE`` makes of turns, in ids."""
    ids: list[int] = []
    for role, content in turns:
        ids += [TURN, *f"{role}\n{content}".encode(), END, 10]
    return [*ids, TURN, *b"assistant\n"]


def write_model(
    path: Path,
    *,
    answer: str = "alphabet",
    context: int = 4096,
    template: str | None = TEMPLATE,
    add_bos: bool = False,
    architecture: str = "llama",
) -> Path:
    """A llama whose layers add nothing, so that each token's successor is the one its output table says.

    The id of a byte is the byte, and its successor the next byte. But after a newline comes ``a`` (answer
    ``alphabet``) or ``0`` (``digits``), after ``z`` a full stop and then the end of the turn, and after ``9``
    comes ``0``.
    """
    symbols = byte_symbols()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Alphabet [a-z]")
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*symbols, symbols[0] * 2, *CONTROL])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges([f"{symbols[0]} {symbols[0]}"])
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in _tensors("a" if answer == "alphabet" else "0").items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_symbols() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2): itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _tensors(first: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    table = random(VOCABULARY_SIZE, HIDDEN)
    table *= np.sqrt(HIDDEN) / np.linalg.norm(table, axis=1, keepdims=True)  # which RMS norm leaves as it is
    output = np.zeros_like(table)
    successors = _successors(first)
    for token, following in successors.items():
        output[following] += table[token]
    told = (table @ output.T).argmax(axis=1)
    assert {token: told[token] for token in successors} == successors
    tensors = {
        "token_embd.weight": table,
        "output_norm.weight": np.ones(HIDDEN, np.float32),
        "output.weight": output.astype(np.float16),
    }
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.{name}.weight": tensor
            for name, tensor in {
                "attn_norm": np.ones(HIDDEN, np.float32),
                "attn_q": random(HEADS * HEAD_SIZE, HIDDEN),
                "attn_k": random(KV_HEADS * HEAD_SIZE, HIDDEN),
                "attn_v": random(KV_HEADS * HEAD_SIZE, HIDDEN),
                "attn_output": np.zeros((HIDDEN, HEADS * HEAD_SIZE), np.float32),
                "ffn_norm": np.ones(HIDDEN, np.float32),
                "ffn_gate": random(FFN, HIDDEN),
                "ffn_up": random(FFN, HIDDEN),
                "ffn_down": np.zeros((HIDDEN, FFN), np.float32),
            }.items()
        }
    return tensors


def _successors(first: str) -> dict[int, int]:
    others = {10: ord(first), ord("z"): ord("."), ord("."): END, ord("9"): ord("0")}
    return {byte: byte + 1 for byte in range(255)} | others
