"""Rows of a batch's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def request(custom_id: str, body: dict[str, Any], url: str = COMPLETIONS) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m"} | body}


def chat(custom_id: str, text: str = "Hi", **parameters: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return request(custom_id, {"messages": messages, "temperature": 0} | parameters, CHAT)


def completion(custom_id: str, prompt: Any = "abc", **parameters: Any) -> dict[str, Any]:
    return request(custom_id, {"prompt": prompt, "temperature": 0} | parameters)


def write(path: Path, *rows: Any) -> Path:
    """A file with rows, one per line; texts as they are."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, all of them whole."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the output without when it was made."""
    row = json.loads(json.dumps(row))
    if row["response"]:
        row["response"]["body"].pop("created", None)
    return row
