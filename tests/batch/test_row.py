"""Lines of the input: read in full, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from batch.jsonl import chat

from refengine.batch import parse_row

ROW = chat("a")


def encoded(row: Any) -> bytes:
    return json.dumps(row).encode()


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key != name}


def test_a_request_is_read() -> None:
    """Its custom_id, its endpoint and its body."""
    row = parse_row(7, encoded(ROW))
    assert (row.line, row.custom_id, row.url, row.body, row.fault) == (7, "a", ROW["url"], ROW["body"], None)
    assert row.id.startswith("batch_req_")
    assert 0 <= row.seed < 2**63


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (b"{oops", "invalid_json_line", "line 3 is not valid JSON"),
        (b"\xff", "invalid_json_line", "line 3 is not valid JSON"),
        (b"[" * 100_000, "invalid_json_line", "nested too deeply"),
        (b"1" * 10_000, "invalid_json_line", "line 3"),
        (b"[1]", "invalid_json_line", "not a JSON object"),
        (b'{"custom_id": "a", "body": NaN}', "invalid_json_line", "NaN"),
        (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json_line", "'custom_id' is given twice"),
        (encoded(without("custom_id")), "missing_required_parameter", "custom_id"),
        (encoded(ROW | {"custom_id": ""}), "missing_required_parameter", "custom_id"),
        (encoded(ROW | {"custom_id": 1}), "missing_required_parameter", "custom_id"),
    ],
)
def test_a_line_without_a_custom_id_is_told_by_its_number(line: bytes, code: str, told: str) -> None:
    """Equal lines differ by where they stand."""
    row = parse_row(3, line)
    assert row.custom_id is None
    assert row.fault is not None
    assert (row.fault.code, row.fault.status) == (code, None)
    assert told in row.fault.message
    assert row.id != parse_row(4, line).id


@pytest.mark.parametrize(
    ("row", "code", "told"),
    [
        (ROW | {"priority": 1}, "unknown_parameter", "'priority'"),
        (without("body"), "missing_required_parameter", "body is missing"),
        (without("method"), "missing_required_parameter", "method is missing"),
        (ROW | {"method": "GET"}, "invalid_method", "'GET'"),
        (ROW | {"method": ["POST"]}, "invalid_method", "POST"),
        (ROW | {"url": "/v1/embeddings"}, "invalid_url", "/v1/embeddings"),
        (ROW | {"url": None}, "invalid_url", "None"),
        (ROW | {"body": "hi"}, "invalid_json_line", "body"),
    ],
)
def test_a_wrong_request_keeps_its_custom_id(row: dict[str, Any], code: str, told: str) -> None:
    """What is wrong with it beside its parameters is told with a code of OpenAI's."""
    read = parse_row(1, encoded(row))
    assert read.custom_id == "a"
    assert read.fault is not None
    assert (read.fault.code, read.fault.status) == (code, None)
    assert told in read.fault.message


def test_an_id_tells_what_was_asked() -> None:
    """It depends on the request, not on how it is written or where it stands; the seed on the custom_id."""
    row = parse_row(1, encoded(ROW))
    same = parse_row(9, json.dumps(dict(reversed(ROW.items())), indent=1).encode())
    assert (same.id, same.key) == (row.id, row.key)
    other = parse_row(1, encoded(chat("a", "Ho")))
    assert (other.key, other.seed) == (row.key, row.seed)
    assert other.id != row.id
    assert parse_row(1, encoded(ROW | {"custom_id": "b"})).seed != row.seed
