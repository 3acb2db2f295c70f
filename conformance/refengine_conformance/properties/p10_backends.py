"""Chapter *Backends*."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st

from refengine.backend import Backend, registry
from refengine.backend.info import BackendInfo
from refengine.errors import (
    BackendError,
    BackendFailedError,
    BackendNotInstalledError,
    NumericalError,
    RequestError,
    TokenIdError,
    UnknownBackendError,
    UnsupportedError,
)
from refengine.memory import KVLayout
from refengine.models import Model
from refengine.models.families import FAMILIES
from refengine.ops import OPS
from refengine.program import POLICIES, MemoryPlan, Program, StepBatch, StepInputs, input_arrays
from refengine.quantizer import ENCODINGS, LazyTensor
from refengine_conformance.bounds import check_bound
from refengine_conformance.naive_model import naive_logits
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.registry import holds
from refengine_conformance.rounding import UNIT_ROUNDOFF, decoded_weights, deviation
from refengine_conformance.subject import Subject, commit_all
from refengine_conformance.tiny_model import tiny_model

ABOVE = frozenset({"engine", "scheduler", "sampling", "stopping", "request", "llm", "cli", "server"})
"""Modules of refengine that a backend has no business with."""


@cache
def _tiny(family: str, seed: int) -> Model:
    return tiny_model(family, layers=3, seed=seed)


MODELS = st.builds(_tiny, st.sampled_from(sorted(FAMILIES)), st.integers(0, 4))


@cache
def _stored(family: str, seed: int, vocabulary_size: int) -> Model:
    """A tiny model, half of whose weights are stored in 16 bits."""
    model = tiny_model(family, layers=2, seed=seed, vocabulary_size=vocabulary_size)
    weights = dict(model.weights)
    for role in sorted(weights)[::2]:
        half = weights[role].decode().astype("<f2").view(np.uint8)
        weights[role] = LazyTensor(weights[role].name, weights[role].shape, "f16", half)
    return Model(model.spec, weights)


STORED_MODELS = st.builds(
    _stored, st.sampled_from(sorted(FAMILIES)), st.integers(0, 1), st.sampled_from([97, 90_001])
)
"""Some with embeddings of more than one tile of ``linear``."""


LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=3)


@st.composite
def prompts(
    draw: st.DrawFn,
    lengths: st.SearchStrategy[list[int]] = LENGTHS,
    models: st.SearchStrategy[Model] = MODELS,
) -> Prompts:
    """Prompts of random tokens, in blocks of any size and order."""
    model = draw(models)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = tuple(tuple(rng.integers(0, model.spec.vocabulary_size, n).tolist()) for n in draw(lengths))
    return Prompts(model, ids, draw(st.sampled_from([1, 4, 5, 16])), order=draw(st.integers(0, 9)))


@holds("BCK-1", "backend")
def a_backend_says_what_it_is(subject: Subject, data: st.DataObject) -> None:
    """Name, devices, support and memory are there and mean something, before anything else is asked for."""
    backend = subject.start()
    assert backend.name
    devices = backend.devices()
    assert devices
    for device in devices:
        assert device.name
        assert device.total_bytes is None or device.total_bytes > 0
    op, policy = data.draw(st.sampled_from(sorted(OPS))), data.draw(st.sampled_from(sorted(POLICIES)))
    encoding = data.draw(st.none() | st.sampled_from(sorted(ENCODINGS)))
    reason = backend.support(op, encoding=encoding, policy=policy)
    assert reason is None or (isinstance(reason, str) and reason.strip())
    _check_memory(backend.memory())


@holds("BCK-1", "backend")
def a_backend_imports_nothing_above_it(subject: Subject, data: st.DataObject) -> None:
    """The source of its classes names no module of the engine or the ways in."""
    for cls in type(subject.start()).__mro__:
        with suppress(TypeError):
            above = _imports(inspect.getfile(cls)) & ABOVE
            assert not above, f"{cls.__module__} imports refengine.{', refengine.'.join(sorted(above))}"


@holds("BCK-2", "backend")
def what_does_not_exist_is_not_supported(subject: Subject, data: st.DataObject) -> None:
    """An op, an encoding or a policy of an unknown name gives a reason that names it."""
    backend = subject.start()
    unknown = data.draw(st.text("abcxyz_", min_size=1, max_size=9).map(lambda t: f"no_{t}"))
    asked = {"op": "linear", "encoding": "f32", "policy": "float32"}
    asked[data.draw(st.sampled_from(sorted(asked)))] = unknown
    reason = backend.support(asked.pop("op"), **asked)
    assert unknown in str(reason), f"{unknown}: {reason!r}"


@holds("BCK-2", "backend", tier="models")
def an_op_is_native_or_refused_with_its_reason(subject: Subject, data: st.DataObject) -> None:
    """What it claims to support runs; what it does not is refused, unless fallback is asked for."""
    case = data.draw(prompts())
    program = case.model.program
    backend = subject.start()
    reasons = [backend.support(op, encoding=None, policy=subject.policy.name) for op in program.op_counts]
    missing = [reason for reason in reasons if reason]
    try:
        Prompting(replace(subject, fallback=False), case).step(case.whole)
    except UnsupportedError as error:
        assert missing, f"refused, although every op is supported: {error}"
        assert all(reason in str(error) for reason in missing), f"{error} does not say {missing}"
    else:
        assert not missing, f"ran although {missing}, and nobody asked for golden ops"


@holds("BCK-3", "backend", tier="models")
def logits_have_the_declared_shape_and_dtype(subject: Subject, data: st.DataObject) -> None:
    """One row per entry of ``logit_rows``, in their order, repeated or none at all; in the policy's dtype."""
    case = data.draw(prompts())
    running, batch = Prompting(subject, case), case.batch(case.whole)
    every = running.executable.run(batch)
    rows = data.draw(st.lists(st.integers(0, case.tokens - 1), max_size=case.tokens))
    some = running.executable.run(replace(batch, logit_rows=np.array(rows, np.int32)))
    for logits, count in ((every, case.tokens), (some, len(rows))):
        assert isinstance(logits, np.ndarray)
        assert logits.shape == (count, case.model.spec.vocabulary_size)
        assert logits.dtype == subject.policy.activations
    assert some.tobytes() == every[rows].tobytes(), f"rows {rows} are others"


