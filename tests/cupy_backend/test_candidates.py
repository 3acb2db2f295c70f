"""Candidates found by the kernels: which they are, what sums hold, and what an engine draws and copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from candidate_backend import any_requests, outputs_of
from cupy_backend.emulation import EmulatedRuntime
from numpy.typing import NDArray
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request, SamplingParams
from refengine.candidates import MOST_CANDIDATES, Candidates
from refengine.errors import RequestError, UnsupportedError
from refengine.program import StepBatch, symbolic_inputs
from refengine.sampling import sample
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.subject import Subject
from refengine_cupy.backend import CupyBackend
from refengine_cupy.candidates import CHUNK, MOST_CHUNKS, MOST_OF_THREAD, THREADS, CandidateSearch
from refengine_cupy.runtime import Copy, Work

U = 2.0**-53


class Counting(EmulatedRuntime):
    """Counts bytes that are copied back, copy by copy."""

    def __init__(self) -> None:
        super().__init__()
        self.downloads: list[int] = []

    def download(self, address: int, out: NDArray[Any]) -> None:
        self.downloads.append(out.nbytes)
        super().download(address, out)

    def launch(self, launches: Sequence[Work]) -> None:
        super().launch(launches)
        copies = [work.nbytes for work in launches if isinstance(work, Copy)]
        self.downloads += copies[1:]  # the first takes the step's arrays there


def search(rows: NDArray[np.float32], temperatures: NDArray[np.float64]) -> Candidates:
    """The candidates of any rows, by the kernels alone."""
    runtime = EmulatedRuntime()
    count, size = rows.shape
    logits, given = runtime.allocate(rows.nbytes, "logits"), runtime.allocate(8 * count, "temperatures")
    runtime.upload(logits.address, np.ascontiguousarray(rows))
    runtime.upload(given.address, temperatures)
    made = CandidateSearch(runtime, count, size)
    runtime.launch(made.work(count, logits.address, given.address))
    return made.read(count, rows.__getitem__)


def check(rows: NDArray[np.float32], temperatures: list[float]) -> None:
    """Against Python's order, and sums of Python's exponentials."""
    found = search(rows, np.array(temperatures))
    assert found.finite.all()
    for row, temperature in enumerate(temperatures):
        numbers = rows[row].tolist()
        ranks = sorted(range(len(numbers)), key=lambda id: (-numbers[id], id))[:MOST_CANDIDATES]
        assert found.tokens[row].tolist() == ranks
        assert found.logits[row].tobytes() == rows[row, ranks].tobytes()
        exact, top = 0.0, max(numbers)
        if temperature > 0:
            exact = math.fsum(math.exp((number - top) / temperature) for number in numbers)
        assert abs(float(found.sums[row]) - exact) <= (len(numbers) + 16) * U * exact


@pytest.mark.parametrize(
    "size", [1, 2, 31, 97, 127, 128, 129, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77, 33_333]
)
def test_the_first_of_rows_of_any_length_in_their_order(size: int) -> None:
    """Rows without ties, with many, and with the highest all at one end."""
    rng = np.random.default_rng(size)
    rows = rng.standard_normal((4, size)).astype(np.float32) * np.float32(4)
    rows[1] = np.round(rows[1])
    rows[2].sort()
    rows[3] = np.sort(rows[3])[::-1]
    check(rows, [1.0, 0.3, 0.0, 2.5])


@pytest.mark.parametrize("size", [97, 5000, 9001])
def test_equals_go_by_id_and_zeros_are_equal(size: int) -> None:
    rng = np.random.default_rng(size)
    zeros = np.where(rng.random(size) < 0.5, -0.0, 0.0)
    rows = np.stack([np.full(size, -7.5), zeros, np.where(rng.random(size) < 0.01, -1e-45, zeros)])
    check(rows.astype(np.float32), [1.0, 1.0, 1.0])


def test_extremes_keep_their_order() -> None:
    """The largest numbers of both signs, the smallest, and what lies between."""
    numbers = [3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 1e-38, 0.0, -0.0, 1.0, -1.0, 2.0]
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(np.resize(numbers, 200)) for _ in range(2)]).astype(np.float32)
    check(rows, [1.0, 1e-310])


def test_a_sum_of_many_equals_is_exact() -> None:
    """Weights of 1 are added without rounding, whatever the order."""
    found = search(np.full((2, 9000), 2.5, np.float32), np.array([0.7, 0.0]))
    assert found.sums.tolist() == [9000.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 4095, 4096, 9000])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(value: float, place: int) -> None:
    rows = np.random.default_rng(1).standard_normal((3, 9001)).astype(np.float32)
    rows[1, place] = value
    found = search(rows, np.ones(3))
    assert found.finite.tolist() == [True, False, True]
    rest = search(rows[[0, 2]], np.ones(2))
    assert found.tokens[[0, 2]].tobytes() == rest.tokens.tobytes()
    assert found.sums[[0, 2]].tobytes() == rest.sums.tobytes()


def test_rows_of_nothing_but_infinities_do_no_harm() -> None:
    rows = np.full((3, 5000), np.nan, np.float32)
    rows[1], rows[2, :] = np.inf, -np.inf
    assert not search(rows, np.ones(3)).finite.any()


def test_longer_rows_are_cut_into_larger_chunks() -> None:
    """So that each thread looks through no more keys than there is room for."""
    for size in (1, CHUNK, CHUNK * MOST_CHUNKS, CHUNK * MOST_CHUNKS + 1, 5_000_000):
        made = CandidateSearch(EmulatedRuntime(), 1, size)
        assert made._chunk % CHUNK == 0
        assert (made._chunks - 1) * made._chunk < size <= made._chunks * made._chunk
        assert max(made._chunk, made._chunks * MOST_CANDIDATES) <= MOST_OF_THREAD * THREADS


def test_the_best_may_all_be_keys_of_a_few_threads() -> None:
    """The worst case for what is put down before it is ranked: whole chunks of the highest, others far below."""
    rows = np.full((1, MOST_OF_THREAD * CHUNK), -5.0, np.float32)
    rows[0, ::THREADS] = 1.0
    rows[0, 1 :: THREADS // 2] = 2.0
    check(rows, [1.0])


def drawing_engine(runtime: EmulatedRuntime, *, rows: bool = False, **limits: Any) -> Engine:
    """An engine on the played device; one that copies rows where this is asked for."""
    options: dict[str, Any] = {"sample": lambda *arguments: sample(*arguments)} if rows else {}
    return Engine(
        tiny_model("llama", vocabulary_size=300), CupyBackend(runtime), EngineConfig(**limits), **options
    )


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_draws_what_the_golden_sampler_draws_from_the_same_logits(seed: int) -> None:
    """Every output of every step, whatever the parameters, in steps of several shapes and graphs."""
    requests = any_requests(seed)
    limits = {"token_budget": [7, 64][seed % 2], "max_sequences": 4, "kv_tokens": 160}
    drawn = outputs_of(drawing_engine(EmulatedRuntime(), **limits), requests)
    assert drawn == outputs_of(drawing_engine(EmulatedRuntime(), rows=True, **limits), requests)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=3)]
)
def test_a_step_copies_little_more_than_its_candidates_and_in_one_copy(params: SamplingParams) -> None:
    """8 bytes for each candidate, and 12 for each chunk of a row."""
    runtime = Counting()
    made = drawing_engine(runtime)
    for first in (1, 2, 3):
        made.submit(Request((first, 4), max_tokens=5, sampling=params))
    while made.has_work:
        before = len(runtime.downloads)
        made.step()
        assert runtime.downloads[before:] == [3 * (8 * MOST_CANDIDATES + 12)]


def test_a_row_is_one_more_copy_where_a_request_needs_it() -> None:
    runtime = Counting()
    made = drawing_engine(runtime)
    made.submit(Request((1, 4), max_tokens=1))
    made.submit(Request((2, 4), max_tokens=1, sampling=SamplingParams(repetition_penalty=1.2)))
    made.step()
    assert runtime.downloads == [2 * (8 * MOST_CANDIDATES + 12), 4 * 300]


PROMPTS = Prompts(tiny_model("llama", vocabulary_size=300), ((5, 6, 7, 8, 9), (20, 21)))


def test_candidates_are_found_by_two_launches_of_the_step() -> None:
    """Beside those of the logits; and steps with and without them have graphs of their own."""
    runtime = EmulatedRuntime()
    prompting = Prompting(Subject(lambda: CupyBackend(runtime)), PROMPTS)
    batch = PROMPTS.batch([Chunk(0, 0, 1)])
    launched = []
    for ask in (True, False, True, False, True):
        before = len(runtime.launched)
        if ask:
            prompting.executable.run_candidates(batch, np.ones(1))  # type: ignore[attr-defined]
        else:
            prompting.executable.run(batch)
        launched.append(runtime.launched[before:])
    assert launched[0] == [*launched[1], "candidates_of_chunks", "candidates_of_rows"]
    assert launched[2:] == [launched[0], launched[1], launched[0]]


def candidates_of_step(prompting: Prompting, batch: StepBatch, temperatures: Any) -> Candidates:
    found: Candidates = prompting.executable.run_candidates(batch, temperatures)  # type: ignore[attr-defined]
    return found


def test_a_row_of_an_earlier_step_is_refused() -> None:
    prompting = Prompting(Subject(lambda: CupyBackend(EmulatedRuntime())), PROMPTS)
    batch = PROMPTS.batch([Chunk(0, 0, 3)])
    expected = prompting.executable.run(batch)
    found = candidates_of_step(prompting, batch, np.zeros(3))
    assert found.row(1).tobytes() == expected[1].tobytes()
    with pytest.raises(RequestError, match="3 rows"):
        found.row(3)
    prompting.executable.run(batch)
    with pytest.raises(RequestError, match="earlier step"):
        found.row(1)


def test_temperatures_for_other_rows_are_refused() -> None:
    runtime = EmulatedRuntime()
    prompting = Prompting(Subject(lambda: CupyBackend(runtime)), PROMPTS)
    with pytest.raises(RequestError, match="4 temperatures for 3 rows"):
        candidates_of_step(prompting, PROMPTS.batch([Chunk(0, 0, 3)]), np.ones(4))
    assert runtime.launched == []


def test_a_step_without_rows_finds_nothing() -> None:
    prompting = Prompting(Subject(lambda: CupyBackend(EmulatedRuntime())), PROMPTS)
    batch = PROMPTS.batch([Chunk(0, 0, 3)])
    none = StepBatch(**{**vars(batch), "logit_rows": np.empty(0, np.int32)})
    found = candidates_of_step(prompting, none, np.empty(0))
    assert (found.tokens.shape, found.sums.shape) == ((0, MOST_CANDIDATES), (0,))


def test_a_result_that_is_no_rows_of_logits_has_no_candidates() -> None:
    subject = Subject(lambda: CupyBackend(EmulatedRuntime()))
    tracer = subject.tracer()
    inputs = symbolic_inputs(tracer, kv_groups=1)
    table = PROMPTS.model.weights["token_embedding"]
    program = tracer.finish(tracer.embedding(inputs.token_ids, tracer.symbol("table", "weight", table.shape)))
    executable = subject.compile(program, {"table": table}, 4)
    with pytest.raises(UnsupportedError, match="candidates"):
        executable.run_candidates(PROMPTS.batch([Chunk(0, 0, 3)]), np.ones(3))  # type: ignore[attr-defined]
