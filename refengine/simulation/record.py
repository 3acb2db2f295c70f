"""What a journal tells once it is read: its decisions, its requests and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from refengine.memory import KVLayout
from refengine.scheduler import Decision, HostPool, Limits, SchedulingPolicy, schedule
from refengine.simulation.loads import Load


@dataclass(frozen=True)
class Entry:
    """A decision in a journal.

    Attributes:
        line: where it stands, counted from 1.
        step, time: as its caller counted.
        arguments: what it was made from, for ``schedule``, up to and without the policy.
        host: the pool on the host, ``None`` where there was none.
        decision: what it was.
    """

    line: int
    step: int
    time: float
    arguments: tuple[Any, ...]
    host: HostPool | None
    decision: Decision

    def decide(self, policy: SchedulingPolicy, schedule: Callable[..., Decision] = schedule) -> Decision:
        """Make it again.

        Raises:
            LookupError: the schedule asks what was not asked before, so that it decides otherwise.
        """
        return schedule(*self.arguments, policy, self.host)


@dataclass(frozen=True)
class End:
    """What became of a request or sample.

    Attributes:
        reason: why it ended.
        generated: tokens of output.
        tokens: their ids, where they were recorded; of a fork, those of its own.
        sha256: of the logits and tokens, in hexadecimal; ``None`` where it was not recorded.
        samples: how many samples ended so: more than one where they had not parted.
    """

    reason: str
    generated: int
    tokens: tuple[int, ...] = ()
    sha256: str | None = None
    samples: int = 1


class Fork(NamedTuple):
    """From where a request goes on.

    Attributes:
        parent: whose tokens it has.
        generated: how many the parent had generated.
        token: what it has in place of the last one; ``None`` for the same.
        seed: with which it samples; ``None`` for the same.
    """

    parent: int
    generated: int
    token: int | None = None
    seed: int | None = None


class Part(NamedTuple):
    """What a request is in a batch: the ``place``-th request, from 0, of the row ``custom_id``."""

    custom_id: str
    place: int


@dataclass(frozen=True)
class Record:
    """A journal that was read.

    Attributes:
        policy, parameters: as its first line has them.
        layout: the pools of the KV cache, with blocks of a few bytes; ``None`` where they are not recorded.
        limits: of the first decision; ``None`` where there is none.
        load: the requests, with the outputs that they had.
        entries: the decisions.
        engine: of which engine it is; empty where it is of none.
        requests: what was asked, by number; empty where that is not recorded.
        ends: what became of requests and samples, by number.
        rows: which row of a batch a request is of, by number.
        forks: from where requests go on that were not submitted, by number.
        left_out: why lines at the end were not read; ``None`` where all were.
    """

    policy: str
    parameters: dict[str, int]
    layout: KVLayout | None
    limits: Limits | None
    load: Load
    entries: tuple[Entry, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    ends: Mapping[int, End] = field(default_factory=dict)
    rows: Mapping[int, Part] = field(default_factory=dict)
    forks: Mapping[int, Fork] = field(default_factory=dict)
    left_out: str | None = None
