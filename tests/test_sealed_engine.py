"""An engine over a sealed cache: what a request gets depends on the request, and on nothing around it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.backend import load
from refengine.models import Model

BLOCK = 4


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


def answers(made: Engine, wanted: list[Request], order: list[int]) -> dict[int, list[Output]]:
    """The outputs of each request, submitted in this order, some while others run."""
    numbers, found = {}, {index: [] for index in order}
    for index in order:
        numbers[made.submit(wanted[index])] = index
        for output in made.step():
            found[numbers[output.request]].append(output)
    while made.has_work:
        for output in made.step():
            found[numbers[output.request]].append(output)
    return found


def requests(rng: random.Random) -> list[Request]:
    """Prompts of many lengths that begin alike."""
    shared = [rng.randrange(97) for _ in range(40)]
    return [
        Request(
            (
                *shared[: rng.choice([0, 9, 24, 40])],
                *(rng.randrange(97) for _ in range(rng.choice([1, 5, 20]))),
            ),
            max_tokens=rng.randint(2, 14),
            sampling=SamplingParams(logprobs=2),
        )
        for _ in range(5)
    ]


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "int4/float16"])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on_the_schedule(model: Model, kv_dtype: str, seed: int) -> None:
    """Chunks, company, preemption and a prefix cache leave every logit as it is, over one block size."""
    rng = random.Random(seed)
    wanted = requests(rng)
    expected = []
    for request in wanted:
        alone = Engine(
            model, load("numpy"), EngineConfig(kv_dtype=kv_dtype, block_size=BLOCK, max_sequences=1)
        )
        expected.append([output.sampled for output in answers(alone, [request], [0])[0]])
    busy = Engine(
        model,
        load("numpy"),
        EngineConfig(
            kv_dtype=kv_dtype,
            block_size=BLOCK,
            token_budget=rng.choice([3, 7, 32]),
            max_sequences=3,
            kv_tokens=rng.choice([96, 300]),
            prefix_cache=seed % 2 == 1,
            check=True,
        ),
    )
    for _ in range(2):  # the second time over what the first has cached
        found = answers(busy, wanted, rng.sample(range(len(wanted)), len(wanted)))
        for index, outputs in found.items():
            assert [output.sampled for output in outputs] == expected[index]


def test_a_sealed_cache_is_near_a_plain_one(model: Model) -> None:
    """Logits of a prompt over 8 bits differ, and by little; those of the first block not at all."""
    prompt = [n * 7 % 97 for n in range(50)]
    plain, sealed = (
        Engine(model, load("numpy"), EngineConfig(kv_dtype=name, block_size=BLOCK)).prompt_logits(prompt)
        for name in (None, "int8")
    )
    assert np.array_equal(plain.argmax(1)[: 2 * BLOCK], sealed.argmax(1)[: 2 * BLOCK])
    np.testing.assert_allclose(sealed[: 2 * BLOCK], plain[: 2 * BLOCK], atol=1e-4)
    assert 0 < np.abs(sealed - plain)[2 * BLOCK :].max() < 0.3
