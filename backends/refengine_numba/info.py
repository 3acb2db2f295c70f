"""The light half of the Numba backend."""

from __future__ import annotations

from importlib.util import find_spec

from refengine.backend.info import BackendInfo


def probe() -> str | None:
    """Whether Numba is there, which takes long to import. (A mere folder of that name has no origin.)"""
    found = find_spec("numba")
    return None if found is not None and found.origin else "the package numba is not installed"


INFO = BackendInfo(
    description="compiled kernels on the CPU, over weights repacked for its vector units",
    install="pip install 'refengine[numba]'",
    probe=probe,
    priority=10,
)
