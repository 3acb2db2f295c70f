"""What a step's launches depend on: its shape, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from refengine.program import Placement


class StepShape(NamedTuple):
    """What launches depend on.

    A tuple, because one is made in every step, to look for others like it.

    Attributes:
        tokens, sequences, rows: T, S and R.
        blocks: columns of the block tables.
        partitions: of the longest context that some query sees.
        query_tiles: tiles of at most ``QUERY_TILE`` queries of one sequence each; 0 where queries go one by
            one.
        fills: whether some block becomes full that is sealed then.
    """

    tokens: int
    sequences: int
    rows: int
    blocks: int
    partitions: int
    query_tiles: int
    fills: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """By symbol."""
        return {"T": self.tokens, "S": self.sequences, "S1": self.sequences + 1, "R": self.rows}


@dataclass(frozen=True)
class Places:
    """Where everything is.

    Attributes:
        arena: address of the arena.
        output: address of the program's result.
        counters: zeros, as many as tokens and key heads that attention is cut up for.
        inputs: addresses of a step's arrays, by name; ``sequences`` among them: each token's sequence.
        frequencies: of ``rope_table``, by the position of its instruction.
        moved: how far behind the beginning of their place values lie, where it is larger than they are.
    """

    arena: int
    output: int
    counters: int
    inputs: Mapping[str, int]
    frequencies: Mapping[int, int]
    moved: Mapping[Placement, int] = field(default_factory=dict)
