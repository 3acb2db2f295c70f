"""Chapter *Sampling*: against the steps written out over Python floats, and a Philox of our own."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.errors import NumericalError
from refengine.models import Model
from refengine.sampling import Sampled
from refengine.tokenizer import Tokenizer
from refengine.tokenizer.data import TokenizerData, TokenType
from refengine.tokenizer.pre_tokenizers import pre_tokenizer
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model

U = 2.0**-53
"""Sampling is in float64, whatever the policy."""

DRAWS = 12
"""Tokens drawn from each distribution."""


@st.composite
def rows(draw: st.DrawFn) -> NDArray[np.floating]:
    """Logits ``[V]``: flat or steep, with ties here and there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([12, 40, 5, 2, 1]))
    row = rng.standard_normal(size)
    if draw(st.booleans()):
        row = np.round(row)
    row = row * draw(st.sampled_from([1.0, 3.0, 0.5, 30.0])) + draw(st.sampled_from([0, 5, -5]))
    return row.astype(draw(st.sampled_from([np.float32, np.float64])))


SEVERAL_ROWS = st.lists(rows(), min_size=4, max_size=4)
"""In one example: that what is rare in a row comes up."""


SEEDS = st.integers(0, 2**64 - 1)
TEMPERATURES = st.sampled_from([1.0, 0.5, 2.0, 0.1, 7.0])
TOP_KS = st.sampled_from([1, 2, 3, 7, 50])
TOP_PS = st.sampled_from([0.9, 0.5, 0.1, 0.99])
MIN_PS = st.sampled_from([0.1, 0.5, 0.01, 1.0])
PENALTIES = st.sampled_from([1.5, 4.0, 0.5])

ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0, 0.5, 2.0]),
    top_k=st.just(0) | TOP_KS,
    top_p=st.just(1.0) | TOP_PS,
    min_p=st.just(0.0) | MIN_PS,
    repetition_penalty=st.just(1.0) | PENALTIES,
    seed=SEEDS,
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
)


def histories(row: Sequence[float] | NDArray[Any]) -> st.SearchStrategy[list[int]]:
    """Ids seen so far, some of them twice."""
    return st.lists(st.integers(0, len(row) - 1), min_size=3, max_size=8)


