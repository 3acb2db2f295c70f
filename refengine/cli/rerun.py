"""``refengine replay --request``: one recorded request again, alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refengine.cli.figures import amount
from refengine.cli.loading import open_checkpoint
from refengine.cli.terminal import harmless, write_json
from refengine.errors import RequestError

if TYPE_CHECKING:
    from refengine.rerun import Comparison
    from refengine.simulation import Record


def compare(record: Record, number: int, model: str | None, *, offline: bool, as_json: bool) -> bool:
    """Run a request again and tell what came of it; whether all samples are equal.

    Raises:
        RequestError, FormatError: see ``refengine.rerun.rerun``.
    """
    from refengine.models import build
    from refengine.rerun import recorded_config, rerun
    from refengine.tokenizer import build_tokenizer

    recorded_config(record)  # before anything is fetched
    name = model or record.engine["model"]
    if name is None:
        raise RequestError("the journal does not name its model: give --model")
    checkpoint = open_checkpoint(str(name), offline=offline)
    tokenizer = build_tokenizer(checkpoint.metadata)
    compared = rerun(record, number, build(checkpoint), tokenizer)
    equal = all(each.equal for each in compared)
    if as_json:
        write_json(_json(record, number, str(name), compared, equal=equal))
    else:
        print(harmless(_in_words(record, number, str(name), compared, equal=equal)))
    return equal


def _in_words(record: Record, number: int, model: str, compared: list[Comparison], *, equal: bool) -> str:
    engine, asked = record.engine, record.requests[number]["samples"]
    tokens = sum(len(each.end.tokens) for each in compared)
    left = asked - len(compared)
    return "\n".join(
        [
            "equal" if equal else "different",
            *(_difference(each) for each in compared if not each.equal),
            f"Compared: logits and tokens of request {number}, {amount(len(compared), 'sample')}, "
            f"{amount(tokens, 'token')}, recorded on {engine['backend']}, now alone on numpy",
            f"Model {model}, policy {engine['policy']}, KV {engine['kv_dtype'] or 'as the policy has it'}, "
            f"blocks of {engine['block_size']}",
            *([f"Not compared: {amount(left, 'sample')} without a recorded end or token"] if left else []),
        ]
    )


def _difference(each: Comparison) -> str:
    place = each.first_difference
    if place is None:
        return f"sample {each.sample}: the tokens are the same, but logits differ"
    then, now = (
        str(tokens[place]) if place < len(tokens) else "the end" for tokens in (each.end.tokens, each.tokens)
    )
    return f"sample {each.sample}: token {place} was {then}, and is {now}"


def _json(
    record: Record, number: int, model: str, compared: list[Comparison], *, equal: bool
) -> dict[str, Any]:
    return {
        "request": number,
        "equal": equal,
        "engine": {**record.engine, "model": model},
        "not_compared": record.requests[number]["samples"] - len(compared),
        "samples": [
            {
                "sample": each.sample,
                "equal": each.equal,
                "tokens": len(each.end.tokens),
                "first_difference": each.first_difference,
                "sha256": {"recorded": each.end.sha256, "now": each.sha256},
            }
            for each in compared
        ],
    }
