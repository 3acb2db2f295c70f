"""Prompts on their way through a model: a cache, and steps that compute any pieces of them."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refengine.memory import KVGroupLayout, KVLayout
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.program import Policy, StepBatch
from refengine_conformance.naive_model import Sealing
from refengine_conformance.subject import KVFormats, Subject, golden_kv_format, sealed_formats

Ints = NDArray[np.int64]

SPARE_BLOCKS = 2
"""Blocks of every pool that no prompt holds."""


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start … stop - 1`` of a prompt: what it computes in one step."""

    prompt: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts, and where their keys and values lie.

    Attributes:
        model: what they are for.
        token_ids: of each.
        block_size: positions per block.
        sealed: names of the formats of keys and of values, where the KV cache is sealed.
        order: seed of the order in which the prompts take the blocks of a pool.
    """

    model: Model
    token_ids: tuple[tuple[int, ...], ...]
    block_size: int = 4
    sealed: tuple[str, str] | None = None
    order: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of every pool."""
        return sum(self._blocks) + SPARE_BLOCKS

    @property
    def sealing(self) -> Sealing | None:
        """How the cache is sealed, for the naive model."""
        return None if self.sealed is None else Sealing(self.sealed, self.block_size)

    @property
    def tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.token_ids))

    @property
    def whole(self) -> list[Chunk]:
        """Every prompt in one piece."""
        return [Chunk(p, 0, len(ids)) for p, ids in enumerate(self.token_ids)]

    def layout(self, policy: Policy, kv_format: KVFormats = golden_kv_format) -> KVLayout:
        """A pool for each of the model's KV groups; and one of exact copies, where they are sealed."""
        spec, formats = self.model.spec, sealed_formats(self.sealed, kv_format)
        groups = []
        for group in spec.kv_groups:
            shapes = tuple((i, spec.layers[i].kv_heads, spec.layers[i].head_size) for i in group.layers)
            groups.append(KVGroupLayout(group.window, shapes, self.num_blocks, formats))
        if formats is not None:
            groups += [replace(group, sealed=None, recent=True) for group in groups]
        return KVLayout(self.block_size, policy.kv, tuple(groups))

    def batch(self, chunks: Sequence[Chunk]) -> StepBatch:
        """The step that computes these chunks, with the logits of every token."""
        columns = max(self._blocks)
        starts = np.cumsum([0, *(c.stop - c.start for c in chunks)])
        groups = self.model.spec.kv_groups
        tables = [self._tables(pool) for pool in range(len(groups) * (1 if self.sealed is None else 2))]
        padded = [[[*t[c.prompt], *[-1] * (columns - len(t[c.prompt]))] for c in chunks] for t in tables]
        for group, copies in zip(groups, padded[len(groups) :], strict=False):
            self._release(group.window, chunks, copies)
        positions = [np.arange(c.start, c.stop, dtype=np.int64) for c in chunks]
        return StepBatch(
            token_ids=_int32([t for c in chunks for t in self.token_ids[c.prompt][c.start : c.stop]]),
            positions=_int32(np.concatenate(positions)),
            query_starts=_int32(starts),
            context_lens=_int32([c.stop for c in chunks]),
            logit_rows=_int32(np.arange(starts[-1])),
            slot_mapping=tuple(
                _int32(
                    np.concatenate(
                        [self._slots(t[c.prompt], p) for c, p in zip(chunks, positions, strict=True)]
                    )
                )
                for t in tables
            ),
            block_tables=tuple(map(_int32, padded)),
        )

    def _release(
        self, window: int | None, chunks: Sequence[Chunk], copies: Sequence[MutableSequence[int]]
    ) -> None:
        """Strike out the exact copies that no query needs."""
        for chunk, table in zip(chunks, copies, strict=True):
            seen = 0 if window is None else max(0, chunk.start - window + 1) // self.block_size
            for index in range(chunk.start // self.block_size):
                if index > 0 or seen > 0:
                    table[index] = -1

    @property
    def _blocks(self) -> list[int]:
        return [-(-len(ids) // self.block_size) for ids in self.token_ids]

    def _tables(self, group: int) -> list[list[int]]:
        """The blocks of each prompt in a pool: other ones in every group."""
        free = np.random.default_rng((self.order, group)).permutation(self.num_blocks).tolist()
        return [[free.pop() for _ in range(count)] for count in self._blocks]

    def _slots(self, table: Sequence[int], positions: Ints) -> Ints:
        blocks = np.array(table, np.int64)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


class Prompting:
    """A subject that works on prompts."""

    def __init__(self, subject: Subject, prompts: Prompts, tokens: int | None = None) -> None:
        self.prompts = prompts
        self.executable = subject.compile(
            subject.program(prompts.model, sealed=prompts.sealed is not None),
            prompts.model.weights,
            tokens or prompts.tokens,
            prompts.layout(subject.policy, subject.kv_format),
        )

    def step(self, chunks: Sequence[Chunk]) -> list[FloatArray]:
        """Compute chunks in one step; gives the logits ``[t, V]`` of each."""
        batch = self.prompts.batch(chunks)
        return np.split(self.executable.run(batch), batch.query_starts[1:-1])


def _int32(values: ArrayLike) -> NDArray[np.int32]:
    return np.array(values, np.int32)
