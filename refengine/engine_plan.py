"""What an engine will hold, decided before anything is loaded: the plan that is then carried out.

Where the backend's device has memory of its own, a limit is about that: weights where steps read them, the KV
cache, the arena, logits and the device's context. What the process takes of the host's memory beside it is
told, and not added. Where the device's memory is the host's, a limit is about all of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

from refengine.backend import Backend, Device, WeightPlan, plan_activations, select
from refengine.config import EngineConfig
from refengine.errors import MemoryLimitError
from refengine.memory import KVGroupLayout, KVLayout
from refengine.models import Model, ModelSpec
from refengine.program import MemoryPlan, Policy, Program, concrete, kv_formats, policy

PROCESS_BYTES = 64 * 2**20
"""What a process with Python, NumPy and refengine in it takes beside the engine (bytes)."""

TOKEN_BYTES = 160
"""What its tokenizer takes for each entry of the vocabulary (bytes)."""

LEAST_POSITIONS = 512
"""Positions of KV cache without which an engine under a memory limit does not start, where nobody says how
many are needed."""

MOST_POSITIONS = 65_536
"""Positions of KV cache that an engine without a limit provides for, unless one context is longer."""


@dataclass(frozen=True)
class EnginePlan:
    """The sizes of all that an engine holds.

    Attributes:
        config: what was asked for.
        policy: its precision policy.
        program: the decoder, traced for the KV cache's precision, in the policy's.
        activations: the arena, working memory of the ops included.
        weights: how each weight is held.
        layout: the KV cache; its pools are the most they may grow to.
        logits_bytes: of the logits of one step at most.
        backend_bytes: what the backend's own code takes, once it is imported.
        device: where it computes.
        limit: what ``most_bytes`` stays within: what was asked for, or what a device has free, where that is
            less; ``None`` for no limit.
    """

    config: EngineConfig
    policy: Policy
    program: Program
    activations: MemoryPlan
    weights: WeightPlan
    layout: KVLayout
    logits_bytes: int
    backend_bytes: int
    device: Device
    limit: int | None = None

    @property
    def fixed_bytes(self) -> int:
        """All but the KV cache and the process itself; of the device's memory, where it has its own."""
        return self.activations.arena_bytes + self.logits_bytes + self.weights.total

    @property
    def process_bytes(self) -> int:
        """What the process takes of the host's memory beside the engine: a constant."""
        return PROCESS_BYTES + self.backend_bytes + TOKEN_BYTES * self.program.vocabulary_size

    @property
    def most_bytes(self) -> int:
        """Of the memory that a limit is about: with the KV cache full; on the host also with the room for
        swapped blocks full, and the process itself; on a device that has its own memory with its context.
        """
        engine = self.fixed_bytes + self.layout.nbytes
        if self.device.own_memory:
            return self.device.context_bytes + engine
        return self.process_bytes + engine + self.config.swap

    @property
    def host_bytes(self) -> int:
        """Of the host's memory, beside a device that has its own: the process, the weights that stay there,
        a step's logits and swapped blocks; 0 where the device's memory is the host's.
        """
        if not self.device.own_memory:
            return 0
        return self.process_bytes + self.weights.host + self.logits_bytes + self.config.swap


def plan_engine(model: Model, backend: Backend, config: EngineConfig) -> EnginePlan:
    """Decide how a model's weights are held and how far its KV cache may grow.

    Without a limit, weights are held as the backend is fastest. Under one, memory is spent in this order:
    what cannot be done without; the weights as stored, or on a device that has its own memory as they are
    held there; one whole context of KV cache; weights decoded ahead; more KV cache. What such a device has
    free is a limit, where it is less than what would be held without one or than the limit that was asked
    for.

    Raises:
        MemoryLimitError: ``config.memory``, or what the device has free, is too small; its text says which
            would do, and what would shrink that.
        UnsupportedError: an unknown policy or KV dtype.
    """
    plan = _least(model, backend, config)
    stored = sum(tensor.nbytes for tensor in model.weights.values())
    cap = None if config.weight_cache is None or plan.device.own_memory else stored + config.weight_cache

    def with_weights(limit: int | None) -> EnginePlan:
        weights = backend.plan_weights(plan.program, model.weights, plan.policy, _smaller(limit, cap))
        return replace(plan, weights=weights)

    def with_positions(positions: int) -> EnginePlan:
        return replace(plan, layout=kv_layout(model.spec, config, plan.policy, positions))

    whole = config.kv_tokens or most_positions(model.spec, config)
    limit = _smaller(config.memory, _available(plan.device))
    fastest = replace(with_positions(whole), weights=with_weights(None).weights)
    if limit is None or (config.memory is None and fastest.most_bytes <= limit):
        return fastest
    plan = replace(plan, limit=limit)
    if plan.most_bytes > limit:
        raise _too_small(model, backend, plan)
    room = plan.weights.total + limit - plan.most_bytes
    plan = with_weights(room if plan.device.own_memory else min(stored, room))
    if config.kv_tokens is None:
        context = min(whole, model.spec.context_length)
        plan = _largest(with_positions, LEAST_POSITIONS, context, limit) or plan
    plan = with_weights(plan.weights.total + limit - plan.most_bytes)
    if config.kv_tokens is None:
        plan = _largest(with_positions, LEAST_POSITIONS, whole, limit) or plan
    return plan


