"""The NumPy backend: every op is the golden one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from refengine.backend.interpreter import InterpretedBackend, OpFunction
from refengine.ops import OPS


class NumpyBackend(InterpretedBackend):
    """The golden operations, on the CPU."""

    name = "numpy"
    native: ClassVar[Mapping[str, OpFunction]] = MappingProxyType({op.name: op.golden for op in OPS.values()})
