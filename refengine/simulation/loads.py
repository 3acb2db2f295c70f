"""Loads: when requests come, and how long they are; generated with heavy tails, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from refengine.errors import RequestError


@dataclass(frozen=True)
class Arrival:
    """A request of a load.

    Attributes:
        time: of its submission, in seconds.
        prompt: tokens of its prompt.
        output: tokens that each of its samples generates in the end.
        expected: what the scheduler is told of ``output``.
        samples: how many outputs it has.
        priority, tenant: as the scheduler is told.
        deadline: in steps, as the scheduler is told.
        positions: how many positions of KV cache the scheduler is told it will take; ``None`` for nothing.
    """

    time: float
    prompt: int
    output: int
    expected: int
    samples: int = 1
    priority: int = 0
    tenant: str = ""
    deadline: int | None = None
    positions: int | None = None


Load = tuple[Arrival, ...]


@dataclass(frozen=True)
class HeavyTails:
    """The distributions of a generated load.

    Requests come as a Poisson process. Prompts are log-normal: half of them shorter than ``prompt_median``.
    Outputs are Pareto: ``output_least`` tokens, and longer than ``x`` with probability (``output_least`` ÷
    ``x``) to the power ``output_shape``. Both are cut to ``longest``. What the scheduler is told of an output
    is right but for a log-normal factor.

    Attributes:
        rate: requests per second.
        prompt_median, prompt_sigma: of the log-normal prompts, in tokens; sigma of the logarithm.
        output_least, output_shape: of the Pareto outputs.
        longest: tokens of a prompt, and of an output, at most.
        estimate_sigma: of the logarithm of what is expected ÷ what comes; 0 where outputs are foreseen.
        tenants: how many there are; the first sends half of the requests, the second a quarter …
        priorities: levels, of which each request gets one at random.
        samples: outputs that a request may ask for at most; most ask for one.
        hinted: the share of requests that tell how many positions they will take.

    Raises:
        RequestError: a number that no load can have.
    """

    rate: float = 1.0
    prompt_median: float = 128.0
    prompt_sigma: float = 1.0
    output_least: float = 16.0
    output_shape: float = 1.3
    longest: int = 2048
    estimate_sigma: float = 0.5
    tenants: int = 1
    priorities: int = 1
    samples: int = 1
    hinted: float = 0.0

    def __post_init__(self) -> None:
        positive = ("rate", "prompt_median", "output_least", "output_shape")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise RequestError(f"{name} of a load must be above 0 and finite, not {getattr(self, name)}")
        for name in ("longest", "tenants", "priorities", "samples"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} of a load must be at least 1, not {getattr(self, name)}")
        for name in ("prompt_sigma", "estimate_sigma", "hinted"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(
                    f"{name} of a load must be at least 0 and finite, not {getattr(self, name)}"
                )


def generate(shape: HeavyTails, count: int, seed: int) -> Load:
    """A load of ``count`` requests; equal arguments give equal loads.

    Clauses: SCH-24.
    """
    random, time, load = Random(seed), 0.0, []
    for _ in range(count):
        time += random.expovariate(shape.rate)
        prompt = _tokens(shape.prompt_median * random.lognormvariate(0.0, shape.prompt_sigma), shape.longest)
        output = _tokens(shape.output_least * random.paretovariate(shape.output_shape), shape.longest)
        expected = _tokens(output * random.lognormvariate(0.0, shape.estimate_sigma), shape.longest)
        tenant = min(int(random.expovariate(0.6931471805599453)), shape.tenants - 1)
        level = random.randrange(shape.priorities)
        samples = random.randint(1, shape.samples) if random.random() < 0.2 else 1
        positions = prompt + expected if random.random() < shape.hinted else None
        load.append(
            Arrival(time, prompt, output, expected, samples, level, f"tenant-{tenant}", None, positions)
        )
    return tuple(load)


def _tokens(length: float, longest: int) -> int:
    return min(max(round(length), 1), longest)
