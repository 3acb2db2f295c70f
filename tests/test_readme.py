"""The README says what is so: its example runs, its tour counts right, its links lead somewhere."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOUR = re.findall(r"\[`([\w/.]+)`\]\(([\w/.]+)\) \| ([\d,]+) \|", README)
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not comment, not docstring."""
    source = path.read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }  # fmt: skip
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in NOT_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docstrings)


@pytest.mark.parametrize(("text", "link", "count"), TOUR)
def test_the_tour_counts_each_file_right(text: str, link: str, count: str) -> None:
    """The number of lines beside a file is the number it has."""
    assert text == link
    assert int(count) == code_lines(ROOT / link)


def test_the_tour_adds_up() -> None:
    """The total is the sum, and the tour is not empty."""
    total = re.search(r"\*\*([\d,]+) lines of code\*\*", README)
    assert total is not None
    assert int(total[1].replace(",", "")) == sum(int(count) for *_, count in TOUR) > 0


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    """Every relative link names a file."""
    assert (ROOT / link).exists()


@pytest.mark.usefixtures("smollm2_path")
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python example does what it shows."""
    example = re.search(r"<!-- tested example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out
