"""The support table, condensed: encodings that fare alike stand together, and each reason is given once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refengine.quantizer import ENCODINGS
from refengine_conformance.conformance import Conformance
from refengine_conformance.support import Support


@dataclass(frozen=True)
class Standing:
    """How an op stands in some encodings.

    Attributes:
        word: ``native``, ``fallback`` or ``unsupported``.
        encodings: in which it stands so, ``all`` of them, or none where the op has no encoded weight.
        note: number of the reason, ``None`` where it is native.
    """

    word: str
    encodings: str
    note: int | None


@dataclass(frozen=True)
class SupportTable:
    """Op -> policy -> standings, and the reasons that they refer to, counted from 1."""

    ops: Mapping[str, Mapping[str, tuple[Standing, ...]]]
    reasons: tuple[str, ...]


def support_table(run: Conformance) -> SupportTable:
    """Condense what a backend says of itself."""
    reasons = list(dict.fromkeys(row.reason for row in run.support if row.reason))

    def standings(rows: list[Support]) -> tuple[Standing, ...]:
        groups: dict[tuple[str, str | None], list[str]] = {}
        for row in rows:
            encoded = groups.setdefault((run.standing(row), row.reason), [])
            if row.encoding:
                encoded.append(row.encoding)
        return tuple(
            Standing(
                word,
                "all encodings" if len(encoded) == len(ENCODINGS) else " ".join(encoded),
                reasons.index(reason) + 1 if reason else None,
            )
            for (word, reason), encoded in groups.items()
        )

    ops = dict.fromkeys(row.op for row in run.support)
    return SupportTable(
        {
            op: {p: standings([r for r in run.support if (r.op, r.policy) == (op, p)]) for p in run.policies}
            for op in ops
        },
        tuple(reasons),
    )
