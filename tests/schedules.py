"""Requests through an engine under any schedule, and one hash per sample of all that it computed."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from refengine import Engine, EngineConfig, Request, SamplingParams
from refengine.backend.numpy_backend import NumpyBackend
from refengine.models import Model
from refengine.sampling import Sampled, sample

VOCABULARY = 97


class Transcripts:
    """Hashes, by the seed of a request's sampling, of the logits that tokens were sampled from, and the tokens."""

    def __init__(self) -> None:
        self._hashes: dict[int, hashlib._Hash] = defaultdict(hashlib.sha256)

    def sample(
        self, logits: np.ndarray, params: SamplingParams, tokens: list[int], generated: int
    ) -> Sampled:
        """The engine's sampler, overheard."""
        sampled = sample(logits, params, tokens, generated)
        self._hashes[params.seed].update(np.ascontiguousarray(logits).tobytes() + b"%d" % sampled.token)
        return sampled

    def of(self, request: Request) -> list[str]:
        """One hash per sample."""
        return [self._hashes[request.sampling.seed + i].hexdigest() for i in range(request.samples)]


def requests(rng: random.Random, count: int, longest: int = 40) -> list[Request]:
    """Prompts of many lengths, some of which begin alike, greedy and sampled, of one sample and of several."""
    beginning = tuple(rng.randrange(VOCABULARY) for _ in range(longest))
    made = []
    for number in range(count):
        own = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 7, 9])))
        prompt = beginning[: rng.choice([0, 0, 4, 16, 17, longest - 1])] + own
        sampling = SamplingParams(temperature=rng.choice([0.0, 0.9]), seed=1000 * number)
        made.append(
            Request(
                prompt,
                most := rng.randint(1, 7),
                sampling,
                samples=rng.choice([1, 1, 1, 3]),
                priority=rng.randrange(10),
                tenant=rng.choice("ab"),
                expected_tokens=rng.choice([None, None, most]),
                deadline=rng.choice([None, None, 30]),
            )
        )
    return made


def transcripts(
    model: Model,
    config: EngineConfig,
    wanted: Iterable[Request],
    between: Callable[[Engine], None] = lambda engine: None,
) -> list[list[str]]:
    """Run requests, some way into each other where ``between`` steps; hashes of each.

    Args:
        model: a tiny model.
        config: of the engine.
        wanted: the requests.
        between: called after each submission.
    """
    overheard = Transcripts()
    engine = Engine(model, NumpyBackend(), config, sample=overheard.sample)
    wanted = list(wanted)
    for request in wanted:
        engine.submit(request)
        between(engine)
    while engine.has_work:
        engine.step()
    if not config.prefix_cache:
        assert engine.memory().current.kv_cache == 0, "blocks are left behind"
    return [overheard.of(request) for request in wanted]


def alone(model: Model, config: EngineConfig, request: Request) -> list[str]:
    """A request by itself, each sample as a request of its own, with all the room there is."""
    roomy = EngineConfig(
        policy=config.policy, kv_dtype=config.kv_dtype, block_size=config.block_size, max_sequences=1
    )
    return [
        transcripts(
            model,
            roomy,
            [replace(request, samples=1, sampling=replace(request.sampling, seed=request.sampling.seed + i))],
        )[0][0]
        for i in range(request.samples)
    ]
