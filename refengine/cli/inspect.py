"""``refengine inspect``: what is in a model file."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.encodings import print_totals, totals_by_encoding
from refengine.cli.loading import open_checkpoint
from refengine.cli.options import json_option, model_argument, offline_option
from refengine.cli.tables import print_table
from refengine.cli.terminal import write_json

if TYPE_CHECKING:
    from refengine.loader import Checkpoint

BRIEF = 80
"""Characters of a value in the table; JSON has all of it."""


@click.command()
@model_argument
@click.option("--metadata", is_flag=True, help="Print the key-values instead of the tensors.")
@offline_option
@json_option
def inspect(model: str, metadata: bool, offline: bool, as_json: bool) -> None:
    """Print every tensor of a model file, or every key-value.

    No tensor is read, and the model need not be one that refengine can run.

    \b
    Examples:
      refengine inspect smollm2
      refengine inspect ./model.gguf --metadata
      refengine inspect ./model.gguf --metadata --json | jq -r '.metadata["tokenizer.chat_template"]'
    """
    checkpoint = open_checkpoint(model, offline=offline)
    if as_json:
        contents = {"metadata": _metadata(checkpoint)} if metadata else _tensors(checkpoint)
        write_json(
            {
                "file": str(checkpoint.path),
                "format": checkpoint.format,
                "file_bytes": checkpoint.file_bytes,
                **contents,
            }
        )
    elif metadata:
        print_table(
            {"KEY": "left", "TYPE": "left", "VALUE": "left"},
            [(key, _type(value), _brief(value)) for key, value in checkpoint.metadata.items()],
        )
    else:
        print_table(
            {"TENSOR": "left", "SHAPE": "right", "ENCODING": "left", "BYTES": "right"},
            [
                (tensor.name, _shape(tensor.shape), tensor.encoding, f"{tensor.nbytes:,}")
                for tensor in checkpoint.tensors.values()
            ],
        )
        click.echo()
        print_totals(totals_by_encoding(checkpoint.tensors.values()))


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = checkpoint.tensors.values()
    return {
        "tensors": [
            {"name": t.name, "shape": t.shape, "encoding": t.encoding, "bytes": t.nbytes} for t in tensors
        ],
        "encodings": {name: asdict(total) for name, total in totals_by_encoding(tensors).items()},
    }


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: _plain(value) for key, value in checkpoint.metadata.items()}


def _plain(value: Any) -> Any:
    """A value as JSON has it: arrays as lists, numbers that JSON lacks as their names."""
    if hasattr(value, "tolist"):
        return [_plain(element) for element in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _type(value: Any) -> str:
    if isinstance(value, bool | int | float | str):
        return type(value).__name__
    return f"{value.dtype.name if hasattr(value, 'dtype') else 'str'} [{len(value):,}]"


def _brief(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
    elif hasattr(value, "tolist"):
        text = ", ".join(map(repr, _plain(value[:BRIEF])))
        text += ", …" if len(value) > BRIEF else ""
    else:
        text = repr(value)
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in shape)
