"""The suite as pytest tests of somebody else's repository, one per property::

    pytest --pyargs refengine_conformance --refengine-backend NAME

Every pytest that this is installed beside imports this module: it defines options, and imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that say what to test."""
    group = parser.getgroup("refengine", "conformance to the refengine specification")
    group.addoption("--refengine-backend", metavar="NAME", help="hold this backend against the specification")
    group.addoption(
        "--refengine-policy", metavar="NAME", default="float32", help="precision (default: float32)"
    )
    group.addoption(
        "--refengine-profile",
        choices=["quick", "thorough"],
        default="quick",
        help="25 or 400 examples per property (default: quick)",
    )
    group.addoption(
        "--refengine-seed", metavar="N", type=int, default=0, help="seed of all examples (default: 0)"
    )
    group.addoption(
        "--refengine-fallback", action="store_true", help="let golden ops stand in for what the backend lacks"
    )
