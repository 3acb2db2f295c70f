"""Chapter *Backends*: weights, blocks of the KV cache, and what they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.backend import Backend
from refengine.errors import NumericalError
from refengine.memory import KVLayout
from refengine.models import Model
from refengine.program import MemoryPlan, Program
from refengine.quantizer import LazyTensor
from refengine_conformance.backend_prompts import STORED_MODELS, prompts
from refengine_conformance.memory_use import checked_memory
from refengine_conformance.prompts import Prompts
from refengine_conformance.registry import holds
from refengine_conformance.subject import Subject, commit_all


@holds("BCK-12", "backend", level="M", tier="models")
def memory_is_what_was_planned(subject: Subject, data: st.DataObject) -> None:
    """Arena and KV cache grow by the plan's and the committed segments' bytes, and by nothing in steps."""
    case = data.draw(prompts())
    backend, program = subject.start(), case.model.program
    layout = case.layout(subject.policy)
    before = checked_memory(backend.memory())
    cache = backend.create_cache(layout)
    assert checked_memory(backend.memory()).kv_cache == before.kv_cache
    commit_all(cache, layout)
    with_cache = checked_memory(backend.memory())
    assert with_cache.kv_cache - before.kv_cache == layout.nbytes
    plan = _plan(subject, backend, program, case.tokens, layout)
    weights = backend.upload(case.model.weights, subject.policy)
    executable = backend.compile(
        program, subject.policy, plan, weights, layout, cache, fallback=subject.fallback
    )
    for _ in range(2):
        now = checked_memory(backend.memory())
        assert now.arena - before.arena == plan.arena_bytes
        assert now.kv_cache == with_cache.kv_cache
        executable.run(case.batch(case.whole))


@holds("BCK-14", "backend", tier="models")
def a_weight_that_is_not_finite_is_refused(subject: Subject, data: st.DataObject) -> None:
    """One NaN or infinity anywhere, however weights are held: ``NumericalError`` from upload or first use."""
    case = data.draw(prompts())
    role = data.draw(st.sampled_from(sorted(case.model.weights)))
    tensor = case.model.weights[role]
    values = tensor.decode()
    row = case.token_ids[0][0] if role == "token_embedding" else data.draw(st.integers(0, len(values) - 1))
    values[row, ...].flat[0] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    spoilt = LazyTensor(tensor.name, tensor.shape, "f32", values.view(np.uint8))
    case = replace(case, model=Model(case.model.spec, {**case.model.weights, role: spoilt}))
    try:
        _Limited(subject, case, data.draw(_limits(subject, case))).step()
    except NumericalError as error:
        assert tensor.name in str(error), f"{error} does not name {tensor.name}"
    else:
        raise AssertionError(f"{role} holds {values[row].flat[0]}, and nobody noticed")


@holds("BCK-15", "backend", tier="models")
def a_limit_on_weights_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Logits under any limit are those without one: of a step that is the first, and of the same again."""
    case = data.draw(prompts(models=STORED_MODELS))
    limit = data.draw(_limits(subject, case))
    free, limited = _Limited(subject, case, None), _Limited(subject, case, limit)
    expected = free.step()
    assert limited.step() == expected, f"other bits under a limit of {limit} bytes"
    assert limited.step() == expected, f"other bits in the second step, under a limit of {limit} bytes"


@holds("BCK-17", "backend", tier="state")
def a_block_holds_what_was_put_into_it(subject: Subject, data: st.DataObject) -> None:
    """Writes, copies and poison in any order, beside a dictionary of what every block should hold."""
    layout = data.draw(prompts()).layout(subject.policy)
    pool = data.draw(st.integers(0, len(layout.groups) - 1))
    cache = subject.start().create_cache(layout)
    commit_all(cache, layout)
    nbytes, blocks = layout.block_bytes(pool), st.integers(0, layout.num_blocks[pool] - 1)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    expected: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    for what in data.draw(st.lists(st.sampled_from(["write", "copy", "poison"]), min_size=1, max_size=8)):
        block = data.draw(blocks)
        if what == "write" or not expected:
            expected[block] = random.integers(0, 256, nbytes, np.uint8)
            cache.write(pool, block, expected[block].copy())
        elif what == "copy":
            source = data.draw(st.sampled_from(sorted(expected)))
            cache.copy(pool, source, block)
            expected[block] = expected[source]
        else:
            cache.poison(pool, block)
            expected.pop(block, None)
            if layout.groups[pool].sealed is None:
                assert np.isnan(cache.read(pool, block).view(layout.dtype)).all()
        found = {each: cache.read(pool, each) for each in expected}
        assert all(np.array_equal(found[each], expected[each]) for each in expected)


@holds("BCK-16", "backend", level="M", tier="models")
def weights_take_what_was_planned(subject: Subject, data: st.DataObject) -> None:
    """At most the limit, or else the least there is; and after a step, to the byte, the plan."""
    case = data.draw(prompts(models=STORED_MODELS))
    limit = data.draw(_limits(subject, case))
    least = _Limited(subject, case, 0).plan.total
    running = _Limited(subject, case, limit)
    plan = running.plan
    assert limit is None or plan.total <= max(limit, least), (
        f"{plan.total} of {limit} bytes, and {least} would do"
    )
    assert plan == _Limited(subject, case, limit).plan, "another plan for the same model"
    for _ in range(2):
        running.step()
        use = checked_memory(running.backend.memory())
        assert (use.weights, use.mapped) == (plan.held, plan.mapped + plan.streamed)
        assert use.host == plan.host, f"{use.host} bytes of the host, of {plan.host} planned"


class _Limited:
    """Whole prompts on a backend of its own, whose weights may take so many bytes."""

    def __init__(self, subject: Subject, case: Prompts, limit: int | None) -> None:
        policy, program, weights = subject.policy, subject.trace(case.model), case.model.weights
        self.backend = subject.start()
        self.plan = self.backend.plan_weights(program, weights, policy, limit)
        self._batch, layout = case.batch(case.whole), case.layout(policy)
        cache = self.backend.create_cache(layout)
        commit_all(cache, layout)
        self._executable = self.backend.compile(
            program,
            policy,
            _plan(subject, self.backend, program, case.tokens, layout),
            self.backend.upload(weights, policy, self.plan),
            layout,
            cache,
            fallback=subject.fallback,
        )

    def step(self) -> bytes:
        """The bits of all logits."""
        return self._executable.run(self._batch).tobytes()


def _limits(subject: Subject, case: Prompts) -> st.SearchStrategy[int | None]:
    """None, next to nothing, and what is about enough for some, for all as stored, or for all decoded."""
    weights = case.model.weights.values()
    stored = sum(tensor.nbytes for tensor in weights)
    decoded = sum(tensor.size for tensor in weights) * subject.policy.activations.itemsize
    return st.none() | st.just(0) | st.just(stored) | st.integers(0, decoded + 9)


def _plan(subject: Subject, backend: Backend, program: Program, tokens: int, layout: KVLayout) -> MemoryPlan:
    """The plan for steps of so many tokens, the backend's working memory included."""
    policy, sizes = subject.policy, {"T": tokens, "S": tokens, "R": tokens, "P": layout.block_size}
    return subject.plan(program, policy, sizes, lambda i, s: backend.workspace(i, s, policy))
