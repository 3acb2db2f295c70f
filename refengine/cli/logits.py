"""``refengine logits``: what the model expects after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from refengine.cli.loading import EngineOptions
from refengine.cli.options import engine_options, json_option, model_argument, text_options
from refengine.cli.pieces import parse_ids, piece, token_json
from refengine.cli.sections import SectionedCommand
from refengine.cli.tables import print_table
from refengine.cli.terminal import aside, piped_text, write_json

if TYPE_CHECKING:
    from refengine.ops import FloatArray
    from refengine.tokenizer import Tokenizer

ROWS = 64
"""Rows of logits computed at once: more take more memory, fewer take longer."""


@click.command(cls=SectionedCommand)
@model_argument
@click.argument("prompt", required=False)
@text_options
@click.option(
    "--top",
    default=10,
    metavar="N",
    show_default=True,
    type=click.IntRange(min=1),
    help="Print the N likeliest tokens.",
)
@click.option("--all", "every", is_flag=True, help="Print them after each token, not after the last only.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.npy",
    help="Write all logits [tokens, vocabulary] to a NumPy file.",
)
@engine_options
@json_option
def logits(
    model: str,
    prompt: str | None,
    special: bool,
    bos: bool,
    ids: bool,
    top: int,
    every: bool,
    output: Path | None,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Print the likeliest next tokens of a text, or write all logits.

    The text can also be piped in; the chat template is not applied. The file has the precision of the policy:
    float32 or float64.

    \b
    Examples:
      refengine logits smollm2 "The capital of France is"
      refengine logits smollm2 "1 2 3 4" --all --top 3
      refengine logits smollm2 --ids "504 3575 282" --policy float64 -o logits.npy
    """
    import numpy as np

    if prompt is None and (prompt := piped_text()) is None:
        raise click.UsageError("there is no prompt: give PROMPT, or pipe it in")
    llm, _ = engine.adjusted(logit_rows=min(ROWS, engine.config.token_budget)).load(model)
    encoded = llm.tokenizer.encode
    prompt_ids = parse_ids(prompt) if ids else encoded(prompt, add_special=bos, parse_special=special)
    shown_from = 0 if every else max(len(prompt_ids) - 1, 0)
    first = 0 if output else shown_from
    scores = llm.logits(prompt_ids, first=first)
    if output is not None:
        with output.open("wb") as file:
            np.save(file, scores)
        aside(f"Wrote {output}: {scores.dtype.name} {list(scores.shape)}")
    positions = range(shown_from, len(prompt_ids))
    likeliest = [Position(at, prompt_ids[at], _likeliest(scores[at - first], top)) for at in positions]
    if as_json:
        write_json(_as_json(llm.tokenizer, prompt_ids, likeliest))
    elif every:
        _print_every(llm.tokenizer, likeliest)
    else:
        _print_last(llm.tokenizer, likeliest[-1].candidates)


class Candidate(NamedTuple):
    """A possible next token."""

    id: int
    logit: float
    logprob: float


class Position(NamedTuple):
    """The likeliest tokens after one of the prompt's."""

    position: int
    id: int
    candidates: list[Candidate]


def _likeliest(scores: FloatArray, top: int) -> list[Candidate]:
    """The candidates with the highest logits, the lower id first among equals.

    Raises:
        NumericalError: there is no order among NaN and infinities.
    """
    import numpy as np

    from refengine.sampling import check_finite, log_softmax

    check_finite(scores)
    logprobs = log_softmax(scores)
    order = np.argsort(-scores, kind="stable")[:top]
    return [Candidate(int(id), float(scores[id]), float(logprobs[id])) for id in order]


def _print_last(tokenizer: Tokenizer, candidates: Sequence[Candidate]) -> None:
    print_table(
        {"TOKEN": "left", "ID": "right", "LOGIT": "right", "LOGPROB": "right", "PROBABILITY": "right"},
        [
            (piece(tokenizer, c.id), str(c.id), f"{c.logit:.4f}", f"{c.logprob:.4f}", f"{exp(c.logprob):.2%}")
            for c in candidates
        ],
    )


def _print_every(tokenizer: Tokenizer, positions: Sequence[Position]) -> None:
    print_table(
        {"AT": "right", "AFTER": "left", "LIKELIEST": "left"},
        [
            (
                str(position),
                piece(tokenizer, id),
                "  ".join(f"{piece(tokenizer, c.id)} {exp(c.logprob):.2%}" for c in candidates),
            )
            for position, id, candidates in positions
        ],
    )


def _as_json(tokenizer: Tokenizer, prompt_ids: list[int], positions: Sequence[Position]) -> dict[str, Any]:
    return {
        "prompt_token_ids": prompt_ids,
        "positions": [
            {
                "position": position,
                **token_json(tokenizer, id),
                "likeliest": [
                    {**token_json(tokenizer, c.id), "logit": c.logit, "logprob": c.logprob}
                    for c in candidates
                ],
            }
            for position, id, candidates in positions
        ],
    }