@holds("BCK-4", "backend", tier="models")
def a_result_belongs_to_its_caller(subject: Subject, data: st.DataObject) -> None:
    """A later step changes no earlier result, and writing into a result changes no later one."""
    case = data.draw(prompts(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=2)))
    running = Prompting(subject, case)
    first = running.step(case.whole[:1])[0]
    kept = first.copy()
    second = running.step(case.whole[1:])[0].copy()
    assert first.tobytes() == kept.tobytes(), "a later step has changed an earlier result"
    first[...] = np.nan
    assert running.step(case.whole[1:])[0].tobytes() == second.tobytes()


@holds("BCK-5", "backend", tier="models")
def inputs_and_weights_are_never_written(subject: Subject, data: st.DataObject) -> None:
    """Not one byte of the step's arrays or of the weights as stored has changed; read-only ones will do."""
    case = data.draw(prompts())
    stored = {role: tensor.data.tobytes() for role, tensor in case.model.weights.items()}
    batch = case.batch(case.whole)
    arrays = input_arrays(batch)
    given = {name: array.tobytes() for name, array in arrays.items()}
    writeable = data.draw(st.booleans())
    for array in arrays.values():
        array.flags.writeable = writeable
    Prompting(subject, case).executable.run(batch)
    for name, array in arrays.items():
        assert array.tobytes() == given[name], f"{name} has been written"
    for role, tensor in case.model.weights.items():
        assert tensor.data.tobytes() == stored[role], f"{role} has been written"


@holds("BCK-6", "backend", tier="models")
def a_step_out_of_range_is_refused_and_changes_nothing(subject: Subject, data: st.DataObject) -> None:
    """A refused step would have overwritten a prompt; the prompt goes on as if nothing had been."""
    lengths = st.lists(st.integers(2, 12), min_size=2, max_size=2)
    case = data.draw(prompts(lengths=lengths))
    names = data.draw(st.lists(st.sampled_from(sorted(CORRUPTIONS)), min_size=4, max_size=4, unique=True))
    cut = data.draw(st.integers(1, len(case.token_ids[0]) - 1))
    begin, rest = Chunk(0, 0, cut), Chunk(0, cut, len(case.token_ids[0]))
    other = replace(case, token_ids=(tuple(reversed(case.token_ids[0])), *case.token_ids[1:]))

    running, undisturbed = Prompting(subject, case), Prompting(subject, case)
    for prompting in (running, undisturbed):
        prompting.step([begin])
    for name in names:
        wrong, error = _corrupt(name, other, data)
        try:
            running.executable.run(wrong)
        except error:
            pass
        except Exception as raised:
            told = f"{type(raised).__name__}, not {error.__name__}: {raised}"
            raise AssertionError(f"{name}: {told}") from raised
        else:
            raise AssertionError(f"{name} was not noticed")
    assert running.step([rest])[0].tobytes() == undisturbed.step([rest])[0].tobytes(), f"{names}: a trace"


