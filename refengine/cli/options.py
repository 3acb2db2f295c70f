"""Arguments and options that several commands share, so that one name means one thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from refengine.cli.generation import Generation
from refengine.cli.loading import EngineOptions

Command = Callable[..., None]

model_argument = click.argument("model")

offline_option = click.option("--offline", is_flag=True, help="Download nothing; use what is cached.")

policy_option = click.option(
    "--policy",
    default="float32",
    show_default=True,
    metavar="NAME",
    help="Precision policy; float64 is the oracle's.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")

verbose_option = click.option(
    "--verbose", is_flag=True, help="Tell times, rates and memory after each answer."
)

system_option = click.option("--system", metavar="TEXT", help="System message, for the chat template.")


def generation_options(command: Command) -> Command:
    """Add what makes a ``Generation``; the command gets it as ``generation``."""

    @_number("-n", "--max-tokens", None, "until the model stops", "Generate N tokens at most.")
    @click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable.")
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
    """Add what makes ``EngineOptions``; the command gets them as ``engine``."""

    @click.option(
        "--backend", default="auto", show_default=True, metavar="NAME", help="See `refengine backends`."
    )
    @policy_option
    @_number("--kv-tokens", None, "a full context", "Make room for N positions in the KV cache.")
    @click.option("--fallback", is_flag=True, help="Let golden ops stand in for what the backend lacks.")
    @offline_option
    @wraps(command)
    def with_engine(
        *args: Any,
        backend: str,
        policy: str,
        kv_tokens: int | None,
        fallback: bool,
        offline: bool,
        **others: Any,
    ) -> None:
        options = EngineOptions(backend, policy, kv_tokens, fallback=fallback, offline=offline)
        command(*args, engine=options, **others)

    return with_engine


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
    return click.option(
        *names, type=kind, default=default, metavar=metavar, help=f"{text}  [default: {words}]"
    )
