"""The guide to writing a backend does what it says, in a fresh environment, with every command as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "write-a-backend.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "one-op-backend"
PACKAGES = sysconfig.get_path("purelib")

FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
COMMANDS = [
    line for language, block in FENCE.findall(GUIDE) if language == "sh" for line in block.splitlines()
]
FILES = {
    "pyproject.toml": "toml",
    "one_op_backend/info.py": "python",
    "one_op_backend/backend.py": "python",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A fresh virtual environment that sees this one's packages; pip builds without a network."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    paths = {"base": str(folder), "platbase": str(folder)}
    purelib = Path(sysconfig.get_path("purelib", vars=paths))
    (purelib / "parent.pth").write_text(f"import site; site.addsitedir({PACKAGES!r})\n")
    for command, target in {
        "pip": "pip._internal.cli.main",
        "pytest": "pytest",
        "refengine": "refengine.cli",
    }.items():
        script = scripts / command
        script.write_text(
            f"#!{scripts / 'python'}\nimport sys\nfrom {target} import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))},
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "OPENBLAS_NUM_THREADS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # as pip reads it: no isolation
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide lets one type: its files, taken from its text."""
    folder = tmp_path_factory.mktemp("guide") / "one-op-backend"
    (folder / "one_op_backend").mkdir(parents=True)
    (folder / "one_op_backend" / "__init__.py").touch()
    for name, text in guide_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def guide_files() -> dict[str, str]:
    """The files that the guide shows, by name."""
    return {
        name: match[1]
        for name, language in FILES.items()
        if (match := re.search(rf"`{name}`[^`]*(?:`[^`]+`[^`]*)*?```{language}\n(.*?)```", GUIDE, re.DOTALL))
    }


def shell(command: str, folder: Path, environment: dict[str, str], *, code: int = 0) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_guide_shows_the_example() -> None:
    """What one types is what lies in ``examples``."""
    assert guide_files() == {name: (EXAMPLE / name).read_text(encoding="utf-8") for name in FILES}


def test_every_command_is_tried() -> None:
    """The journey below makes every step of the guide, but for the installation and the whole suite."""
    tried = {*JOURNEY, *BEFORE, *TOO_LONG}
    assert set(COMMANDS) == tried


BEFORE = (
    "pip install --editable '.[conformance]'",
    "mkdir -p one-op-backend/one_op_backend",
    "cd one-op-backend",
    "touch one_op_backend/__init__.py",
)
TOO_LONG = ("refengine conform --backend one-op --fallback --html report.html",)
BREAK = r"sed -i.bak 's|np.sqrt(squares / x.shape\[-1\] + eps)|(np.sqrt(squares / x.shape[-1]) + eps)|' one_op_backend/backend.py"
BROKEN = "refengine conform --backend one-op --clause OPS-8 --fallback  # exits with 12"
JOURNEY = {
    "pip install --editable .": "Successfully installed one-op-backend",
    "refengine backends": "one-op          yes",
    "refengine spec show OPS-8": "## OPS-8",
    "refengine conform --backend one-op --clause OPS-8 --fallback": "one-op reaches L1 on the clauses chosen",
    "refengine conform --backend one-op --clause OPS --fallback": "one-op reaches L1",
    BREAK: "",
    BROKEN: "one-op breaks 1 clause",
    "mv one_op_backend/backend.py.bak one_op_backend/backend.py": "",
    "pytest --pyargs refengine_conformance --refengine-backend one-op --refengine-fallback -k OPS-8": "passed",
}
"""Command -> what it says, in the guide's order."""


def test_the_journey(folder: Path, environment: dict[str, str]) -> None:
    """Every command works as printed, one after the other."""
    assert [command for command in COMMANDS if command in JOURNEY] == list(JOURNEY)
    for command, said in JOURNEY.items():
        assert said in shell(command, folder, environment, code=12 if command == BROKEN else 0), command
    refused = shell("refengine conform --backend one-op --clause OPS-8", folder, environment, code=4)
    assert "--fallback" in refused
