"""A line of a batch's input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
FIELDS = ("custom_id", "method", "url", "body")

DIGEST_BYTES = 16
ID_PREFIX = "batch_req_"


@dataclass(frozen=True)
class Fault:
    """Why a row has no answer.

    Attributes:
        message: for people.
        code: for programs.
        status: of HTTP, as an endpoint would have replied; ``None`` where the line is no request to one.
    """

    message: str
    code: str
    status: int | None = None


@dataclass(frozen=True)
class Row:
    """A line of the input, a request or not.

    Attributes:
        line: its number, from 1.
        custom_id: what its author calls it; ``None`` where it does not tell.
        key: 16 bytes that no other row of the file has: a digest of ``custom_id``, or else of the line and
            its number.
        digest: 16 bytes of what it says, whatever the order of its fields and the spaces between them.
        url: the endpoint.
        body: the endpoint's parameters.
        fault: why it is no request to an endpoint; ``None`` where it is one.
    """

    line: int
    custom_id: str | None
    key: bytes
    digest: bytes
    url: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None

    @property
    def id(self) -> str:
        """The id of its answer."""
        return ID_PREFIX + self.digest.hex()

    @property
    def seed(self) -> int:
        """Of its random choices where it names none: below 2**63."""
        return int.from_bytes(self.key[:8], "big") >> 1


def custom_id_key(custom_id: str) -> bytes:
    """The ``key`` of rows with a ``custom_id``."""
    return _digest(b"custom_id", json.dumps(custom_id).encode())


def parse_row(line: int, data: bytes) -> Row:
    """Read a line; what is wrong with it is its ``fault``.

    Nothing is passed over: a field that is not in the format is a fault, as is one given twice.
    """
    try:
        document = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return _nameless(line, data, Fault(f"line {line} is not valid JSON: {reason}", "invalid_json_line"))
    if not isinstance(document, dict):
        return _nameless(line, data, Fault(f"line {line} is not a JSON object", "invalid_json_line"))
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        text = f"line {line} needs a custom_id: a string that is not empty"
        return _nameless(line, data, Fault(text, "missing_required_parameter"))
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return Row(
        line,
        custom_id,
        custom_id_key(custom_id),
        _digest(b"row", canonical.encode()),
        str(document.get("url")),
        body if isinstance(body := document.get("body"), dict) else {},
        _fault(document),
    )


def too_long(line: int, data: bytes, limit: int) -> Row:
    """The row of a line that is too long to be read; ``data`` is its beginning."""
    return _nameless(line, data, Fault(f"line {line} is longer than {limit:,} bytes", "invalid_json_line"))


def _fault(document: Mapping[str, Any]) -> Fault | None:
    """What is wrong with a row beside its custom_id and its body's parameters."""
    if unknown := sorted(document.keys() - set(FIELDS)):
        return Fault(f"unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}", "unknown_parameter")
    if missing := [name for name in FIELDS if name not in document]:
        return Fault(f"{missing[0]} is missing", "missing_required_parameter")
    if document["method"] != "POST":
        return Fault(f"method must be 'POST', not {document['method']!r}", "invalid_method")
    if document["url"] not in URLS:
        return Fault(f"url must be {' or '.join(map(repr, URLS))}, not {document['url']!r}", "invalid_url")
    if not isinstance(document["body"], dict):
        return Fault("body must be a JSON object", "invalid_json_line")
    return None


def _nameless(line: int, data: bytes, fault: Fault) -> Row:
    digest = _digest(b"line", str(line).encode(), data)
    return Row(line, None, digest, digest, fault=fault)


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"\n".join(parts), digest_size=DIGEST_BYTES).digest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return document


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
