"""Arguments and options that several commands share, so that one name means one thing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import click

from refengine.cli.flight import FlightLog
from refengine.cli.generation import Generation
from refengine.cli.journal_file import JournalFile
from refengine.cli.loading import EngineOptions
from refengine.cli.sections import section
from refengine.cli.sizes import EXAMPLES, size
from refengine.config import EngineConfig

Command = Callable[..., None]

CONFIG = (
    "policy",
    "kv_dtype",
    "token_budget",
    "kv_tokens",
    "memory",
    "weight_cache",
    "reserve",
    "check",
    "fallback",
)
"""Fields of ``EngineConfig`` that are options of their names."""

answer_option, memory_option = section("Answer"), section("Memory")

model_argument = click.argument("model")

offline_option = click.option("--offline", is_flag=True, help="Download nothing; use what is cached.")

policy_option = click.option(
    "--policy",
    default="float32",
    show_default=True,
    metavar="NAME",
    help="Precision policy: float32, mixed8, mixed16; float64 is the oracle's.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")

verbose_option = click.option(
    "--verbose", is_flag=True, help="Tell times, rates and memory after each answer."
)

backend_option = click.option(
    "--backend", default="auto", show_default=True, metavar="NAME", help="See `refengine backends`."
)

system_option = click.option("--system", metavar="TEXT", help="System message, for the chat template.")


def generation_options(command: Command) -> Command:
    """Add what makes a ``Generation``; the command gets it as ``generation``."""

    @_number("-n", "--max-tokens", None, "until the model stops", "Generate N tokens at most.")
    @answer_option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable.")
    @_number(
        "--temperature", "--temp", 0.0, "0, the likeliest always", "Divide logits by X before the choice."
    )
    @_number("--top-k", 0, "0, all", "Choose among the N likeliest tokens.")
    @_number("--top-p", 1.0, "1, all", "Choose among the likeliest tokens that make up X together.")
    @_number("--min-p", 0.0, "0, all", "Choose among tokens at least X times as likely as the likeliest.")
    @_number("--repetition-penalty", 1.0, "1, none", "Make tokens that have occurred less likely.")
    @_number("--seed", 0, "0", "Of the random choice: the same seed gives the same answer.")
    @wraps(command)
    def with_generation(*args: Any, max_tokens: int | None, stop: tuple[str, ...], **others: Any) -> None:
        from refengine.sampling import SamplingParams

        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        sampling = SamplingParams(**{name: others.pop(name) for name in names})
        command(*args, generation=Generation(max_tokens, stop, sampling), **others)

    return with_generation


def engine_options(command: Command) -> Command:
    """Add what makes ``EngineOptions``; the command gets them as ``engine``.

    The engine is one for a single sequence: a command that wants more changes ``engine.config``.
    """

    @backend_option
    @policy_option
    @memory_options
    @memory_option(
        "--kv-tokens", type=int, metavar="N", help="Make room for N positions.  [default: a full context]"
    )
    @memory_option(
        "--reserve", default=0, metavar="N", help="Take the memory of N positions at start, and keep it."
    )
    @memory_option("--check", is_flag=True, help="Verify the memory manager's books at every step; slow.")
    @memory_option(
        "--flight-recorder",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        metavar="FILE",
        help="When a limit is hit, write the last events to FILE: .json, or a timeline as .html.",
    )
    @click.option(
        "--journal",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        metavar="FILE",
        help="Write requests with their prompts, every decision, and hashes of the answers to FILE, which"
        " must not exist; see `refengine replay`.",
    )
    @click.option(
        "--journal-optional",
        is_flag=True,
        help="Go on without the journal where it cannot be written, as on a full disk.  [default: stop]",
    )
    @click.option("--fallback", is_flag=True, help="Let golden ops stand in for what the backend lacks.")
    @offline_option
    @wraps(command)
    def with_engine(
        *args: Any,
        backend: str,
        offline: bool,
        flight_recorder: Path | None,
        journal: Path | None,
        journal_optional: bool,
        **others: Any,
    ) -> None:
        if journal_optional and journal is None:
            raise click.UsageError("--journal-optional is for --journal: without it, none is written")
        fields = {name: others.pop(name) for name in CONFIG}
        config = EngineConfig(max_sequences=1, **fields)
        flight = None if flight_recorder is None else FlightLog(flight_recorder, config.memory)
        written = None if journal is None else JournalFile(journal, optional=journal_optional)
        with written or nullcontext():
            try:
                command(*args, engine=EngineOptions(backend, config, offline, flight, written), **others)
            finally:
                if flight is not None:
                    flight.close()

    return with_engine


def memory_options(command: Command) -> Command:
    """Add how much an engine may hold, and in which precision: fields of ``EngineConfig``."""
    options = (
        memory_option(
            "--memory", type=size, metavar="SIZE", help=f"Hold no more, whatever comes: {EXAMPLES}."
        ),
        memory_option(
            "--kv-dtype",
            metavar="NAME",
            help="Of keys and values: float32, float16, int8, int4, or int8/int4 for keys/values."
            "  [default: the policy's]",
        ),
        memory_option(
            "--weight-cache",
            type=size,
            metavar="SIZE",
            help="Keep so much of the weights decoded; decode the others where they are used."
            "  [default: all, or what --memory leaves]",
        ),
        memory_option(
            "--token-budget",
            default=EngineConfig.token_budget,
            show_default=True,
            metavar="N",
            help="Compute N tokens per step at most.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def text_options(command: Command) -> Command:
    """Add how a text becomes token ids: ``special``, ``bos`` and ``ids``."""
    special = click.option(
        "--special",
        is_flag=True,
        help="Read the names of control tokens, such as <|im_start|>, as these tokens.",
    )
    bos = click.option(
        "--no-bos", "bos", flag_value=False, default=True, help="Add no tokens before and after the text."
    )
    ids = click.option("--ids", is_flag=True, help="TEXT is token ids, separated by spaces or commas.")
    return special(bos(ids(command)))


def _number(*declaration: Any) -> Callable[[Command], Command]:
    """An option with a number: its names, its default, the default in words, and its help."""
    *names, default, words, text = declaration
    kind, metavar = (float, "X") if isinstance(default, float) else (int, "N")
    return answer_option(
        *names, type=kind, default=default, metavar=metavar, help=f"{text}  [default: {words}]"
    )
