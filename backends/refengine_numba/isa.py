"""Instruction sets that kernels are written for, and which of them a run takes.

Vector code adapts by itself: LLVM cuts sixteen lanes to what the machine has. What differs by instruction set
is the dot product of bytes, which no portable instruction names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

import llvmlite.binding as llvm

from refengine.errors import UnsupportedError

VARIABLE = "REFENGINE_NUMBA_ISA"
"""The environment variable that names the instruction set to take; for tests and for measuring."""

FEATURES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "avx512-vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni"}),
        "avx-vnni": frozenset({"avx2", "avxvnni"}),
        "avx2": frozenset({"avx2", "fma"}),
        "portable": frozenset(),
    }
)
"""Every instruction set, best first, with the processor features (LLVM's names) it needs."""


def processor_features() -> frozenset[str]:
    """What compiled code may use: the processor's features, or what ``NUMBA_CPU_FEATURES`` leaves of them."""
    asked = os.environ.get("NUMBA_CPU_FEATURES")
    if asked is not None:
        chosen = {name[1:] for name in asked.split(",") if name.startswith("+")}
    else:
        chosen = {name for name, present in llvm.get_host_cpu_features().items() if present}
    return frozenset(chosen)


def has_half_conversion() -> bool:
    """Whether float16 becomes float32 in one instruction: always on 64-bit Arm, with F16C on x86."""
    return bool({"f16c", "neon"} & processor_features())


def available(features: frozenset[str]) -> tuple[str, ...]:
    """The instruction sets that a processor with these features runs, best first."""
    return tuple(name for name, needed in FEATURES.items() if needed <= features)


def choose(name: str | None = None) -> str:
    """The instruction set to compile for.

    Args:
        name: one of :data:`FEATURES`; ``None`` takes what ``REFENGINE_NUMBA_ISA`` names, else the best
        there is.

    Raises:
        UnsupportedError: no such instruction set, or this processor lacks it.
    """
    name = name or os.environ.get(VARIABLE) or None
    possible = available(processor_features())
    if name is None:
        return possible[0]
    if name not in FEATURES:
        raise UnsupportedError(f"unknown instruction set {name!r}; there are {', '.join(FEATURES)}")
    if name not in possible:
        missing = ", ".join(sorted(FEATURES[name] - processor_features()))
        raise UnsupportedError(
            f"this processor has no {name} (it lacks {missing}); choose among {', '.join(possible)}"
        )
    return name
