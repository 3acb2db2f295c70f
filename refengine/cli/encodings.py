"""A checkpoint's tensors by encoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refengine.cli.figures import bytes_figure, count_figure
from refengine.cli.tables import print_table

if TYPE_CHECKING:
    from refengine.quantizer import LazyTensor


@dataclass(frozen=True)
class EncodingTotal:
    """What the tensors of one encoding amount to."""

    tensors: int
    weights: int
    bytes: int


def totals_by_encoding(tensors: Iterable[LazyTensor]) -> dict[str, EncodingTotal]:
    """The totals, the largest first."""
    groups = defaultdict[str, list["LazyTensor"]](list)
    for tensor in tensors:
        groups[tensor.encoding].append(tensor)
    totals = {
        encoding: EncodingTotal(len(group), sum(t.size for t in group), sum(t.nbytes for t in group))
        for encoding, group in groups.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


def print_totals(totals: Mapping[str, EncodingTotal]) -> None:
    """Print them, and their sum."""
    everything = EncodingTotal(
        sum(t.tensors for t in totals.values()),
        sum(t.weights for t in totals.values()),
        sum(t.bytes for t in totals.values()),
    )
    print_table(
        {"ENCODING": "left", "TENSORS": "right", "WEIGHTS": "right", "BYTES": "right", "BITS EACH": "right"},
        [
            (
                name,
                f"{total.tensors:,}",
                count_figure(total.weights),
                bytes_figure(total.bytes),
                f"{8 * total.bytes / total.weights:.2f}" if total.weights else "",
            )
            for name, total in [*totals.items(), ("all", everything)]
        ],
    )
