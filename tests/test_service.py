"""The engine behind a thread: many callers, each with its own outputs, and nobody waits for a slow one."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Output, Request, SamplingParams
from refengine.backend import load
from refengine.engine_journal import EngineJournal
from refengine.errors import OutputError, RequestError, TokenIdError
from refengine.service import EngineService, Ticket

REQUESTS = [
    Request(tuple(range(1, n)), 8, SamplingParams(temperature=1.0, seed=n), samples=1 + n % 3)
    for n in range(2, 14)
]


def engine() -> Engine:
    return Engine(
        tiny_model("gemma3"), load("numpy"), EngineConfig(block_size=4, token_budget=16, max_sequences=4)
    )


def tokens(ticket: Ticket) -> list[tuple[int, int]]:
    return sorted((o.sample, o.sampled.token) for o in ticket if o.sampled is not None)


@pytest.fixture(scope="module")
def alone() -> list[list[tuple[int, int]]]:
    """What each request gets from an engine of its own."""
    results = []
    for request in REQUESTS:
        made = engine()
        made.submit(request)
        outputs = []
        while made.has_work:
            outputs += made.step()
        results.append(sorted((o.sample, o.sampled.token) for o in outputs if o.sampled is not None))
    return results


def test_threads_get_what_they_would_get_alone(alone: list[list[tuple[int, int]]]) -> None:
    """Twelve threads at once, each reading its own stream."""
    with EngineService(engine()) as service, ThreadPoolExecutor(12) as threads:
        results = list(threads.map(lambda request: tokens(service.submit(request)), REQUESTS))
    assert results == alone


def test_tasks_get_what_they_would_get_alone(alone: list[list[tuple[int, int]]]) -> None:
    """The same from asyncio, in one thread."""

    async def one(service: EngineService, request: Request) -> list[tuple[int, int]]:
        ticket = await service.submit_async(request)
        return sorted([(o.sample, o.sampled.token) async for o in ticket if o.sampled is not None])

    async def everybody() -> list[list[tuple[int, int]]]:
        with EngineService(engine()) as service:
            return await asyncio.gather(*(one(service, request) for request in REQUESTS))

    assert asyncio.run(everybody()) == alone


def test_a_reader_that_never_comes_delays_nobody(alone: list[list[tuple[int, int]]]) -> None:
    """Others end while its outputs wait, and it finds them all later."""
    with EngineService(engine()) as service:
        neglected = service.submit(REQUESTS[0])
        assert tokens(service.submit(REQUESTS[1])) == alone[1]
        assert tokens(neglected) == alone[0]


def test_abort_from_another_thread_ends_a_stream() -> None:
    """The reader gets an output that says so, as its last, and the memory is free."""
    made = engine()
    with EngineService(made) as service:
        ticket = service.submit(Request((1, 2, 3), 200, samples=2))
        threading.Timer(0.05, ticket.abort).start()
        *_, last = ticket
        ticket.abort()
        assert last.finish_reason in ("abort", "length")
        assert list(ticket) == []
    assert made.memory().current.kv_cache == 0


def test_leaving_a_task_aborts_its_request() -> None:
    """Cancelled in the middle of its stream, it leaves nothing behind."""
    made = engine()

    async def read_forever(service: EngineService) -> None:
        async for _ in await service.submit_async(Request((1, 2, 3), 240)):
            pass

    async def cancelled() -> None:
        with EngineService(made) as service:
            task = asyncio.create_task(read_forever(service))
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert tokens(service.submit(REQUESTS[0]))

    asyncio.run(cancelled())
    assert not made.has_work
    assert made.memory().current.kv_cache == 0


def test_refusals_come_to_the_caller() -> None:
    """What the engine refuses, its caller hears; others go on. A closed service takes nothing."""
    with EngineService(engine()) as service:
        with pytest.raises(TokenIdError):
            service.submit(Request((1000,), 1))
        assert tokens(service.submit(REQUESTS[0]))
    with pytest.raises(RequestError, match="shutting down"):
        service.submit(REQUESTS[0])


def test_closing_ends_what_is_unfinished() -> None:
    """Every reader gets a last output."""
    with EngineService(engine()) as service:
        ticket = service.submit(Request((1, 2, 3), 240))
    *_, last = ticket
    assert last.finish_reason == "abort"


class FullDisk:
    """Takes some lines, and then none."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, line: str) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(28, "No space left on device")


def test_a_full_disk_ends_what_is_under_way_or_is_told(alone: list[list[tuple[int, int]]]) -> None:
    """Each sample that is unfinished gets the cause, and the next request is served; or only one is told."""
    number = 7
    request = REQUESTS[number]
    for told in (None, list[OutputError]()):
        journal = EngineJournal(FullDisk(3), on_failure=None if told is None else told.append)
        recorded = Engine(
            tiny_model("gemma3"),
            load("numpy"),
            EngineConfig(block_size=4, token_budget=16, max_sequences=4),
            journal=journal,
        )
        with EngineService(recorded) as service:
            outputs = list(service.submit(request))
            failed = [output for output in outputs if output.finish_reason == "error"]
            if told is None:
                assert sorted(output.sample for output in failed) == list(range(request.samples))
                assert all(isinstance(output.error, OutputError) for output in failed)
                assert tokens(service.submit(request)) == alone[number]
            else:
                assert (failed, len(told)) == ([], 1)
                assert sorted((o.sample, o.sampled.token) for o in outputs if o.sampled) == alone[number]


def test_a_failure_of_the_engine_ends_the_samples_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those and no others, each once: samples that have ended are not told of again."""
    failing = engine()
    step = failing.step

    def once_it_fails() -> list[Output]:
        outputs = step()
        if not any(output.finish_reason for output in outputs):
            return outputs
        monkeypatch.setattr(failing, "step", broken)
        return outputs

    def broken() -> list[Output]:
        monkeypatch.setattr(failing, "step", step)
        raise ArithmeticError("the engine is broken")

    monkeypatch.setattr(failing, "step", once_it_fails)
    # the three samples end at different tokens: their stop ids are what others draw later
    request = Request(
        (1, 2, 3), 40, SamplingParams(temperature=1.5, seed=1), frozenset(range(0, 97, 6)), samples=3
    )
    with EngineService(failing) as service:
        outputs = list(service.submit(request))
    ends = [(output.sample, output.finish_reason) for output in outputs if output.finish_reason]
    assert sorted(sample for sample, _ in ends) == [0, 1, 2]
    assert {reason for _, reason in ends} == {"stop", "error"}
