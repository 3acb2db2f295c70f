"""The process that properties run in: it may hang or crash, and only it does.

Tasks come pickled on stdin, outcomes go pickled to what was stdout when it started. What a backend prints
goes to stderr. Started by ``Worker``, as ``python -m refengine_conformance.worker``.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile
from time import perf_counter
from typing import Any

from refengine.errors import BackendError
from refengine_conformance.outcome import Outcome, Task

PARTS = ("state", "available", "why", "mend")
"""Of a ``BackendError``."""

MESSAGE_CHARACTERS, EXAMPLE_CHARACTERS = 2_000, 4_000


def main() -> None:
    """Serve until stdin ends: a request is a task or a function, a reply is a word and a value."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faulthandler.enable()
    requests = sys.stdin.buffer
    sys.path[:] = pickle.load(requests)

    def reply(word: str, value: object = None) -> None:
        replies.write(pickle.dumps((word, value)))
        replies.flush()

    reply("started")
    with suppress(EOFError):
        while True:
            request = pickle.load(requests)
            if isinstance(request, Task):
                reply("done", hold(request, partial(reply, "failing")))
            else:
                reply(*_called(request))


def _called(function: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", function()
    except BackendError as error:
        return "refused", (type(error), {part: getattr(error, part) for part in PARTS})
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"


def hold(task: Task, preliminary: Callable[[Outcome], object]) -> Outcome:
    """Hold a property against a subject.

    Args:
        task: what to do.
        preliminary: is told of the first failing example at once, lest the search for a simpler one hang.
    """
    from hypothesis import HealthCheck, Phase, given, reject, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky, Unsatisfiable

    from refengine.errors import UnsupportedError
    from refengine_conformance.support import lacks_any

    started = perf_counter()
    faulthandler.dump_traceback_later(task.limit_s)
    failing = False
    lacks: list[str] = []
    try:
        subject = task.make()
        check = _property(task.property_id).check

        @seeded(task.seed)
        @settings(
            max_examples=task.examples,
            phases=[Phase.generate, *([Phase.shrink] if task.shrink else [])],
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def run(data: st.DataObject) -> None:
            nonlocal failing
            try:
                check(subject, data)
            except UnsupportedError as error:
                if not (lacks or lacks_any(subject)):
                    raise
                lacks.append(str(error))
                if len(lacks) >= task.examples and not failing:
                    raise _LacksTooMuch from None
                reject()
            except Exception as error:
                if not failing and _is_failure(error):
                    failing = True
                    preliminary(_failure(error, perf_counter() - started))
                raise

        try:
            run()
        except (_LacksTooMuch, Unsatisfiable):
            if not lacks:
                raise
        return Outcome("unsupported" if lacks else "passed", perf_counter() - started, "".join(lacks[:1]))
    except Flaky as error:
        causes = getattr(error, "exceptions", ())
        cause = causes[0] if causes else error
        told = _failure(cause, perf_counter() - started)
        message = f"an example failed, and held when it was run again: {told.message}"
        example = _example(error) or told.example
        return Outcome("unsteady", told.seconds, message, example, told.worst, told.backend_failed)
    except Exception as error:
        return _failure(error, perf_counter() - started)
    finally:
        faulthandler.cancel_dump_traceback_later()


class _LacksTooMuch(BaseException):
    """So many examples take what the backend lacks that no more are drawn; Hypothesis lets it pass."""


def _property(id: str) -> Any:
    from refengine_conformance.registry import all_properties

    return next(p for p in all_properties() if p.id == id)


def _is_failure(error: Exception) -> bool:
    """Whether it is the subject's: Hypothesis has signals of its own."""
    from hypothesis.errors import HypothesisException

    return not isinstance(error, HypothesisException)


def _failure(error: BaseException, seconds: float) -> Outcome:
    from refengine.errors import BackendFailedError
    from refengine_conformance.bounds import BoundExceeded

    kind: Any = "broken" if isinstance(error, AssertionError) else "raised"
    text = str(error).strip()
    if kind == "raised":
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    if kind == "raised" or not text:
        text = "\n".join(filter(None, [text, _place(error)]))
    worst = error.worst if isinstance(error, BoundExceeded) else None
    failed = isinstance(error, BackendFailedError)
    return Outcome(kind, seconds, _cut(text, MESSAGE_CHARACTERS), _example(error), worst, failed)


def _place(error: BaseException) -> str:
    """Where it was raised: the innermost frame outside of NumPy and Hypothesis, and its line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(p in f.filename for p in ("/numpy/", "/hypothesis/"))]
    if not (own or frames):
        return ""
    frame = (own or list(frames))[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name}: {frame.line}"


def _example(error: BaseException) -> str:
    """The draws that Hypothesis notes on an error."""
    lines = "\n".join(getattr(error, "__notes__", ())).splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith("Draw ")), len(lines))
    drawn = takewhile(lambda line: not line.startswith("Failed to reproduce"), lines[first:])
    return _cut("\n".join(drawn).rstrip(), EXAMPLE_CHARACTERS)


def _cut(text: str, length: int) -> str:
    return (
        text
        if len(text) <= length
        else f"{text[:length].rstrip()} … ({len(text) - length:,} characters more)"
    )


if __name__ == "__main__":
    main()
