"""How much an engine may hold, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.errors import RequestError


@dataclass(frozen=True)
class EngineConfig:
    """Limits and choices of an engine.

    Attributes:
        policy: the precision policy's name.
        kv_dtype: of keys and values in the cache (``float16``, ``int8``, ``int8/int4`` for keys/values …);
            ``None`` for the policy's own.
        token_budget: tokens computed per step at most.
        max_sequences: requests running at once at most.
        logit_rows: rows of logits per step at most; ``None`` for ``max_sequences``. Requests that keep the
            logits of their prompt advance by so many tokens per step.
        block_size: positions per KV block.
        kv_tokens: positions the KV cache holds in layers that see the whole context; ``None`` for enough for
            ``max_sequences`` full contexts, but at most 65,536 (or one context, where that is longer), and no
            more than ``memory`` leaves.
        memory: bytes that the process may hold at most: weights, arena, logits, KV cache, and a constant for
            the process itself; of a device's memory, where it has its own, with a constant for its context.
            ``None`` for no limit but what such a device has free.
        weight_cache: bytes of weights kept decoded at most, the others being decoded where they are used;
            ``None`` for all of them, or what ``memory`` leaves. A device with memory of its own keeps none.
        reserve: positions of KV cache whose memory is taken at start and kept; all else comes as sequences
            grow and goes when they end.
        swap: bytes of host memory for KV blocks of pre-empted requests at most; where these are not kept,
            what they held is computed again.
        scheduling: the scheduling policy's name, with parameters where it takes some (``sjf:ageing=8``).
        prefix_cache: whether the blocks of ended requests serve later ones that begin alike.
        check: whether freed blocks are poisoned and the memory manager's books are verified at every step.
        fallback: whether golden ops may stand in for ops that the backend lacks.

    Raises:
        RequestError: a limit below the least that makes sense.
    """

    policy: str = "float32"
    kv_dtype: str | None = None
    token_budget: int = 512
    max_sequences: int = 16
    logit_rows: int | None = None
    block_size: int = 16
    kv_tokens: int | None = None
    memory: int | None = None
    weight_cache: int | None = None
    reserve: int = 0
    swap: int = 0
    scheduling: str = "fcfs"
    prefix_cache: bool = False
    check: bool = False
    fallback: bool = False

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_sequences", "block_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("memory", "weight_cache", "reserve", "swap"):
            if (getattr(self, name) or 0) < 0:
                raise RequestError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.kv_tokens is not None and self.kv_tokens < self.block_size:
            raise RequestError(
                f"kv_tokens must be at least one block ({self.block_size}), not {self.kv_tokens}"
            )
        if self.logit_rows is not None and self.logit_rows < self.max_sequences:
            raise RequestError(
                f"logit_rows must be at least max_sequences ({self.max_sequences}), not {self.logit_rows}: "
                "every running request samples from a row of its own"
            )

    @property
    def rows(self) -> int:
        """Rows of logits per step at most."""
        return self.max_sequences if self.logit_rows is None else self.logit_rows
