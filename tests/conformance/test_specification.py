"""The specification is well-formed, its examples run, and properties, faults and code cite what exists."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

import refengine
from refengine.specification import (
    CLAUSE_ID,
    Chapter,
    Clause,
    SpecificationError,
    chapters,
    clauses,
    parse_chapter,
)
from refengine_conformance.registry import Property, all_properties
from refengine_conformance.self_test import faults

PACKAGE = Path(refengine.__file__).parent
CLAUSES = clauses()

CHAPTER = """# Attention

Prose that binds nobody.

## ATT-1 · A query sees its own past

**Result:** exact

**Source:** Vaswani et al., 2017, arXiv:1706.03762

A weight is zero where `j > p`.

```python
>>> 1 + 1
2

```
"""


def prefix(id: str) -> str:
    return id.partition("-")[0]


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.name)
def test_clauses_are_numbered_from_one(chapter: Chapter) -> None:
    """A chapter's clauses share three letters, and count 1, 2, 3 … in the order of the text."""
    ids = [clause.id for clause in chapter.clauses]
    assert ids == [f"{prefix(ids[0])}-{number}" for number in range(1, len(ids) + 1)]


def test_chapters_are_numbered_and_have_letters_of_their_own() -> None:
    """No two chapters share a number or three letters."""
    numbers = [chapter.name[:2] for chapter in chapters()]
    letters = [prefix(chapter.clauses[0].id) for chapter in chapters()]
    assert len(set(numbers)) == len(numbers)
    assert len(set(letters)) == len(letters)


@pytest.mark.parametrize("clause", CLAUSES.values(), ids=lambda clause: clause.id)
def test_examples_run(clause: Clause) -> None:
    """A clause's example gives what it shows."""
    test = doctest.DocTestParser().get_doctest(clause.example, {}, clause.id, None, clause.line)
    assert test.examples
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("id", CLAUSES)
def test_every_clause_has_a_property(id: str) -> None:
    """Nothing is demanded that is not tested."""
    assert any(item.clause == id for item in all_properties())


@pytest.mark.parametrize("item", all_properties(), ids=lambda item: item.id)
def test_properties_prove_clauses_that_exist(item: Property) -> None:
    """Nothing is tested that is not demanded; a property says in a sentence what it does."""
    assert item.clause in CLAUSES
    assert item.check.__doc__


def test_ids_of_properties_are_unique() -> None:
    """An id names one property."""
    assert [
        id for id, same in groupby(sorted(item.id for item in all_properties())) if len(list(same)) > 1
    ] == []


def test_every_fault_names_a_clause_that_exists() -> None:
    """Faults break what is demanded, and no two have one name under one clause."""
    names = [(fault.clause, fault.name) for fault in faults()]
    assert {clause for clause, _ in names} <= set(CLAUSES)
    assert len(set(names)) == len(names)


def citations(path: Path) -> Iterator[tuple[int, str]]:
    """Clauses that a file's docstrings cite: on a line "Clauses: …" anything of the form counts."""
    letters = {prefix(id) for id in CLAUSES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            for number, line in enumerate(node.value.value.splitlines(), node.lineno):
                for id in CLAUSE_ID.findall(line):
                    if "Clauses:" in line or prefix(id) in letters:
                        yield number, id


def test_code_cites_clauses_that_exist() -> None:
    """A docstring that cites a clause cites one there is; the golden ops cite some."""
    cited = [(path, *found) for path in PACKAGE.rglob("*.py") for found in citations(path)]
    assert [f"{path}:{line}: {id}" for path, line, id in cited if id not in CLAUSES] == []
    assert any(path.parent.name == "ops" for path, *_ in cited)


def test_a_chapter_is_parsed() -> None:
    """Every part of a clause is found, and prose is left out."""
    chapter = parse_chapter(CHAPTER, "05-attention.md")
    assert (chapter.name, chapter.title) == ("05-attention.md", "Attention")
    assert chapter.clauses == (
        Clause(
            id="ATT-1",
            title="A query sees its own past",
            result="exact",
            source="Vaswani et al., 2017, arXiv:1706.03762",
            text="A weight is zero where `j > p`.",
            example=">>> 1 + 1\n2\n\n",
            chapter="Attention",
            line=5,
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# Attention\n", "Attention\n", "05.md:1: a chapter begins with its title"),
        ("## ATT-1 · A", "## ATT-01 · A", "05.md:5: a clause's heading"),
        ("## ATT-1 · A", "## ATT-1: A", "05.md:5: a clause's heading"),
        ("## ATT-1 · A", "### ATT-1 · A", "05.md:5: a clause's heading"),
        ("**Result:** exact\n\n", "", "05.md:5: ATT-1 has no '**Result:**"),
        ("**Source:** Vaswani et al., 2017, arXiv:1706.03762\n\n", "", "05.md:5: ATT-1 has no '**Source:**"),
        ("**Result:** exact", "**Result:** roughly", "05.md:5: the result of ATT-1 must begin with"),
        (">>> 1 + 1\n2\n", "1 + 1\n", "05.md:5: ATT-1 has 1 examples"),
        ("```python", "```", "05.md:5: ATT-1 has 0 examples"),
        ("\n\n```python", "\n\n```python\n>>> 0\n```\n\n```python", "05.md:5: ATT-1 has 2 examples"),
        ("A weight is zero where `j > p`.\n\n", "", "05.md:5: ATT-1 needs its text before its example"),
        ("2\n\n```\n", "2\n\n```\n\nAfterthought.\n", "05.md:5: ATT-1 needs its text before its example"),
    ],
)  # fmt: skip
def test_a_malformed_chapter_is_refused(old: str, new: str, message: str) -> None:
    """What breaks the form is told with file and line."""
    assert old in CHAPTER
    with pytest.raises(SpecificationError, match=f"^{re.escape(message)}"):
        parse_chapter(CHAPTER.replace(old, new, 1), "05.md")
