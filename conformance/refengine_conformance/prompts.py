"""Prompts on their way through a model: a cache, and steps that compute any pieces of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refengine.memory import KVGroupLayout, KVLayout
from refengine.models import Model
from refengine.ops import FloatArray
from refengine.program import Policy, StepBatch
from refengine_conformance.subject import Subject

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
        order: seed of the order in which the prompts take the blocks of a pool.
    """

    model: Model
    token_ids: tuple[tuple[int, ...], ...]
    block_size: int = 4
    order: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of every pool."""
        return sum(self._blocks) + SPARE_BLOCKS

    @property
    def tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.token_ids))

    @property
    def whole(self) -> list[Chunk]:
        """Every prompt in one piece."""
        return [Chunk(p, 0, len(ids)) for p, ids in enumerate(self.token_ids)]

    def layout(self, policy: Policy) -> KVLayout:
        """A pool for each of the model's KV groups."""
        spec = self.model.spec
        groups = []
        for group in spec.kv_groups:
            shapes = tuple((i, spec.layers[i].kv_heads, spec.layers[i].head_size) for i in group.layers)
            groups.append(KVGroupLayout(group.window, shapes, self.num_blocks))
        return KVLayout(self.block_size, policy.kv, tuple(groups))

    def batch(self, chunks: Sequence[Chunk]) -> StepBatch:
        """The step that computes these chunks, with the logits of every token."""
        starts = np.cumsum([0, *(c.stop - c.start for c in chunks)])
        tables = [self._tables(group) for group in range(len(self.model.spec.kv_groups))]
        columns = max(self._blocks)
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
            block_tables=tuple(
                _int32([[*t[c.prompt], *[-1] * (columns - len(t[c.prompt]))] for c in chunks]) for t in tables
            ),
        )

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
            subject.trace(prompts.model),
            prompts.model.weights,
            tokens or prompts.tokens,
            prompts.layout(subject.policy),
        )

    def step(self, chunks: Sequence[Chunk]) -> list[FloatArray]:
        """Compute chunks in one step; gives the logits ``[t, V]`` of each."""
        batch = self.prompts.batch(chunks)
        return np.split(self.executable.run(batch), batch.query_starts[1:-1])


def _int32(values: ArrayLike) -> NDArray[np.int32]:
    return np.array(values, np.int32)
