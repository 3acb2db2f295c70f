"""``refengine show``: what kind of model a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.encodings import EncodingTotal, print_totals, totals_by_encoding
from refengine.cli.figures import bytes_figure, count_figure, span_figure
from refengine.cli.loading import open_checkpoint
from refengine.cli.options import json_option, model_argument, offline_option
from refengine.cli.tables import print_fields
from refengine.cli.terminal import write_json
from refengine.errors import UnsupportedError

if TYPE_CHECKING:
    from refengine.loader import Checkpoint
    from refengine.models import ModelSpec
    from refengine.tokenizer import Tokenizer


@click.command()
@model_argument
@offline_option
@json_option
def show(model: str, offline: bool, as_json: bool) -> None:
    """Print what kind of model this is, and whether it runs here.

    \b
    Examples:
      refengine show smollm2
      refengine show ./model.gguf --json
    """
    card = read_card(open_checkpoint(model, offline=offline))
    if as_json:
        write_json(_as_json(card))
        return
    print_fields({**_model_fields(card), **_tokenizer_fields(card), **_file_fields(card)})
    click.echo()
    print_totals(card.encodings)


@dataclass(frozen=True)
class Card:
    """What is known of a model without reading a weight.

    Attributes:
        checkpoint: its file.
        encodings: its tensors by encoding.
        spec, tokenizer: ``None`` where refengine does not implement them.
        problems: why not.
    """

    checkpoint: Checkpoint
    encodings: Mapping[str, EncodingTotal]
    spec: ModelSpec | None
    tokenizer: Tokenizer | None
    problems: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(total.weights for total in self.encodings.values())

    def string(self, key: str) -> str | None:
        """A string of the metadata."""
        return self.checkpoint.metadata.string(key, None)


def read_card(checkpoint: Checkpoint) -> Card:
    """Describe a checkpoint, one that refengine cannot run too.

    Raises:
        FormatError: it is damaged.
    """
    from refengine.models import build
    from refengine.tokenizer import build_tokenizer

    spec = tokenizer = None
    problems = []
    try:
        spec = build(checkpoint).spec
    except UnsupportedError as error:
        problems.append(str(error))
    try:
        tokenizer = build_tokenizer(checkpoint.metadata)
    except UnsupportedError as error:
        problems.append(str(error))
    encodings = totals_by_encoding(checkpoint.tensors.values())
    return Card(checkpoint, encodings, spec, tokenizer, tuple(problems))


def _model_fields(card: Card) -> dict[str, str]:
    fields = {
        "name": card.string("general.name") or card.checkpoint.path.stem,
        "architecture": card.string("general.architecture") or "unnamed",
        "parameters": count_figure(card.parameters),
    }
    if (spec := card.spec) is None:
        return fields
    layers = spec.layers
    tied = ", output tied to embedding" if spec.tied_embeddings else ""
    windows = [layer.window for layer in layers if layer.window is not None]
    return fields | {
        "context": f"{spec.context_length:,} tokens",
        "layers": f"{len(layers)}, {spec.hidden_size:,} wide",
        "attention": f"{span_figure(layer.heads for layer in layers)} heads, "
        f"{span_figure(layer.kv_heads for layer in layers)} of keys and values, "
        f"each {span_figure(layer.head_size for layer in layers)} wide",
        "window": f"{span_figure(windows)} tokens in {len(windows)} layers"
        if windows
        else "the whole context",
        "feed-forward": f"{span_figure(layer.ffn_size for layer in layers)} wide, {spec.activation}",
        "vocabulary": f"{spec.vocabulary_size:,} tokens{tied}",
    }


def _tokenizer_fields(card: Card) -> dict[str, str]:
    names = (card.string("tokenizer.ggml.model"), card.string("tokenizer.ggml.pre"))
    fields = {"tokenizer": ", ".join(filter(None, names)) or "none"}
    if tokenizer := card.tokenizer:
        ends = [tokenizer.token_bytes(id).decode(errors="replace") for id in sorted(tokenizer.end_ids)]
        fields["ends at"] = " ".join(ends) or "no token"
    template = card.string("tokenizer.chat_template")
    return fields | {
        "chat template": f"{len(template):,} characters" if template else "none: it continues text"
    }


def _file_fields(card: Card) -> dict[str, str]:
    checkpoint = card.checkpoint
    return {
        "licence": card.string("general.license") or "not told in the file",
        "file": f"{checkpoint.path}, {checkpoint.format}, {bytes_figure(checkpoint.file_bytes)}",
        "runs here": "no: " + "\n".join(card.problems) if card.problems else "yes",
    }


def _as_json(card: Card) -> dict[str, Any]:
    checkpoint, spec, tokenizer = card.checkpoint, card.spec, card.tokenizer
    return {
        "name": card.string("general.name"),
        "architecture": card.string("general.architecture"),
        "parameters": card.parameters,
        "licence": card.string("general.license"),
        "file": str(checkpoint.path),
        "format": checkpoint.format,
        "file_bytes": checkpoint.file_bytes,
        "encodings": {name: asdict(total) for name, total in card.encodings.items()},
        "spec": spec and asdict(spec),
        "tokenizer": tokenizer
        and {
            "model": card.string("tokenizer.ggml.model"),
            "pre": card.string("tokenizer.ggml.pre"),
            "vocabulary_size": tokenizer.vocabulary_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "end_ids": sorted(tokenizer.end_ids),
        },
        "chat_template": card.string("tokenizer.chat_template"),
        "problems": card.problems,
    }
