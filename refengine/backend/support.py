"""What no backend supports: ops, encodings and policies that there are not."""

from __future__ import annotations

from refengine.ops import OPS
from refengine.program import POLICIES
from refengine.quantizer import ENCODINGS


def unknown(op: str, *, encoding: str | None, policy: str) -> str | None:
    """The reason why a question about support means nothing; ``None`` where op, encoding and policy exist.

    Clauses: BCK-2.
    """
    if op not in OPS:
        return f"there is no op {op!r}"
    if policy not in POLICIES:
        return f"there is no policy {policy!r}"
    return None if encoding is None or encoding in ENCODINGS else f"there is no encoding {encoding!r}"