def choose_backend(name: str, model: Model, config: EngineConfig) -> Backend:
    """The backend of this name, or for ``auto`` the fastest that computes the model as configured.

    Raises:
        BackendError: it is unknown, not installed, or failed to start.
        UnsupportedError: an unknown policy or KV dtype.
    """
    chosen = policy(config.policy)
    _, sealed = kv_formats(config.kv_dtype, chosen)
    encodings = {role: tensor.encoding for role, tensor in model.weights.items()}
    return select(name, model.program_for(chosen, sealed=sealed is not None), chosen, encodings)


def most_positions(spec: ModelSpec, config: EngineConfig) -> int:
    """Positions of KV cache that are enough, where nobody says how many are needed."""
    return min(spec.context_length * config.max_sequences, max(spec.context_length, MOST_POSITIONS))


def kv_layout(spec: ModelSpec, config: EngineConfig, chosen: Policy, positions: int) -> KVLayout:
    """A KV cache for so many positions: one pool per group of layers with the same window.

    A windowed pool needs room for the window and one step's tokens of each running request, whatever the
    length of their contexts. Beside a pool that is sealed stands one of exact copies, with room for one
    step's tokens, and of each running request the first block and the two it may have begun.
    """
    dtype, sealed = kv_formats(config.kv_dtype, chosen)
    block, sequences = config.block_size, config.max_sequences
    full = -(-positions // block)
    step = -(-config.token_budget // block)
    pools = []
    for group in spec.kv_groups:
        shapes = tuple((i, spec.layers[i].kv_heads, spec.layers[i].head_size) for i in group.layers)
        blocks = full
        if group.window is not None:
            per_request = -(-(group.window + config.token_budget) // block) + 1
            blocks = min(full, per_request * sequences)
        pools.append(KVGroupLayout(group.window, shapes, blocks, sealed))
    if sealed is not None:
        pools += [
            replace(pool, num_blocks=min(full, step + 3 * sequences), sealed=None, recent=True)
            for pool in pools
        ]
    return KVLayout(block, dtype, tuple(pools))


def _least(model: Model, backend: Backend, config: EngineConfig) -> EnginePlan:
    """The plan that takes least: no weights held that need not be, and the fewest positions of KV cache."""
    chosen = policy(config.policy)
    _, sealed = kv_formats(config.kv_dtype, chosen)
    program = model.program_for(chosen, sealed=sealed is not None)
    sizes = {
        "T": config.token_budget,
        "S": config.max_sequences,
        "R": min(config.rows, config.token_budget),
        "P": config.block_size,
    }
    positions = config.kv_tokens or min(LEAST_POSITIONS, most_positions(model.spec, config))
    return EnginePlan(
        config,
        chosen,
        program,
        plan_activations(backend, program, chosen, sizes, model.weights),
        backend.plan_weights(program, model.weights, chosen, 0),
        kv_layout(model.spec, config, chosen, positions),
        prod(concrete(program.output.shape, sizes)) * chosen.activations.itemsize,
        backend.import_bytes,
        backend.devices()[0],
    )


def _available(device: Device) -> int | None:
    """What an engine may take of a device's own memory, its context included; ``None`` for any number."""
    return None if device.free_bytes is None else device.context_bytes + device.free_bytes


def _largest(plan_for: Callable[[int], EnginePlan], least: int, most: int, limit: int) -> EnginePlan | None:
    """The plan for the most positions that stays within a limit; ``None`` where none does."""
    if plan_for(most).most_bytes <= limit:
        return plan_for(most)
    if least >= most or plan_for(least).most_bytes > limit:
        return None
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if plan_for(middle).most_bytes <= limit else (least, middle)
    return plan_for(least)


def _too_small(model: Model, backend: Backend, plan: EnginePlan) -> MemoryLimitError:
    """What would do instead."""
    config, device, needed = plan.config, plan.device, plan.most_bytes
    positions = config.kv_tokens or min(LEAST_POSITIONS, most_positions(model.spec, config))
    ways = [
        f"{option} needs {_megabytes(least)}"
        for option, least in _shrunk(model, backend, config)
        if least < needed
    ]
    where = f" of the memory of {device.name}" if device.own_memory else ""
    least = "the limit is" if plan.limit == config.memory else "what it has free, with its context, is"
    return MemoryLimitError(
        f"{_megabytes(needed)}{where} are needed for {positions} positions of context, and {least} "
        f"{_megabytes(plan.limit or 0)}\n  "
        + ("\n  ".join(["to need less:", *ways]) if ways else "nothing makes it less but a smaller model"),
        needed=needed,
    )


def _shrunk(model: Model, backend: Backend, config: EngineConfig) -> Iterator[tuple[str, int]]:
    """Options that shrink an engine, each with the bytes it would need then."""
    changes: dict[str, dict[str, object]] = {
        f"--token-budget {max(16, config.token_budget // 8)}": {
            "token_budget": max(16, config.token_budget // 8)
        },
        "--max-sequences 1": {"max_sequences": 1, "logit_rows": None},
        "--kv-dtype float16": {"kv_dtype": "float16"},
        "--kv-dtype int8": {"kv_dtype": "int8"},
        "--kv-dtype int4": {"kv_dtype": "int4"},
    }
    if config.kv_tokens is None or config.kv_tokens > 2 * config.block_size:
        shorter = max(config.block_size, (config.kv_tokens or LEAST_POSITIONS) // 2)
        changes[f"--kv-tokens {shorter}"] = {"kv_tokens": shorter}
    for option, fields in changes.items():
        smaller = replace(config, **fields)  # type: ignore[arg-type]
        if smaller != config:
            yield option, _least(model, backend, smaller).most_bytes


def _smaller(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _megabytes(nbytes: int) -> str:
    """Rounded up, so that what is read here and typed as a limit is enough."""
    return f"{-(-nbytes // 10**5) / 10:,.1f} MB"
