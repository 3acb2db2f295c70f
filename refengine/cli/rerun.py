"""``refengine replay --request`` and ``--row``: recorded requests again, each alone."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from refengine.cli.figures import amount
from refengine.cli.loading import open_checkpoint
from refengine.cli.terminal import harmless, write_json
from refengine.errors import RequestError

if TYPE_CHECKING:
    from refengine.rerun import Comparison, Findings
    from refengine.simulation import Record


def requests_of(record: Record, custom_id: str) -> list[int]:
    """The requests of a batch's row, its first part first.

    Raises:
        RequestError: the journal has no such row.
    """
    found = sorted((part.place, n) for n, part in record.rows.items() if part.custom_id == custom_id)
    if found:
        return [number for _, number in found]
    names = {part.custom_id for part in record.rows.values()}
    if not names:
        raise RequestError("the journal is of no batch: its requests are of no row; --request takes a number")
    near = get_close_matches(custom_id, names, n=1)
    raise RequestError(
        f"the journal has no row {custom_id!r}: there are {len(names):,}"
        + (f"; is it {near[0]!r}?" if near else "")
        + "\nRows that were refused before they reached the engine are in no journal, nor are those that an "
        "earlier run answered."
    )


def compare(
    record: Record,
    numbers: Sequence[int],
    model: str | None,
    *,
    row: str | None,
    offline: bool,
    as_json: bool,
) -> bool:
    """Run requests again and tell what came of it; whether all that could be compared is equal.

    Raises:
        RequestError, FormatError: see ``refengine.rerun.rerun``; or nothing could be compared.
    """
    from refengine.models import build
    from refengine.rerun import Rerun, origin, recorded_config
    from refengine.tokenizer import build_tokenizer

    recorded_config(record)  # before anything is fetched
    for number in numbers:
        origin(record, number)
    name = model or record.engine["model"]
    if name is None:
        raise RequestError("the journal does not name its model: give --model")
    checkpoint = open_checkpoint(str(name), offline=offline)
    rerun = Rerun(record, build(checkpoint), build_tokenizer(checkpoint.metadata))
    found = [rerun.run(number) for number in numbers]
    if not any(each.compared for each in found):
        reasons = "\n".join(line for each in found for line in _omitted(each))
        raise RequestError(f"there is nothing to compare\n{reasons}")
    if as_json:
        told = [_json(record, str(name), each) for each in found]
        write_json(told[0] if row is None else {"row": row, "equal": _equal(found), "requests": told})
    else:
        print(harmless(_in_words(record, str(name), found)))
    return _equal(found)


def _equal(found: Sequence[Findings]) -> bool:
    return all(each.equal for each in found)


def _in_words(record: Record, model: str, found: Sequence[Findings]) -> str:
    engine = record.engine
    lines = ["equal" if _equal(found) else "different"]
    for each in found:
        lines += [_difference(each, one) for one in each.compared if not one.equal]
        tokens = sum(len(one.end.tokens) for one in each.compared)
        if each.compared:
            lines.append(
                f"Compared: logits and tokens of {_named(record, each.number)}, "
                f"{amount(len(each.compared), 'sample')}, {amount(tokens, 'token')}, recorded on "
                f"{engine['backend']}, now alone on numpy"
            )
        lines += _omitted(each)
    kv_dtype = engine["kv_dtype"] or "as the policy has it"
    lines.append(f"Model {model}, policy {engine['policy']}, KV {kv_dtype}, blocks of {engine['block_size']}")
    return "\n".join(lines)


def _named(record: Record, number: int) -> str:
    """A request, and what else it is called."""
    called = []
    if (part := record.rows.get(number)) is not None:
        parts = sum(each.custom_id == part.custom_id for each in record.rows.values())
        called.append(
            f"row {part.custom_id!r}" + (f", part {part.place + 1} of {parts}" if parts > 1 else "")
        )
    if (fork := record.forks.get(number)) is not None:
        called.append(f"forked from {fork.parent} after {amount(fork.generated, 'token')}")
    return f"request {number}" + "".join(f" ({each})" for each in called)


def _difference(found: Findings, each: Comparison) -> str:
    where, place = f"request {found.number}, sample {each.sample}", each.first_difference
    if place is None:
        return f"{where}: the tokens are the same, but logits differ"
    then, now = (
        str(tokens[place]) if place < len(tokens) else "the end" for tokens in (each.end.tokens, each.tokens)
    )
    return f"{where}: token {place} was {then}, and is {now}"


def _omitted(found: Findings) -> list[str]:
    return [
        f"Not compared: sample {each.sample} of request {found.number} {each.reason}"
        for each in found.omitted
    ]


def _json(record: Record, model: str, found: Findings) -> dict[str, Any]:
    part, fork = record.rows.get(found.number), record.forks.get(found.number)
    return {
        "request": found.number,
        "row": None if part is None else {"custom_id": part.custom_id, "part": part.place},
        "fork": None if fork is None else fork._asdict(),
        "equal": found.equal if found.compared else None,
        "engine": {**record.engine, "model": model},
        "samples": [
            {
                "sample": each.sample,
                "equal": each.equal,
                "tokens": len(each.end.tokens),
                "first_difference": each.first_difference,
                "sha256": {"recorded": each.end.sha256, "now": each.sha256},
            }
            for each in found.compared
        ],
        "not_compared": [{"sample": each.sample, "reason": each.reason} for each in found.omitted],
    }
