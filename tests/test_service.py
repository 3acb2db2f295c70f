"""The engine behind a thread: many callers, each with its own outputs, and nobody waits for a slow one."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_model import tiny_model

from refengine import Engine, EngineConfig, Request, SamplingParams
from refengine.backend import load
from refengine.errors import RequestError, TokenIdError
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
