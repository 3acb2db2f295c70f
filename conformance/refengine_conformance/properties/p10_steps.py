"""Chapter *Backends*: steps, and what they give."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from refengine.errors import RequestError
from refengine.program import input_arrays
from refengine_conformance.backend_prompts import prompts
from refengine_conformance.bounds import check_bound
from refengine_conformance.naive_model import naive_logits
from refengine_conformance.prompts import Chunk, Prompting
from refengine_conformance.registry import holds
from refengine_conformance.rounding import UNIT_ROUNDOFF, decoded_weights, deviation
from refengine_conformance.step_corruptions import CORRUPTIONS, corrupted
from refengine_conformance.subject import Subject


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
        wrong, error = corrupted(name, other, data)
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
