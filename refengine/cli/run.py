"""``refengine run``: one prompt, one answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.answer import Answer, follow
from refengine.cli.chat import converse
from refengine.cli.generation import Generation
from refengine.cli.loading import EngineOptions
from refengine.cli.memory import MemoryWatch, Observed, memory_json, print_memory
from refengine.cli.options import (
    answer_option,
    engine_options,
    generation_options,
    json_option,
    memory_option,
    model_argument,
    system_option,
    verbose_option,
)
from refengine.cli.pieces import piece, token_json
from refengine.cli.sections import SectionedCommand
from refengine.cli.statistics import Statistics, print_statistics, statistics_of
from refengine.cli.tables import print_table
from refengine.cli.terminal import is_interactive, piped_text, write_answer, write_json
from refengine.errors import RequestError

if TYPE_CHECKING:
    from refengine.llm import LLM
    from refengine.request import Output
    from refengine.tokenizer import Tokenizer


@click.command(cls=SectionedCommand)
@model_argument
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@system_option
@generation_options
@answer_option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Give N answers, each with the next seed; they share the prompt's memory.  [default: 1]",
)
@answer_option(
    "--logprobs", type=int, metavar="N", help="Report each token's N likeliest alternatives, 0 to 20."
)
@engine_options
@memory_option(
    "--memory-report", is_flag=True, help="Tell what was held, by purpose, and what had been planned."
)
@json_option
@verbose_option
def run(
    model: str,
    prompt: str | None,
    raw: bool,
    system: str | None,
    generation: Generation,
    samples: int,
    logprobs: int | None,
    engine: EngineOptions,
    memory_report: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Answer a prompt, or continue it where the model does not chat.

    What is piped in is the prompt, or follows it after an empty line. Without a prompt, at a terminal, this
    is `refengine chat`. The answer goes to stdout as it comes, everything else to stderr; several answers
    come when all have ended.

    \b
    Examples:
      refengine run smollm2 "Why is the sky blue?"
      git diff | refengine run smollm2 "Write a commit message for this change."
      refengine run gemma3-270m "Once upon a time" -n 50 --temp 0.8 --samples 3
      refengine run ./model.gguf "2 + 2 =" --raw -n 1 --logprobs 5 --json
      refengine run smollm2 "Hello" --memory 300MB --memory-report
    """
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out")
    text = _joined(prompt, piped_text())
    if text is None:
        alone = raw or as_json or logprobs is not None or samples > 1 or memory_report
        if alone or not is_interactive():
            raise click.UsageError("there is no prompt: give PROMPT, or pipe it in")
        converse(model, system, generation, engine, verbose)
        return
    sampling = replace(generation.sampling, logprobs=0 if as_json and logprobs is None else logprobs)
    generation = replace(generation, sampling=sampling, samples=samples)
    llm, load_s = engine.adjusted(max_sequences=samples).load(model, chat=not raw)
    prompt_ids = _prompt_ids(llm, text, system, raw)
    answers = [Answer(prompt_ids) for _ in range(samples)]
    watch = MemoryWatch(llm) if memory_report else None
    _follow(partial(generation.stream, llm, prompt_ids), answers, watch, shown=not as_json)
    statistics = statistics_of(answers, load_s)
    observed = watch.observed(answers) if watch else None
    if as_json:
        write_json(_as_json(model, llm.tokenizer, answers, statistics, observed))
        return
    if logprobs is not None:
        for answer in answers:
            _print_logprobs(llm.tokenizer, answer)
    if verbose:
        print_statistics(statistics)
    if observed:
        print_memory(observed)


def _follow(
    stream: Callable[[], Generator[Output]],
    answers: Sequence[Answer],
    watch: MemoryWatch | None,
    *,
    shown: bool,
) -> None:
    """Write one answer as it comes, several when all are there, each under a heading."""
    watches = [watch] if watch else []
    if shown and len(answers) == 1:
        answers[0].show(stream, *watches)
        return
    follow(stream, answers, *watches)
    for number, answer in enumerate(answers if shown else [], start=1):
        write_answer(f"--- {number} of {len(answers)} ---\n")
        write_answer(answer.text if answer.text.endswith("\n") else f"{answer.text}\n")


def _joined(prompt: str | None, piped: str | None) -> str | None:
    parts = [part for part in (prompt, piped) if part is not None]
    return "\n\n".join(parts) if parts else None


def _prompt_ids(llm: LLM, text: str, system: str | None, raw: bool) -> list[int]:
    if llm.tokenizer.chat_template is None and system is not None:
        raise RequestError("--system needs a chat template, and this model has none: put it into the prompt")
    if raw or llm.tokenizer.chat_template is None:
        return llm.tokenizer.encode(text)
    instructions = [] if system is None else [{"role": "system", "content": system}]
    return llm.chat_prompt([*instructions, {"role": "user", "content": text}])


def _as_json(
    model: str,
    tokenizer: Tokenizer,
    answers: Sequence[Answer],
    statistics: Statistics,
    observed: Observed | None,
) -> dict[str, Any]:
    """One answer stands at the top, several in a list."""
    told = [_answer_json(tokenizer, answer) for answer in answers]
    return {
        "model": model,
        "prompt_token_ids": answers[0].prompt_ids,
        **(told[0] if len(told) == 1 else {"samples": told}),
        "statistics": asdict(statistics),
        **({"memory": memory_json(observed)} if observed else {}),
    }


def _answer_json(tokenizer: Tokenizer, answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "token_ids": [sampled.token for sampled in answer.sampled],
        "logprobs": [
            {
                **token_json(tokenizer, sampled.token),
                "logprob": sampled.logprob,
                "top": [{**token_json(tokenizer, id), "logprob": p} for id, p in sampled.top_logprobs],
            }
            for sampled in answer.sampled
        ],
    }


def _print_logprobs(tokenizer: Tokenizer, answer: Answer) -> None:
    print_table(
        {"TOKEN": "left", "LOGPROB": "right", "LIKELIEST": "left"},
        [
            (
                piece(tokenizer, sampled.token),
                "" if sampled.logprob is None else f"{sampled.logprob:.4f}",
                "  ".join(f"{piece(tokenizer, id)} {logprob:.4f}" for id, logprob in sampled.top_logprobs),
            )
            for sampled in answer.sampled
        ],
        file=sys.stderr,
    )
