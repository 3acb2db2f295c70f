"""The specification as data: chapters of clauses, parsed strictly from the Markdown that people read.

A chapter is ``spec/NN-name.md``; its title is the first line. A clause in it looks like this::

    ## ATT-3 · A query sees only its window

    **Result:** exact

    **Source:** Beltagy et al., 2020, arXiv:2004.05150

    The normative text, in as many paragraphs as it takes.

    ```python
    >>> the runnable example, in doctest's form
    ```

Before the first clause, and after a heading of one ``#``, stands prose that binds nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from refengine.errors import RefengineError

CLAUSE_ID = re.compile(r"\b[A-Z]{3}-[1-9]\d*\b")
"""How a clause is cited, anywhere."""

RESULTS = ("exact", "rounded", "ulp", "bound", "one of", "law")
"""How a clause's ``Result`` may begin.

``exact``: one legal result, bit by bit. ``rounded``: the correctly rounded one. ``ulp N``: within N units in
the last place. ``bound``: within the error bound that the text derives. ``one of``: any of those listed.
``law``: a relation between results, or a rule of behaviour.
"""

_HEADING = re.compile(r"## (?P<id>[A-Z]{3}-[1-9]\d*) · (?P<title>\S.*)")
_FIELDS = ("Result", "Source")


class SpecificationError(RefengineError):
    """A chapter breaks the form above; the text names the file and the line."""


@dataclass(frozen=True)
class Clause:
    """One clause.

    Attributes:
        id: ``ATT-3``: three letters for the chapter, and a number that is never used again.
        title: one line.
        result: its accuracy class, or the set of its legal results (see ``RESULTS``).
        source: the paper or document it follows.
        text: normative, Markdown.
        example: runnable, in doctest's form.
        chapter: title of its chapter.
        line: where it begins in the chapter's file.
    """

    id: str
    title: str
    result: str
    source: str
    text: str
    example: str
    chapter: str
    line: int


@dataclass(frozen=True)
class Chapter:
    """One file of the specification."""

    name: str
    title: str
    clauses: tuple[Clause, ...]


@cache
def chapters() -> tuple[Chapter, ...]:
    """All chapters, in order.

    Raises:
        SpecificationError: a chapter is malformed, or two clauses have one id.
    """
    found = sorted(
        (f for f in _folder().iterdir() if re.fullmatch(r"\d\d-[\w-]+\.md", f.name)), key=lambda f: f.name
    )
    parsed = tuple(parse_chapter(file.read_text(encoding="utf-8"), file.name) for file in found)
    seen: dict[str, str] = {}
    for chapter in parsed:
        for clause in chapter.clauses:
            if clause.id in seen:
                raise SpecificationError(f"{clause.id} stands in {seen[clause.id]} and in {chapter.name}")
            seen[clause.id] = chapter.name
    return parsed


def clauses() -> dict[str, Clause]:
    """All clauses by id, in order."""
    return {clause.id: clause for chapter in chapters() for clause in chapter.clauses}


def parse_chapter(text: str, name: str) -> Chapter:
    """Parse one chapter.

    Raises:
        SpecificationError: it breaks the form; with file and line.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("# "):
        raise SpecificationError(f"{name}:1: a chapter begins with its title, '# …'")
    title = lines[0][2:].strip()
    return Chapter(name, title, tuple(_parse_clauses(lines, name, title)))


def _parse_clauses(lines: list[str], name: str, chapter: str) -> Iterator[Clause]:
    fenced = False
    headings: list[int] = []
    for at, line in enumerate(lines):
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            headings.append(at)
    for start, stop in zip(headings, [*headings[1:], len(lines)], strict=True):
        if lines[start].startswith("# "):  # prose
            continue
        heading = _HEADING.fullmatch(lines[start])
        if heading is None:
            raise SpecificationError(f"{name}:{start + 1}: a clause's heading is '## ABC-1 · Title'")
        yield _parse_clause(
            heading["id"], heading["title"], lines[start + 1 : stop], name, chapter, start + 1
        )


def _parse_clause(id: str, title: str, body: list[str], file: str, chapter: str, line: int) -> Clause:
    place = f"{file}:{line}"
    text = "\n".join(body).strip()
    fields: dict[str, str] = {}
    for field in _FIELDS:
        found = re.match(rf"\*\*{field}:\*\* (\S.*(?:\n\S.*)*)\n\s*\n", text)
        if found is None:
            raise SpecificationError(f"{place}: {id} has no '**{field}:** …' where it belongs")
        fields[field] = " ".join(found[1].split())
        text = text[found.end() :].lstrip()
    if not fields["Result"].startswith(RESULTS):
        raise SpecificationError(f"{place}: the result of {id} must begin with one of {', '.join(RESULTS)}")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if len(examples) != 1 or ">>>" not in examples[0]:
        raise SpecificationError(
            f"{place}: {id} has {len(examples)} examples in doctest's form, and needs one"
        )
    normative, _, rest = text.partition("```python\n")
    if not normative.strip() or rest.partition("```")[2].strip():
        raise SpecificationError(f"{place}: {id} needs its text before its example, and nothing after it")
    return Clause(
        id, title, fields["Result"], fields["Source"], normative.strip(), examples[0], chapter, line
    )


def _folder() -> Traversable:
    """Where the chapters lie: inside the installed package, or beside it in a checkout."""
    packaged = files("refengine") / "spec"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "spec"
