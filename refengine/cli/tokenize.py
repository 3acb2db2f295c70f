"""``refengine tokenize``: text to token ids and back."""

from __future__ import annotations

import sys

import click

from refengine.cli.loading import open_checkpoint
from refengine.cli.options import json_option, model_argument, offline_option, text_options
from refengine.cli.pieces import parse_ids, piece, token_json
from refengine.cli.tables import print_table
from refengine.cli.terminal import piped_text, write_answer, write_json


@click.command()
@model_argument
@click.argument("text", required=False)
@text_options
@offline_option
@json_option
def tokenize(
    model: str, text: str | None, special: bool, bos: bool, ids: bool, offline: bool, as_json: bool
) -> None:
    """Print the tokens of a text, or the text of tokens.

    The text can also be piped in. With --ids it is token ids, and what is printed is their text.

    \b
    Examples:
      refengine tokenize smollm2 "Hello, world"
      refengine tokenize smollm2 "<|im_start|>user" --special --json
      refengine tokenize smollm2 --ids "19556 28 905"
    """
    from refengine.tokenizer import build_tokenizer

    if text is None and (text := piped_text()) is None:
        raise click.UsageError("there is no text: give TEXT, or pipe it in")
    tokenizer = build_tokenizer(open_checkpoint(model, offline=offline).metadata)
    if ids:
        numbers = parse_ids(text)
        text = tokenizer.decode(numbers)
    else:
        numbers = tokenizer.encode(text, add_special=bos, parse_special=special)
    if as_json:
        tokens = [token_json(tokenizer, id) for id in numbers]
        write_json({"text": text, "ids": numbers, "tokens": tokens})
    elif ids:
        write_answer(text if text.endswith("\n") or not sys.stdout.isatty() else f"{text}\n")
    else:
        print_table({"ID": "right", "TOKEN": "left"}, [(str(id), piece(tokenizer, id)) for id in numbers])