@holds("BCK-7", "backend", tier="models")
def entries_that_no_query_needs_may_be_anything(subject: Subject, data: st.DataObject) -> None:
    """Table entries of blocks beyond the context, or left behind by the window, are replaced by nonsense."""
    case = data.draw(prompts(lengths=st.lists(st.integers(3, 20), min_size=1, max_size=2)))
    at = [data.draw(st.integers(1, len(ids) - 1)) for ids in case.token_ids]
    first = [Chunk(p, 0, cut) for p, cut in enumerate(at)]
    then = [Chunk(p, cut, cut + data.draw(st.integers(1, 2))) for p, cut in enumerate(at)]
    then = [replace(c, stop=min(c.stop, len(case.token_ids[c.prompt]))) for c in then]
    batch = case.batch(then)
    nonsense = st.sampled_from([-1, -(2**31), 2**31 - 1, case.num_blocks])
    tables = tuple(table.copy() for table in batch.block_tables)
    for table, group in zip(tables, case.model.spec.kv_groups, strict=True):
        for row, chunk in zip(table, then, strict=True):
            seen_from = 0 if group.window is None else max(0, chunk.start - group.window + 1)
            row[: seen_from // case.block_size] = data.draw(nonsense)
            row[-(-chunk.stop // case.block_size) :] = data.draw(nonsense)
    results = []
    for step in (batch, replace(batch, block_tables=tables)):
        running = Prompting(subject, case)
        running.step(first)
        results.append(running.executable.run(step).tobytes())
    assert results[0] == results[1]


@holds("BCK-8", "backend", tier="models")
def steps_of_any_size_up_to_the_plans(subject: Subject, data: st.DataObject) -> None:
    """A step of exactly the plan's size runs, as does a smaller one; a larger one is refused."""
    case = data.draw(prompts(lengths=st.lists(st.integers(2, 14), min_size=1, max_size=3)))
    planned = Prompting(subject, case, tokens=case.tokens)
    exact = np.concatenate(planned.step(case.whole))
    larger = Prompting(subject, case, tokens=case.tokens + data.draw(st.integers(1, 40)))
    assert np.concatenate(larger.step(case.whole)).tobytes() == exact.tobytes()
    smaller = Prompting(subject, case, tokens=case.tokens - 1)
    try:
        smaller.step(case.whole)
    except RequestError:
        return
    raise AssertionError(f"{case.tokens} tokens ran in a plan for {case.tokens - 1}")


@holds("BCK-9", "backend", level="L2", tier="models")
def backends_started_apart_give_the_same_bits(subject: Subject, data: st.DataObject) -> None:
    """The same steps on two backends, and once more on one of them."""
    case = data.draw(prompts())
    first, second = Prompting(subject, case), Prompting(subject, case)
    results = [np.concatenate(running.step(case.whole)).tobytes() for running in (first, second, first)]
    assert len(set(results)) == 1


@holds("BCK-9", "backend", level="L2", tier="models")
def what_was_computed_before_leaves_no_trace(subject: Subject, data: st.DataObject) -> None:
    """Arena and cache are full of another prompt's numbers, or fresh: it makes no difference."""
    lengths = st.tuples(st.integers(1, 20), st.integers(1, 14)).map(list)
    case = data.draw(prompts(lengths=lengths))
    running, fresh = Prompting(subject, case), Prompting(subject, case)
    other = replace(case, token_ids=tuple(reversed(case.token_ids)), order=case.order + 1)
    running.executable.run(other.batch(other.whole))
    assert running.step(case.whole[1:])[0].tobytes() == fresh.step(case.whole[1:])[0].tobytes()


@holds("BCK-10", "backend", tier="models")
def logits_are_those_of_the_naive_model(subject: Subject, data: st.DataObject) -> None:
    """Against a float64 forward pass over whole prompts, within twice the deviation that rounding makes."""
    case = data.draw(prompts())
    results = Prompting(subject, case).step(case.whole)
    unit = subject.unit_roundoff / UNIT_ROUNDOFF["float32"]
    for ids, logits in zip(case.token_ids, results, strict=True):
        _, float32 = deviation(case.model, ids, range(len(ids)), decoded_weights(case.model))
        check_bound(logits, naive_logits(case.model, ids), 2 * unit * float32[:, None])


@holds("BCK-11", "backend", level="L3", tier="models")
def logits_do_not_depend_on_the_schedule(subject: Subject, data: st.DataObject) -> None:
    """A prompt alone in one step, or in pieces with another prompt's pieces beside them: the same bits."""
    long = st.sampled_from([1, 2, 3, 7, 8, 9, 17, 33, 197])
    case = data.draw(prompts(lengths=st.tuples(long, st.integers(1, 9)).map(list)))
    alone = Prompting(subject, case).step(case.whole[:1])[0]

    moved = replace(case, order=case.order + 1)
    running = Prompting(subject, moved)
    pieces = []
    for prompt, ids in enumerate(case.token_ids):
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=4)) - {len(ids)})
        ends = [0, *cuts, len(ids)]
        pieces.append([Chunk(prompt, start, stop) for start, stop in pairwise(ends)])
    parts = []
    while pieces[0]:
        step: list[Chunk] = [pieces[0].pop(0)]
        if pieces[1] and (place := data.draw(st.sampled_from([None, 0, 1]))) is not None:
            step.insert(place, pieces[1].pop(0))
        logits = running.step(step)
        parts.append(next(part for part, chunk in zip(logits, step, strict=True) if chunk.prompt == 0))
    assert np.concatenate(parts).tobytes() == alone.tobytes()


