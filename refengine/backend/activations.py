"""The memory plan of what a backend will compute: with its working memory, and what it fuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from refengine.backend.protocol import Backend, FusingBackend
from refengine.program import MemoryPlan, Policy, Program, plan_memory
from refengine.quantizer import LazyTensor


def plan_activations(
    backend: Backend,
    program: Program,
    policy: Policy,
    sizes: Mapping[str, int],
    weights: Mapping[str, LazyTensor],
    plan: Callable[..., MemoryPlan] = plan_memory,
) -> MemoryPlan:
    """Plan the arena of a Program on a backend.

    Args:
        backend: what will compute it.
        program: what will be computed.
        policy: its precision policy.
        sizes: the most there may be of T, S, R and P.
        weights: by role.
        plan: ``plan_memory``, or what is to be used in its place.
    """
    encodings = {role: tensor.encoding for role, tensor in weights.items()}
    fusions = backend.fusions(program, sizes, encodings) if isinstance(backend, FusingBackend) else ()
    return plan(program, policy, sizes, lambda i, s: backend.workspace(i, s, policy), tuple(fusions))
