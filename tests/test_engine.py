"""The engine: what a request gets depends on the request alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.backend import load
from refengine.errors import ContextLengthError, NumericalError, RequestError, TokenIdError
from refengine.models import Model
from refengine.quantizer import LazyTensor


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


def engine(model: Model, **limits: int) -> Engine:
    return Engine(model, load("numpy"), EngineConfig(**limits))


def run(made: Engine) -> dict[int, list[Output]]:
    """Step until nothing is left; outputs by request."""
    outputs: dict[int, list[Output]] = {}
    while made.has_work:
        for output in made.step():
            outputs.setdefault(output.request, []).append(output)
    return outputs


def requests(seed: int, count: int = 6) -> list[Request]:
    """Prompts of many lengths, greedy and sampled."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(97) for _ in range(rng.choice([1, 2, 7, 8, 9, 30, 61]))),
            max_tokens=rng.randint(1, 12),
            sampling=SamplingParams(
                temperature=rng.choice([0.0, 0.9]), seed=rng.randrange(2**32), logprobs=2
            ),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_tokens_and_logprobs_do_not_depend_on_the_schedule(model: Model, seed: int) -> None:
    """Any mix, chunk size, block size and memory pressure gives each request its own result, bit by bit."""
    wanted = requests(seed)
    alone = []
    for request in wanted:
        made = engine(model, max_sequences=1)
        made.submit(request)
        alone.append([output.sampled for output in run(made)[0]])

    rng = random.Random(seed + 1000)
    made = engine(
        model,
        token_budget=rng.choice([3, 5, 16, 64]),
        max_sequences=rng.choice([2, 3, 6]),
        block_size=rng.choice([1, 3, 4, 16]),
        kv_tokens=rng.choice([96, 112, 400]),
    )
    together: dict[int, list[Output]] = {}
    order = list(range(len(wanted)))
    rng.shuffle(order)
    numbers = {}
    for which in order:
        numbers[made.submit(wanted[which])] = which
        for _ in range(rng.randrange(3)):
            for output in made.step():
                together.setdefault(output.request, []).append(output)
    for number, outputs in run(made).items():
        together.setdefault(number, []).extend(outputs)
    for number, which in numbers.items():
        assert [output.sampled for output in together[number]] == alone[which]
    assert made._memory.free_blocks == made.plan.layout.num_blocks


def test_memory_pressure_pre_empts_and_the_result_is_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one and a half requests, one is pre-empted, computed again, and ends with the same tokens."""
    wanted = [Request(tuple(range(i, i + 20)), max_tokens=20) for i in range(3)]
    roomy, tight = engine(model), engine(model, block_size=4, kv_tokens=64, token_budget=8)
    preempted = []
    original = tight._preempt
    monkeypatch.setattr(
        tight, "_preempt", lambda number, *, swap: (preempted.append(number), original(number, swap=swap))
    )
    for request in wanted:
        roomy.submit(request)
        tight.submit(request)
    expected, result = run(roomy), run(tight)
    assert preempted
    for number in range(3):
        assert [o.sampled for o in result[number]] == [o.sampled for o in expected[number]]
    assert tight._memory.free_blocks == tight.plan.layout.num_blocks


def test_every_request_ends_once(model: Model) -> None:
    """One terminal event per request: the last."""
    made = engine(model, token_budget=7)
    for request in requests(3):
        made.submit(request)
    for outputs in run(made).values():
        assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [
            True
        ]


def test_stop_ids_end_the_output(model: Model) -> None:
    """The token that ends a request is reported; nothing follows."""
    made = engine(model)
    made.submit(Request((1, 2, 3), max_tokens=8))
    tokens = [output.sampled.token for output in run(made)[0]]
    made.submit(Request((1, 2, 3), max_tokens=8, stop_ids=frozenset({tokens[3]})))
    stopped = run(made)[1]
    assert [output.sampled.token for output in stopped] == tokens[: tokens.index(tokens[3]) + 1]
    assert stopped[-1].finish_reason == "stop"


def test_aborting_gives_back_everything(model: Model) -> None:
    """An aborted request ends with one event and leaves no block behind; aborting again does nothing."""
    made = engine(model)
    number = made.submit(Request((1, 2, 3), max_tokens=50))
    made.step()
    ended = made.abort(number)
    assert ended is not None
    assert ended.finish_reason == "abort"
    assert made.abort(number) is None
    assert not made.has_work
    assert made._memory.free_blocks == made.plan.layout.num_blocks


def test_prompt_logits_are_those_that_sampling_sees(model: Model) -> None:
    """The logits after a prompt's last token choose the first generated one; chunks make no difference."""
    prompt = tuple(range(40))
    whole = engine(model).prompt_logits(prompt)
    assert whole.shape == (40, 97)
    assert np.array_equal(engine(model, token_budget=6).prompt_logits(prompt, first=11), whole[11:])
    made = engine(model)
    made.submit(Request(prompt, max_tokens=1))
    assert run(made)[0][0].sampled.token == whole[-1].argmax()


def test_what_can_never_be_served_is_refused_at_submission(model: Model) -> None:
    """Ids outside the vocabulary, too long a context, too small a cache: named errors, and the engine goes on."""
    made = engine(model, kv_tokens=64)
    with pytest.raises(TokenIdError, match="97"):
        made.submit(Request((1, 97), max_tokens=1))
    with pytest.raises(TokenIdError):
        made.submit(Request((-1,), max_tokens=1))
    with pytest.raises(ContextLengthError, match="context is 256"):
        made.submit(Request((1,) * 200, max_tokens=100))
    with pytest.raises(ContextLengthError, match="kv_tokens"):
        made.submit(Request((1,) * 60, max_tokens=10))
    with pytest.raises(RequestError, match="tokenizer"):
        made.submit(Request((1,), max_tokens=1, stop=("x",)))
    assert not made.has_work
    made.submit(Request((1,), max_tokens=1))
    assert run(made)


@pytest.mark.parametrize(
    "fields",
    [{"prompt": ()}, {"max_tokens": -1}, {"stop": ("",)}, {"stop": ("a",) * 17}, {"logits_from": 1}],
)
def test_malformed_requests_are_refused(fields: dict) -> None:
    """An empty prompt, a negative length, an empty stop string: refused when the request is made."""
    with pytest.raises(RequestError):
        Request(**{"prompt": (1,), "max_tokens": 1} | fields)


@pytest.mark.parametrize(
    "fields", [{"token_budget": 0}, {"max_sequences": 0}, {"block_size": 0}, {"kv_tokens": 1}]
)
def test_malformed_limits_are_refused(fields: dict) -> None:
    """An engine needs at least one token, one sequence, one block."""
    with pytest.raises(RequestError):
        EngineConfig(**fields)


@pytest.mark.parametrize("role", ["layers.1.down", "output_norm", "token_embedding"])
def test_nan_in_weights_is_an_error_and_not_a_token(role: str) -> None:
    """The tensor is named where it is decoded; in a table that is only looked up, the logits tell."""
    model = tiny_model("llama")
    tensor = model.weights[role]
    values = tensor.decode()
    values.reshape(-1)[:] = np.nan
    broken = LazyTensor(tensor.name, tensor.shape, "f32", values.view(np.uint8))
    made = engine(Model(model.spec, {**model.weights, role: broken}))
    made.submit(Request((1, 2), max_tokens=2))
    (ended,) = run(made)[0]
    assert ended.finish_reason == "error"
    with pytest.raises(NumericalError, match=r"finite|NaN"):
        raise ended.error or AssertionError
    assert not made.has_work
    assert made._memory.free_blocks == made.plan.layout.num_blocks
