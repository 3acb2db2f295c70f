"""The kernels' source: one text per module, with what it includes; and how kernels' arguments are packed.

Every kernel takes one structure. Its fields are read off the source, so that they are written down once.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"

SEALED_MODULES = ("seal", "attention_sealed", "attention_sealed_tiles")
"""Modules with a version for each pair of formats of sealed keys and values; see ``formats_name``."""

_FORMATS = {"int8": "Int8", "int4": "Int4", "float16": "Float16", "float32": "Float32"}

_CODES = {"u64": "Q", "int": "i", "float": "f", "double": "d"}


@dataclass(frozen=True)
class Kernel:
    """A kernel: the module it is in, its name there, and the structure that it takes.

    Attributes:
        module: name of a file.
        name: in that file.
        arguments: name of a structure.
        threads: of a block.
        encoding: of the weights it reads, or the formats of keys and values, where the module has a version
            for each.
        shared: bytes of shared memory that a launch asks for.
    """

    module: str
    name: str
    arguments: str
    threads: int
    encoding: str | None = None
    shared: int = 0


def text_of(module: str, encoding: str | None = None) -> str:
    """A module's source, for one encoding where it has versions."""
    only = ""
    if encoding is not None and module in SEALED_MODULES:
        only = _formats(encoding)
    elif encoding is not None:
        only = f"#define FOR_ENCODINGS(X) X({encoding}, {encoding.upper()})\n#define FOR_PLAIN(X)\n"
        if encoding in ("f32", "f16", "bf16"):
            only = f"#define FOR_ENCODINGS(X)\n#define FOR_PLAIN(X) X({encoding}, {encoding.upper()})\n"
    return only + _with_includes(f"{module}.cu", set())


def formats_name(keys: str, values: str, exact: str, *, even: bool) -> str:
    """The name of a version of kernels for a sealed cache.

    Args:
        keys, values: formats of sealed blocks.
        exact: dtype of exact copies.
        even: whether blocks have whole runs of positions, heads whole chunks, and everything lies where
            it can be read by words.
    """
    return f"{keys}_{values}_{exact}_{'even' if even else 'any'}"


def _formats(name: str) -> str:
    keys, values, exact, kind = name.split("_")
    defined = {"KEYS": _FORMATS[keys], "VALUES": _FORMATS[values], "EXACT": _FORMATS[exact]}
    lines = [f"#define {macro} {format}\n" for macro, format in defined.items()]
    return "".join(lines) + f"#define EVEN {int(kind == 'even')}\n"


def pack(name: str, values: Mapping[str, int | float | None]) -> bytes:
    """The bytes of a structure; ``None`` is a null pointer.

    Raises:
        KeyError, TypeError: a field is missing, or there is none of a name.
    """
    fields = structures()[name]
    if unknown := values.keys() - fields.keys():
        raise TypeError(f"{name} has no {', '.join(sorted(unknown))}")
    numbers = [values[field] if values[field] is not None else 0 for field in fields]
    return struct.pack("@" + "".join(fields.values()), *numbers)


@cache
def structures() -> Mapping[str, Mapping[str, str]]:
    """Of every structure of arguments: its fields in order, each with its code in ``struct``."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", path.read_text(), re.M | re.S):
            if "(" not in re.sub(r"//.*", "", body):
                found[name] = dict(_fields(body))
    return found


def _fields(body: str) -> list[tuple[str, str]]:
    fields = []
    for declaration in re.findall(r"([^;]+);", re.sub(r"//.*", "", body)):
        kind, names = re.match(r"\s*(?:const )?(\w+)\s+(.*)", declaration, re.S).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            name = name.strip()
            fields.append((name.lstrip("*"), "Q" if name.startswith("*") else _CODES.get(kind, "?")))
    return fields


def _with_includes(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    lines = (FOLDER / name).read_text().splitlines(keepends=True)
    parts = []
    for line in lines:
        found = re.match(r'#include "(.+)"', line)
        if line.startswith("#pragma once"):
            continue
        parts.append(_with_includes(found[1], seen) if found else line)
    return "".join(parts)