@holds("BCK-12", "backend", level="M", tier="models")
def memory_is_what_was_planned(subject: Subject, data: st.DataObject) -> None:
    """Arena and KV cache grow by the plan's and the committed segments' bytes, and by nothing in steps."""
    case = data.draw(prompts())
    backend, program = subject.start(), case.model.program
    layout = case.layout(subject.policy)
    before = _check_memory(backend.memory())
    cache = backend.create_cache(layout)
    assert _check_memory(backend.memory()).kv_cache == before.kv_cache
    commit_all(cache, layout)
    with_cache = _check_memory(backend.memory())
    assert with_cache.kv_cache - before.kv_cache == layout.nbytes
    plan = _plan(subject, backend, program, case.tokens, layout)
    weights = backend.upload(case.model.weights, subject.policy)
    executable = backend.compile(
        program, subject.policy, plan, weights, layout, cache, fallback=subject.fallback
    )
    for _ in range(2):
        now = _check_memory(backend.memory())
        assert now.arena - before.arena == plan.arena_bytes
        assert now.kv_cache == with_cache.kv_cache
        executable.run(case.batch(case.whole))


@holds("BCK-13", "registry")
def errors_about_backends_have_four_parts(subject: Subject, data: st.DataObject) -> None:
    """Unknown, not installed, or failed to start: its name, what is available, why, and how to mend it."""
    name = data.draw(st.text("abcdefgh-", min_size=1, max_size=9)) + "-suspect"
    cause = data.draw(st.text("ijklmnop ", min_size=1, max_size=20).map(lambda t: f"cause {t}".strip()))
    kind = data.draw(st.sampled_from([UnknownBackendError, BackendNotInstalledError, BackendFailedError]))
    probe = cause if kind is BackendNotInstalledError else None
    info = BackendInfo("a suspect", f"pip install {name}", lambda: probe, 9)

    def start() -> None:
        raise OSError(cause)

    points = {registry.BACKENDS: _EntryPoint(name, start), registry.INFOS: _EntryPoint(name, info)}

    def with_suspect(group: str) -> EntryPoints:
        added = [] if kind is UnknownBackendError else [points[group]]
        return EntryPoints([*entry_points(group=group), *added])

    with patch.object(registry, "entry_points", with_suspect):
        try:
            subject.load(name)
        except BackendError as error:
            assert type(error) is kind, f"{type(error).__name__}, not {kind.__name__}"
            assert name in error.state
            assert "numpy" in error.available
            assert error.why if kind is UnknownBackendError else cause in error.why
            assert "--backend" in error.mend if kind is UnknownBackendError else info.install in error.mend
            assert all(part in str(error) for part in (error.state, error.available, error.why, error.mend))
        else:
            raise AssertionError("a backend was loaded that cannot be")


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
        use = _check_memory(running.backend.memory())
        assert (use.weights, use.mapped) == (plan.held, plan.mapped + plan.streamed)


def _plan(subject: Subject, backend: Backend, program: Program, tokens: int, layout: KVLayout) -> MemoryPlan:
    """The plan for steps of so many tokens, the backend's working memory included."""
    policy, sizes = subject.policy, {"T": tokens, "S": tokens, "R": tokens, "P": layout.block_size}
    return subject.plan(program, policy, sizes, lambda i, s: backend.workspace(i, s, policy))


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