def philox(seed: int, index: int) -> float:
    """The random number of SMP-9: Philox4x64-10 after Salmon et al., 2011, §3.3."""
    counter, key = [index + 1, 0, 0, 0], [seed, 0]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        low = 2**64 - 1
        counter = [
            second >> 64 ^ counter[1] ^ key[0],
            second & low,
            first >> 64 ^ counter[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
    return (counter[0] >> 11) / 2**53


def penalised(row: NDArray[np.floating], penalty: float, history: Sequence[int]) -> list[float]:
    """The scores of SMP-3."""
    scores = [float(logit) for logit in row]
    for id in set(history):
        scores[id] = scores[id] / penalty if scores[id] > 0 else scores[id] * penalty
    return [min(max(score, -sys.float_info.max), sys.float_info.max) for score in scores]


def ranked(scores: Sequence[float]) -> list[int]:
    """Ids by falling score, and among equals rising."""
    return sorted(range(len(scores)), key=lambda id: (-scores[id], id))


def legal_tokens(
    row: NDArray[np.floating], params: SamplingParams, history: Sequence[int], number: float
) -> set[int]:
    """The tokens that SMP-3 to SMP-10 allow for a random number, up to the chapter's rounding.

    Every count of remaining tokens is taken that some sums within the rounding give, and for each the
    tokens whose interval, widened by it, holds the number.
    """
    scores = penalised(row, params.repetition_penalty, history)
    ranks = ranked(scores)
    if params.temperature == 0.0:
        return set(ranks[:1])
    top = scores[ranks[0]]
    scores = [(score - top) / params.temperature for score in scores]
    ranks = ranked(scores)[: params.top_k or None]
    weights = [math.exp(scores[id]) for id in ranks]
    sums = [math.fsum(weights[:count]) for count in range(len(weights) + 1)]
    slack = (len(row) + 16) * U
    enough, few = (params.top_p - slack) * sums[-1], (params.top_p + slack) * sums[-1]
    counts = {
        count
        for count in range(1, len(sums))
        if (sums[count] >= enough and sums[count - 1] <= few if params.top_p < 1 else count == len(weights))
    }
    likely = {
        max(1, sum(weight >= params.min_p * (1 + side * slack) for weight in weights)) for side in (-1, 1)
    }
    found = set()
    for kept in {min(count, limit) for count in counts for limit in likely}:
        at, margin = number * sums[kept], slack * sums[kept]
        found |= {ranks[i] for i in range(kept) if sums[i] - margin <= at <= sums[i + 1] + margin}
    return found


def draws_are_legal(
    subject: Subject, row: NDArray[np.floating], params: SamplingParams, history: Sequence[int] = ()
) -> None:
    """A few draws, each of which must be one of the legal tokens."""
    for index in range(DRAWS):
        token = subject.sample(row, params, history, index).token
        assert token in legal_tokens(row, params, history, philox(params.seed, index))


@holds("SMP-1", "sampler", tier="state")
def all_steps_together(subject: Subject, data: st.DataObject) -> None:
    """Every parameter away from its neutral value, in the order of the clause."""
    for row in data.draw(SEVERAL_ROWS):
        params = SamplingParams(
            temperature=data.draw(st.sampled_from([2.0, 0.5, 4.0])),
            top_k=data.draw(st.sampled_from([7, 3, 50])),
            top_p=data.draw(TOP_PS),
            min_p=data.draw(st.sampled_from([0.01, 0.1])),
            repetition_penalty=data.draw(PENALTIES),
            seed=data.draw(SEEDS),
        )
        draws_are_legal(subject, row, params, data.draw(histories(row)))


@holds("SMP-2", "sampler", tier="state")
def what_is_not_finite_is_refused(subject: Subject, data: st.DataObject) -> None:
    """One bad logit anywhere, with any parameters."""
    row = data.draw(rows())
    row[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    try:
        subject.sample(row, data.draw(ANY_PARAMS), [], 0)
    except NumericalError:
        return
    raise AssertionError("a token was drawn from logits that are not finite")


@holds("SMP-3", "sampler", tier="state")
def the_penalty_works_on_both_signs(subject: Subject, data: st.DataObject) -> None:
    """Without temperature exactly the first of the penalised; with it, draws from them."""
    for row in data.draw(SEVERAL_ROWS):
        history, penalty = data.draw(histories(row)), data.draw(PENALTIES | st.sampled_from([1e-310, 1e308]))
        expected = ranked(penalised(row, penalty, history))[0]
        assert subject.sample(row, SamplingParams(repetition_penalty=penalty), history, 0).token == expected
        params = SamplingParams(temperature=1.0, repetition_penalty=penalty, seed=data.draw(SEEDS))
        draws_are_legal(subject, row, params, history)


@holds("SMP-3", "sampler", "backend", tier="state")
def the_history_is_prompt_and_output(subject: Subject, data: st.DataObject) -> None:
    """The engine hands over all ids so far, and how many are generated; the penalty acts on all of them."""
    prompt = tuple(data.draw(st.lists(st.integers(0, 96), min_size=1, max_size=8)))
    seen: list[tuple[list[int], int]] = []

    def sample(row: Any, params: SamplingParams, history: Sequence[int], index: int) -> Sampled:
        seen.append((list(history), index))
        sampled: Sampled = subject.sample(row, params, history, index)
        assert sampled.token in legal_tokens(row, params, history, philox(params.seed, index))
        return sampled

    params = SamplingParams(repetition_penalty=data.draw(PENALTIES))
    outputs = run(replace(subject, sample=sample), Request(prompt, max_tokens=4, sampling=params))
    tokens = [output.sampled.token for output in outputs if output.sampled]
    assert seen == [([*prompt, *tokens[:index]], index) for index in range(4)]


@holds("SMP-4", "sampler", tier="state")
def greedy_takes_the_lowest_of_the_highest(subject: Subject, data: st.DataObject) -> None:
    """The first place of the maximum, whatever the filters and the seed."""
    params = replace(data.draw(ANY_PARAMS), temperature=0.0, repetition_penalty=1.0)
    for row in data.draw(SEVERAL_ROWS):
        logits = [float(logit) for logit in row]
        assert subject.sample(row, params, [], data.draw(st.integers(0, 100))).token == logits.index(
            max(logits)
        )


@holds("SMP-5", "sampler", tier="state")
def temperature_divides(subject: Subject, data: st.DataObject) -> None:
    """Draws at many temperatures, extreme ones included."""
    row = data.draw(rows())
    temperature = data.draw(TEMPERATURES | st.sampled_from([1e-310, 1e-3, 1e300]))
    draws_are_legal(subject, row, SamplingParams(temperature=temperature, seed=data.draw(SEEDS)))


@holds("SMP-6", "sampler", tier="state")
def top_k_keeps_k(subject: Subject, data: st.DataObject) -> None:
    """Draws lie among the first k, and are those of their distribution."""
    for row in data.draw(SEVERAL_ROWS):
        temperature, top_k = data.draw(TEMPERATURES), data.draw(TOP_KS)
        params = SamplingParams(temperature=temperature, top_k=top_k, seed=data.draw(SEEDS))
        draws_are_legal(subject, row, params)


@holds("SMP-7", "sampler", tier="state")
def top_p_keeps_the_crossing_token(subject: Subject, data: st.DataObject) -> None:
    """Draws from the smallest set that reaches p, alone and of what top-k left."""
    for row in data.draw(SEVERAL_ROWS):
        top_k, top_p = data.draw(st.sampled_from([2, 3, 7, 0])), data.draw(TOP_PS)
        params = SamplingParams(temperature=2.0, top_k=top_k, top_p=top_p, seed=data.draw(SEEDS))
        draws_are_legal(subject, row, params)


@holds("SMP-8", "sampler", tier="state")
def min_p_is_relative_to_the_top(subject: Subject, data: st.DataObject) -> None:
    """Draws from the tokens with at least m times the weight of the first."""
    row = data.draw(rows())
    temperature, min_p = data.draw(TEMPERATURES), data.draw(MIN_PS)
    params = SamplingParams(temperature=temperature, min_p=min_p, seed=data.draw(SEEDS))
    draws_are_legal(subject, row, params)


@holds("SMP-9", "sampler", level="L2", tier="state")
def the_random_number_is_philox(subject: Subject, data: st.DataObject) -> None:
    """Of 4,096 equal logits, all sums are whole numbers: the token is exactly ⌊4096 · number⌋."""
    seed, index = data.draw(SEEDS), data.draw(st.integers(0, 2**32))
    params = SamplingParams(temperature=data.draw(TEMPERATURES), seed=seed)
    row = np.full(4096, data.draw(st.sampled_from([0.0, -3.0, 11.0])))
    history = data.draw(histories(row))
    assert subject.sample(row, params, history, index).token == int(4096 * philox(seed, index))


@holds("SMP-10", "sampler", tier="state")
def the_draw_inverts_the_sum(subject: Subject, data: st.DataObject) -> None:
    """Draws at temperature 1 with no filter."""
    draws_are_legal(subject, data.draw(rows()), SamplingParams(temperature=1.0, seed=data.draw(SEEDS)))


def logprob_is_right(row: NDArray[np.floating], token: int, logprob: float) -> bool:
    """Whether a log-probability lies within the bound of SMP-11."""
    top = max(map(float, row))
    total = math.log(math.fsum(math.exp(float(logit) - top) for logit in row))
    expected = float(row[token]) - top - total
    return abs(logprob - expected) <= (2 * len(row) + 16 + 10 * -expected) * U


@holds("SMP-11", "sampler", tier="state")
def log_probabilities_are_of_the_raw_logits(subject: Subject, data: st.DataObject) -> None:
    """Any parameters: the numbers are those of the row as it came."""
    row, params = data.draw(rows()), data.draw(ANY_PARAMS)
    sampled = subject.sample(row, params, data.draw(histories(row)), 0)
    if params.logprobs is None:
        assert sampled.logprob is None
    else:
        for token, logprob in [(sampled.token, sampled.logprob), *sampled.top_logprobs]:
            assert logprob_is_right(row, token, logprob)


@holds("SMP-12", "sampler", tier="state")
def alternatives_are_the_highest_logits(subject: Subject, data: st.DataObject) -> None:
    """Any parameters: as many as asked for, in the order of the raw logits."""
    for row in data.draw(SEVERAL_ROWS):
        params = data.draw(ANY_PARAMS)
        sampled = subject.sample(row, params, data.draw(histories(row)), 0)
        expected = ranked([float(logit) for logit in row])[: params.logprobs or 0]
        assert [token for token, _ in sampled.top_logprobs] == expected


@cache
def model() -> Model:
    """A tiny model, made once."""
    return tiny_model(layers=1)


def run(subject: Subject, request: Request, tokenizer: Tokenizer | None = None) -> list[Output]:
    """All outputs of a request, alone in an engine of the subject's parts."""
    engine = Engine(
        model(),
        subject.start(),
        EngineConfig(policy=subject.policy.name, fallback=subject.fallback),
        tokenizer,
        schedule=subject.schedule,
        sample=subject.sample,
        kv_cache=subject.kv_cache,
    )
    engine.submit(request)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


@holds("SMP-13", "sampler", "backend", tier="state")
def the_first_stop_id_is_the_last_token(subject: Subject, data: st.DataObject) -> None:
    """A run without stop ids tells where a run with them must end; ids of the prompt do not matter."""
    request = Request(
        tuple(data.draw(st.lists(st.integers(0, 96), min_size=1, max_size=6))),
        max_tokens=4,
        sampling=data.draw(ANY_PARAMS),
    )
    free = run(subject, request)
    tokens = [output.sampled.token for output in free if output.sampled]
    stop = frozenset(data.draw(st.lists(st.sampled_from([*tokens, *request.prompt, 96]), max_size=3)))
    stopped = run(subject, replace(request, stop_ids=stop))
    end = next((at for at, token in enumerate(tokens) if token in stop), None)
    expected = free if end is None else free[: end + 1]
    assert [output.sampled for output in stopped] == [output.sampled for output in expected]
    assert stopped[-1].finish_reason == ("length" if end is None else "stop")


PIECES = ("a", "b", "<", "|", ">", "ab", "<|", "|>", "b<", "a|>b", "aa")
"""Texts of the tokens 0, 1, 2 …"""


@cache
def pieces_tokenizer() -> Tokenizer:
    """A tokenizer of ``PIECES``."""
    return Tokenizer(
        TokenizerData(
            model="gpt2",
            tokens=PIECES,
            types=bytes([TokenType.NORMAL] * len(PIECES)),
            text_ids={piece: id for id, piece in enumerate(PIECES)},
            scores=(),
            merges=(),
            pre_tokenizer=pre_tokenizer("gpt-2"),
            bos_id=None,
            eos_id=None,
            end_ids=frozenset(),
            add_bos=False,
            add_eos=False,
            add_space_prefix=False,
            chat_template=None,
        )
    )


@holds("SMP-14", "backend", tier="state")
def no_part_of_a_stop_string_is_shown(subject: Subject, data: st.DataObject) -> None:
    """With given tokens: after each, the text shown is all but what may begin a stop string."""
    script = data.draw(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=10))
    stops = data.draw(st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=3))
    scripted = replace(subject, sample=lambda row, params, history, index: Sampled(script[index], 0.0))
    request = Request((1,), max_tokens=len(script), stop=tuple(stops))
    outputs = run(scripted, request, pieces_tokenizer())
    shown = list(accumulate(output.text for output in outputs))
    for count, output in enumerate(outputs, 1):
        text = "".join(PIECES[token] for token in script[:count])
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            assert (shown[count - 1], output.finish_reason) == (text[: min(found)], "stop")
        elif count == len(script):
            assert (shown[count - 1], output.finish_reason) == (text, "length")
        else:
            beginnings = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            assert shown[count - 1] == text[: len(text) - max(beginnings, default=0)]
            assert output.finish_reason is None
    assert outputs[-1].finish_reason is not None
