"""Which backend computes a program: the one that was named, or the fastest that can."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from refengine.backend.protocol import Backend
from refengine.backend.registry import load, registered
from refengine.errors import BackendError
from refengine.program import Instruction, Policy, Program

AUTO = "auto"
"""Stands for the fastest backend that can."""

VARIABLE = "REFENGINE_BACKEND"
"""The environment variable that names the backend where ``auto`` is asked for."""


def missing(
    backend: Backend, program: Program, policy: Policy, encodings: Mapping[str, str]
) -> dict[str, str]:
    """Why a backend cannot compute a program by itself: a reason for each op; none where it can.

    Args:
        encodings: of the program's weights, by role.
    """
    reasons: dict[str, str] = {}
    for op, encoding in dict.fromkeys((i.op.name, _encoding(i, encodings)) for i in program):
        reason = backend.support(op, encoding=encoding, policy=policy.name)
        if reason is not None:
            reasons[op] = reason
    return reasons


def select(name: str, program: Program, policy: Policy, encodings: Mapping[str, str]) -> Backend:
    """Start the backend of this name, or for ``auto`` the fastest that computes the program.

    Where ``REFENGINE_BACKEND`` names one, it is what ``auto`` means. A faster backend that is passed over is
    a warning of the ``refengine`` logger, with the reason.

    Args:
        name: a registered name, or ``auto``.
        encodings: of the program's weights, by role.

    Raises:
        BackendError: see ``load``.
    """
    if name == AUTO:
        name = os.environ.get(VARIABLE) or AUTO
    if name != AUTO:
        return load(name)
    usable = [(s.info.priority, s.name) for s in registered() if s.info and not s.problem]
    for _, candidate in sorted(usable, reverse=True):
        try:
            backend = load(candidate)
            reasons = missing(backend, program, policy, encodings)
        except BackendError as error:
            reasons = {"": error.why}
        if not reasons:
            return backend
        logging.getLogger("refengine").warning(
            "%s cannot compute this model (%s): the next backend does",
            candidate,
            "; ".join(dict.fromkeys(reasons.values())),
        )
    return load("numpy")


def _encoding(instruction: Instruction, encodings: Mapping[str, str]) -> str | None:
    """Of an op's matrix; ``None`` where it has none."""
    matrices = [v.name for v in instruction.operands if v and v.kind == "weight" and len(v.shape) > 1]
    return encodings[matrices[0]] if matrices else None
