"""``refengine run``: one prompt, one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.answer import Answer
from refengine.cli.chat import converse
from refengine.cli.generation import Generation
from refengine.cli.loading import EngineOptions
from refengine.cli.options import (
    engine_options,
    generation_options,
    json_option,
    model_argument,
    system_option,
    verbose_option,
)
from refengine.cli.pieces import piece, token_json
from refengine.cli.statistics import Statistics, print_statistics, statistics_of
from refengine.cli.tables import print_table
from refengine.cli.terminal import is_interactive, piped_text, write_json
from refengine.errors import RequestError

if TYPE_CHECKING:
    from refengine.llm import LLM
    from refengine.tokenizer import Tokenizer


@click.command()
@model_argument
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@system_option
@generation_options
@click.option(
    "--logprobs", type=int, metavar="N", help="Report each token's N likeliest alternatives, 0 to 20."
)
@engine_options
@json_option
@verbose_option
def run(
    model: str,
    prompt: str | None,
    raw: bool,
    system: str | None,
    generation: Generation,
    logprobs: int | None,
    engine: EngineOptions,
    as_json: bool,
    verbose: bool,
) -> None:
    """Answer a prompt, or continue it where the model does not chat.

    What is piped in is the prompt, or follows it after an empty line. Without a prompt, at a terminal, this
    is `refengine chat`. The answer goes to stdout as it comes, everything else to stderr.

    \b
    Examples:
      refengine run smollm2 "Why is the sky blue?"
      git diff | refengine run smollm2 "Write a commit message for this change."
      refengine run gemma3-270m "Once upon a time" -n 50 --temp 0.8 --seed 7
      refengine run ./model.gguf "2 + 2 =" --raw -n 1 --logprobs 5 --json
    """
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out")
    text = _joined(prompt, piped_text())
    if text is None:
        if raw or as_json or logprobs is not None or not is_interactive():
            raise click.UsageError("there is no prompt: give PROMPT, or pipe it in")
        converse(model, system, generation, engine, verbose)
        return
    generation = replace(generation, sampling=replace(generation.sampling, logprobs=logprobs))
    llm, load_s = engine.load(model)
    answer = Answer(_prompt_ids(llm, text, system, raw))
    stream = partial(generation.stream, llm, answer.prompt_ids)
    if as_json:
        answer.follow(stream, write=lambda text: None)
        write_json(_as_json(model, llm.tokenizer, answer, statistics_of(answer, load_s)))
        return
    answer.show(stream)
    if logprobs is not None:
        _print_logprobs(llm.tokenizer, answer)
    if verbose:
        print_statistics(statistics_of(answer, load_s))


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


def _as_json(model: str, tokenizer: Tokenizer, answer: Answer, statistics: Statistics) -> dict[str, Any]:
    return {
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_token_ids": answer.prompt_ids,
        "token_ids": [sampled.token for sampled in answer.sampled],
        "logprobs": [
            {
                **token_json(tokenizer, sampled.token),
                "logprob": sampled.logprob,
                "top": [{**token_json(tokenizer, id), "logprob": p} for id, p in sampled.top_logprobs],
            }
            for sampled in answer.sampled
        ],
        "statistics": asdict(statistics),
    }


def _print_logprobs(tokenizer: Tokenizer, answer: Answer) -> None:
    print_table(
        {"TOKEN": "left", "LOGPROB": "right", "LIKELIEST": "left"},
        [
            (
                piece(tokenizer, sampled.token),
                f"{sampled.logprob:.4f}",
                "  ".join(f"{piece(tokenizer, id)} {logprob:.4f}" for id, logprob in sampled.top_logprobs),
            )
            for sampled in answer.sampled
        ],
        file=sys.stderr,
    )
