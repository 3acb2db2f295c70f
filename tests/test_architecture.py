"""The house keeps its floors, and its front door stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import refengine

ROOT = Path(refengine.__file__).parent

FLOORS = [
    {"errors", "whole_lines"},
    {"quantizer", "ops", "memory", "scheduler", "specification", "candidates"},
    {"program", "simulation"},
    {"loader", "tokenizer"},
    {"models"},
    {"backend", "synth"},
    {"sampling", "stopping"},
    {"request", "candidate_sampling"},
    {"sequence", "config", "paged_cache"},
    {"engine_plan", "engine_journal"},
    {"memory_report"},
    {"engine", "forecast"},
    {"service", "rerun"},
    {"llm"},
    {"batch"},
    {"cli"},
    {"__main__"},
]
"""From the ground up; a name is a package or a module of refengine."""


def floor(name: str) -> int:
    return next(level for level, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> set[str]:
    """Names of refengine that a file imports: ``refengine.ops.norm`` is ``ops``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "refengine":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refengine."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("refengine.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_or_stay(path: Path) -> None:
    """No file imports from a higher floor, nor from another folder of its own."""
    home = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if home == "__init__":  # the front door names what lies behind it
        return
    for name in imports(path) - {home, "__version__"}:
        known = name if any(name in names for names in FLOORS) else "llm"  # a name of the public API
        assert floor(known) < floor(home), (
            f"{home} (floor {floor(home)}) imports {name} (floor {floor(known)})"
        )


def test_importing_refengine_loads_nothing_heavy() -> None:
    """``import refengine`` imports neither NumPy nor any backend; the API is there when asked for."""
    heavy = "{'numpy', 'jinja2', 'tokenizers', 'rich', 'click', 'refengine.engine', 'refengine.backend'}"
    code = f"import sys, refengine; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_only_kernels_need_numba() -> None:
    """Its backend runs without Numba whatever was compiled before: imports of it are below ``kernels`` alone."""
    here = ROOT.parent / "backends" / "refengine_numba"
    for path in here.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        heavy = {name for name in names if name.split(".")[0] == "numba" or ".kernels" in name}
        assert not heavy, f"{path.name} imports {', '.join(heavy)}"
    assert any("numba" in path.read_text() for path in here.glob("kernels/*.py"))


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("llm", ("simulation", "engine_journal", "tokenizer.chat_template_worker")),
        ("tokenizer.chat_template_worker", ("errors", "tokenizer.tokenizer", "tokenizer.chat_template")),
    ],
)
def test_a_start_imports_nothing_it_does_not_use(module: str, unused: tuple[str, ...]) -> None:
    """A model is loaded without what writes journals, a chat template rendered without the tokenizers."""
    names = {f"refengine.{name}" for name in unused}
    code = f"import sys, refengine.{module}; sys.exit(', '.join({names} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_public_names() -> None:
    """What ``refengine`` promises, and nothing by accident."""
    assert sorted(refengine.__all__) == [
        "Completion",
        "Engine",
        "EngineConfig",
        "LLM",
        "Output",
        "Request",
        "SamplingParams",
        "load",
    ]
    for name in refengine.__all__:
        assert getattr(refengine, name)
    with pytest.raises(AttributeError, match="nonsense"):
        refengine.nonsense  # noqa: B018
