"""Which model answers, and how, in a few letters."""

from __future__ import annotations

from hashlib import blake2b

from refengine.llm import LLM

SAMPLE_BYTES = 64


def fingerprint(llm: LLM) -> str:
    """OpenAI's ``system_fingerprint``: the same for the same model in the same precision on the same backend.

    Of each weight only the first `SAMPLE_BYTES` bytes are looked at, so that nothing else is read for it.
    """
    digest = blake2b(digest_size=5)

    def add(*parts: object) -> None:
        digest.update(repr(parts).encode())

    config = llm.engine.config
    add(llm.model.spec, llm.tokenizer.chat_template, llm.engine.backend.name, config.policy, config.kv_dtype)
    for name, tensor in sorted(llm.model.weights.items()):
        first_row = tensor.data[(0,) * (tensor.data.ndim - 1)]
        add(name, tensor.shape, tensor.encoding, first_row[:SAMPLE_BYTES].tobytes())
    return f"fp_{digest.hexdigest()}"