class _EntryPoint(EntryPoint):
    """An entry point whose object is at hand."""

    def __init__(self, name: str, target: object) -> None:
        super().__init__(name, "suspect:object", "suspect")
        vars(self)["target"] = target

    def load(self) -> Any:
        return vars(self)["target"]


@cache
def _imports(path: str) -> frozenset[str]:
    """Modules of refengine that a source file imports: ``refengine.ops.norm`` is ``ops``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(name.split(".")[1] for name in names if name.startswith("refengine."))


def _check_memory(use: Any) -> Any:
    parts = [getattr(use, field.name) for field in fields(use)]
    assert all(isinstance(part, int) and part >= 0 for part in parts), use
    assert use.total == sum(parts)
    return use


def _corrupt(name: str, case: Prompts, data: st.DataObject) -> tuple[StepBatch, type[Exception]]:
    """A step for whole prompts, with one thing out of range, and the error it deserves."""
    batch = case.batch(case.whole)
    arrays = {key: array.copy() for key, array in input_arrays(batch).items()}
    CORRUPTIONS[name](arrays, case, lambda n: data.draw(st.integers(0, n - 1)))
    groups = range(len(batch.slot_mapping))
    wrong = StepBatch(
        **{field.name: arrays[field.name] for field in fields(StepInputs) if field.name in arrays},
        slot_mapping=tuple(arrays[f"slot_mapping.{g}"] for g in groups if f"slot_mapping.{g}" in arrays),
        block_tables=tuple(arrays[f"block_tables.{g}"] for g in groups),
    )
    return wrong, TokenIdError if name.startswith("token id") else RequestError


Arrays = dict[str, Any]
Pick = Callable[[int], int]
"""Draws one of ``0 … n - 1``."""


def _put(array: str, value: Callable[[Prompts], int]) -> Callable[[Arrays, Prompts, Pick], None]:
    """Replace any one element."""

    def corrupt(arrays: Arrays, case: Prompts, pick: Pick) -> None:
        arrays[array][pick(len(arrays[array]))] = value(case)

    return corrupt


def _table(value: Callable[[Prompts], int]) -> Callable[[Arrays, Prompts, Pick], None]:
    """Replace the table entry of a sequence's last block, which its last query needs."""

    def corrupt(arrays: Arrays, case: Prompts, pick: Pick) -> None:
        sequence = pick(len(case.token_ids))
        last = (len(case.token_ids[sequence]) - 1) // case.block_size
        arrays[f"block_tables.{pick(len(case.model.spec.kv_groups))}"][sequence, last] = value(case)

    return corrupt


def _edit(array: str, function: Callable[[Any], Any]) -> Callable[[Arrays, Prompts, Pick], None]:
    """Replace a whole array."""

    def corrupt(arrays: Arrays, case: Prompts, pick: Pick) -> None:
        arrays[array] = function(arrays[array])

    return corrupt


CORRUPTIONS: dict[str, Callable[[Arrays, Prompts, Pick], None]] = {
    "token id of -1": _put("token_ids", lambda case: -1),
    "token id of V": _put("token_ids", lambda case: case.model.spec.vocabulary_size),
    "position too far": _put("positions", lambda case: 10**6),
    "positions missing": _edit("positions", lambda a: a[:-1]),
    "logit row of -1": _put("logit_rows", lambda case: -1),
    "logit row of T": _put("logit_rows", lambda case: case.tokens),
    "slot of -1": _put("slot_mapping.0", lambda case: -1),
    "slot beyond the pool": _put("slot_mapping.0", lambda case: case.num_blocks * case.block_size),
    "slots missing": _edit("slot_mapping.0", lambda a: a[:-1]),
    "group missing": lambda arrays, case, pick: arrays.__delitem__("slot_mapping.0"),
    "block of -1": _table(lambda case: -1),
    "block beyond the pool": _table(lambda case: case.num_blocks),
    "table missing": _edit("block_tables.0", lambda a: a[:-1]),
    "tables too narrow": _edit("block_tables.0", lambda a: a[:, :0]),
    "start beyond the end": _edit("query_starts", lambda a: a + 1),
    "starts descending": _edit("query_starts", lambda a: a[::-1]),
    "start missing": _edit("query_starts", lambda a: a[:-1]),
    "context shorter than the step": _put("context_lens", lambda case: 0),
    "nothing to do": lambda arrays, case, pick: arrays.update({k: a[:0] for k, a in arrays.items()}),
}
"""What may be wrong with a step."""
