"""An engine in a thread of its own, for callers in other threads and in asyncio tasks."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from types import TracebackType

from refengine.engine import Engine
from refengine.errors import RequestError
from refengine.request import Output, Request


class Ticket:
    """A submitted request: its outputs as they come, and the way to abort it.

    Outputs wait here until they are read. A reader that is slow, or that never comes, delays nobody, and
    leaves at most one output per token that its request may have.

    Attributes:
        number: the request's number.
    """

    def __init__(self, number: int, samples: int, abort: Callable[[int], None]) -> None:
        self.number = number
        self._abort, self._unfinished = abort, set(range(samples))
        self._outputs: deque[Output] = deque()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Output]:
        """Outputs until all samples have ended; waits for those to come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outputs or not self._unfinished)
                if not self._outputs:
                    return
                output = self._outputs.popleft()
            yield output

    async def __aiter__(self) -> AsyncIterator[Output]:
        """Outputs until all samples have ended, without holding up the event loop.

        To leave the loop early, or to be cancelled in it, aborts the request.
        """
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(arrived.set)

        with self._changed:
            self._listeners.append(wake)
        try:
            while True:
                arrived.clear()
                with self._changed:
                    outputs, ended = list(self._outputs), not self._unfinished
                    self._outputs.clear()
                for output in outputs:
                    yield output
                if ended:
                    return
                await arrived.wait()
        finally:
            with self._changed:
                self._listeners.remove(wake)
            self.abort()

    def abort(self) -> None:
        """End the request now; its readers get an output that says so. Does nothing where it has ended."""
        if self._unfinished:
            self._abort(self.number)

    def _deliver(self, output: Output) -> None:
        with self._changed:
            if output.finish_reason == "abort":
                self._unfinished.clear()
            elif output.finish_reason:
                self._unfinished.discard(output.sample)
            self._outputs.append(output)
            self._changed.notify_all()
            listeners = list(self._listeners)
        for wake in listeners:
            wake()


class EngineService:
    """Steps an engine for as long as there is work, and hands out what it gives.

    Use as a context manager; leaving it aborts what is unfinished. The engine is touched by the service's
    thread alone.

    Where the engine itself fails, every request that is under way ends with the cause, and those that come
    later are served. A journal that cannot be written is such a failure, unless it has somebody to tell.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tickets: dict[int, Ticket] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="refengine", daemon=True)

    def __enter__(self) -> EngineService:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: Request) -> Ticket:
        """Queue a request; waits until the engine has accepted it, a step at most.

        Raises:
            RequestError: the engine refuses it, or the service is closed; see ``Engine.submit``.
        """
        return self._submit(request).result()

    async def submit_async(self, request: Request) -> Ticket:
        """As ``submit``, without holding up the event loop."""
        return await asyncio.wrap_future(self._submit(request))

    def _submit(self, request: Request) -> Future[Ticket]:
        accepted: Future[Ticket] = Future()

        def carry_out() -> None:
            if not accepted.set_running_or_notify_cancel():
                return
            try:
                number = self._engine.submit(request)
            except Exception as error:  # whatever it is, it is the caller's
                accepted.set_exception(error)
                return
            self._tickets[number] = Ticket(number, request.samples, self._abort)
            accepted.set_result(self._tickets[number])

        self._post(carry_out)
        return accepted

    def _abort(self, number: int) -> None:
        def carry_out() -> None:
            if (output := self._engine.abort(number)) is not None:
                self._tickets.pop(number)._deliver(output)

        with self._changed:
            if not self._closing:
                self._inbox.append(carry_out)
                self._changed.notify()

    def _post(self, work: Callable[[], None]) -> None:
        with self._changed:
            if self._closing:
                raise RequestError("the engine is shutting down and takes no more requests")
            self._inbox.append(work)
            self._changed.notify()

    def _step(self) -> list[Output]:
        """One step; where the engine itself fails, every request ends with the cause."""
        try:
            return self._engine.step()
        except Exception as error:  # nobody else is there to hear of it
            return [
                Output(number, None, "", "error", sample, error)
                for number, ticket in self._tickets.items()
                if self._engine.abort(number)
                for sample in sorted(ticket._unfinished)
            ]

    def _run(self) -> None:
        """The thread: what callers want comes between steps."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._inbox or self._engine.has_work)
                work, closing = list(self._inbox), self._closing
                self._inbox.clear()
            for each in work:
                each()
            if closing:
                break
            for output in self._step():
                ticket = self._tickets[output.request]
                ticket._deliver(output)
                if not ticket._unfinished:
                    del self._tickets[output.request]
        for number, ticket in self._tickets.items():
            if (aborted := self._engine.abort(number)) is not None:
                ticket._deliver(aborted)
