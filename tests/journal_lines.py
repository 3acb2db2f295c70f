"""Lines of journals, sealed apart from the code that writes them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable


def sealed(lines: Iterable[str]) -> str:
    """A journal of changed lines, with the checksums that they would have."""
    text, crc = "", 0
    for line in lines:
        content = {name: value for name, value in json.loads(line).items() if name != "crc"}
        packed = json.dumps(content, separators=(",", ":"))
        crc = zlib.crc32(packed.encode(), crc)
        text += packed[:-1] + f',"crc":{crc}}}\n'
    return text
