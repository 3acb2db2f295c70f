"""The conformance suite, which an extra brings."""

from __future__ import annotations

from importlib.util import find_spec

from refengine.errors import UnsupportedError


def require_suite() -> None:
    """Make sure that the suite can be imported.

    Raises:
        UnsupportedError: it, or what it needs, is not installed; with the command that mends it.
    """
    missing = [name for name in ("refengine_conformance", "hypothesis", "markdown_it") if not find_spec(name)]
    if missing:
        raise UnsupportedError(
            f"the conformance suite needs {' and '.join(missing)}, which is not installed\n"
            "To mend it: pip install 'refengine[conformance]'"
        )
