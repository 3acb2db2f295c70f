"""Chapter *Attention*."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.ops import FloatArray
from refengine_conformance.bits import check_bits
from refengine_conformance.bounds import check_bound
from refengine_conformance.registry import holds
from refengine_conformance.sequences import LENGTHS, Attending, Piece, Sequences, cuts, sequences
from refengine_conformance.subject import Subject

ONE = st.lists(st.integers(1, 14), min_size=1, max_size=1)
"""The length of one sequence."""

WIDE = st.sampled_from([(2, 1, 16), (4, 2, 24), (3, 3, 16)])
"""Heads with more elements than ``ONE`` has positions."""

LONG = st.sampled_from([[14], [9, 13, 2], [140], [200, 3], [5, 270]])
"""Lengths on both sides of the tiles that kernels cut contexts into."""

GARBAGE = st.sampled_from([-1, -(2**31), 2**31 - 1, 10**6])
"""Numbers that are no block's."""


@holds("ATT-1", "attention")
def a_query_weighs_its_own_and_earlier_positions_only(subject: Subject, data: st.DataObject) -> None:
    """Value ``j`` is the ``j``-th unit vector, so that the results are the weights."""
    case = _telling(data.draw(sequences(ONE, WIDE, window=st.none())))
    (weights,) = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for position, weight in enumerate(weights):
        assert (weight[:, : position + 1] > 0).all()
        assert (weight[:, position + 1 :] == 0).all()


@holds("ATT-1", "attention")
def what_comes_later_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Other keys and values after a position, and the results up to it are the same."""
    case = data.draw(sequences(ONE))
    position = data.draw(st.integers(0, case.lengths[0] - 1))
    later = slice(position + 1, None)
    (y,) = Attending(subject, case).step(case.whole)
    (z,) = Attending(subject, _other(case, later, data)).step(case.whole)
    check_bits(z[: position + 1], y[: position + 1])


@holds("ATT-2", "attention")
def a_window_shows_as_many_positions_as_it_is_wide(subject: Subject, data: st.DataObject) -> None:
    """The results are the weights; widths are one, some, all but one, all, and more than there are."""
    case = _telling(data.draw(sequences(ONE, WIDE)))
    length = case.lengths[0]
    window = data.draw(st.sampled_from([1, 2, 5, max(1, length - 1), length, length + 1, 1000]))
    case = replace(case, window=window)
    (weights,) = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for position, weight in enumerate(weights):
        seen = [position - window < j <= position for j in range(case.q.shape[2])]
        assert (weight[:, seen] > 0).all()
        assert (weight[:, np.logical_not(seen)] == 0).all()


@holds("ATT-2", "attention")
def what_a_window_has_passed_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Other keys and values before a window, and the results of the queries after it are the same."""
    case = data.draw(sequences(ONE, window=st.integers(1, 6)))
    position = data.draw(st.integers(0, case.lengths[0] - 1))
    (y,) = Attending(subject, case).step(case.whole)
    (z,) = Attending(subject, _other(case, slice(case.first_seen(position)), data)).step(case.whole)
    check_bits(z[position:], y[position:])


@holds("ATT-3", "attention")
def a_lone_token_gets_the_value_of_its_heads_group(subject: Subject, data: st.DataObject) -> None:
    """With one position to see, the result of query head ``h`` is the value of key head ``h // (H / G)``."""
    case = data.draw(sequences(st.lists(st.just(1), min_size=1, max_size=4)))
    query_heads, kv_heads = case.q.shape[1], case.k.shape[1]
    for row, (y,) in enumerate(Attending(subject, case).step(case.whole)):
        for head in range(query_heads):
            check_bits(y[head], case.v[row, head // (query_heads // kv_heads)].astype(y.dtype))


@holds("ATT-3", "attention")
def a_query_head_reads_one_key_head(subject: Subject, data: st.DataObject) -> None:
    """Other keys, or other values, in one key head change the results of its query heads, and no others."""
    case = data.draw(sequences(st.just([7]), window=st.none()))
    query_heads, kv_heads = case.q.shape[1], case.k.shape[1]
    changed = data.draw(st.integers(0, kv_heads - 1))
    name = data.draw(st.sampled_from("kv"))
    array = getattr(case, name).copy()
    array[:, changed] *= -2
    (y,) = Attending(subject, case).step(case.whole)
    (z,) = Attending(subject, replace(case, **{name: array})).step(case.whole)
    for head in range(query_heads):
        if head // (query_heads // kv_heads) == changed:
            assert not np.array_equal(y[:, head], z[:, head])
        else:
            check_bits(z[:, head], y[:, head])


@holds("ATT-4", "attention")
def the_result_is_the_softmax_mean_of_the_values(subject: Subject, data: st.DataObject) -> None:
    """Against a loop over positions and heads, for ragged batches cut into any steps."""
    case = data.draw(sequences(softcap=st.none()))
    _check_values(subject, case, data)


@holds("ATT-5", "attention")
def the_cap_bends_the_scaled_scores(subject: Subject, data: st.DataObject) -> None:
    """Against the same loop; caps below and above the scores."""
    case = data.draw(sequences(softcap=st.sampled_from([0.25, 2.0, 30.0])))
    _check_values(subject, case, data)


@holds("ATT-5", "attention")
def a_hidden_score_is_not_capped(subject: Subject, data: st.DataObject) -> None:
    """However low the cap, a hidden position has no weight."""
    case = _telling(data.draw(sequences(ONE, WIDE, softcap=st.sampled_from([0.125, 1.0, 8.0]))))
    (weights,) = Attending(subject, case).step(case.whole)
    for position, weight in enumerate(weights):
        assert (weight[:, position + 1 :] == 0).all()
        assert (weight[:, : case.first_seen(position)] == 0).all()


@holds("ATT-6", "kv_write", "attention")
def what_is_written_is_read_back(subject: Subject, data: st.DataObject) -> None:
    """Each query points at one position of its sequence: it gets what was written there, bit by bit."""
    lengths = st.lists(st.integers(1, 14), min_size=1, max_size=3)
    case = data.draw(sequences(lengths, WIDE, window=st.none(), softcap=st.none()))
    case, targets = pointing(case, data)
    tables = case.tables(data.draw(st.permutations(range(case.num_blocks))))
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)), tables)
    for y, target, values in zip(results, targets, _values(subject, case), strict=True):
        check_bits(y, values[target])


@holds("ATT-6", "kv_write", "attention")
def a_slot_holds_what_was_written_last(subject: Subject, data: st.DataObject) -> None:
    """Blocks that pass from one sequence to another hold what the second writes."""
    case = data.draw(sequences(st.just([9, 9]), WIDE, window=st.none(), softcap=st.none()))
    case, targets = pointing(case, data)
    first, second = data.draw(cuts(case.lengths))
    tables = [case.tables()[0]] * 2
    attending = Attending(subject, case)
    for pieces, target, values in zip((first, second), targets, _values(subject, case), strict=True):
        (y,) = attending.steps([pieces], tables)
        check_bits(y, values[target])


BEYOND_FLOAT16 = st.sampled_from([65520.0, -65520.0, -1e6, 3e38])


@holds("ATT-6", "kv_write", "attention")
def a_narrower_cache_rounds_and_tells_what_it_cannot_hold(subject: Subject, data: st.DataObject) -> None:
    """Float16, to nearest; a value beyond it spoils every query that sees it, and no other."""
    case = data.draw(sequences(LENGTHS, WIDE, window=st.none(), softcap=st.none()))
    case, targets = pointing(case, data)
    lost, v = data.draw(st.integers(0, len(case.v) - 1)), case.v.copy()
    v[lost] = data.draw(BEYOND_FLOAT16)
    case = replace(case, v=v, dtype=np.dtype(np.float16))
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    with np.errstate(over="ignore"):
        rounded = [values.astype(np.float16).astype(values.dtype) for values in _values(subject, case)]
    for sequence, (y, target) in enumerate(zip(results, targets, strict=True)):
        place = lost - case.starts[sequence]
        first = place if 0 <= place < len(y) else len(y)
        assert not np.isfinite(y[first:]).any()
        check_bits(y[:first], rounded[sequence][target[:first]])


@holds("ATT-6", "kv_write", "attention")
def a_key_that_cannot_be_held_is_not_lost(subject: Subject, data: st.DataObject) -> None:
    """Queries for which it would weigh nothing, were it infinite, get no finite result either."""
    case = data.draw(sequences(LENGTHS, WIDE, window=st.none(), softcap=st.none()))
    lost, k = data.draw(st.integers(0, len(case.k) - 1)), np.zeros_like(case.k)
    k[lost] = -abs(data.draw(BEYOND_FLOAT16))
    case = replace(case, q=np.ones_like(case.q), k=k, dtype=np.dtype(np.float16))
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for sequence, y in enumerate(results):
        place = lost - case.starts[sequence]
        first = place if 0 <= place < len(y) else len(y)
        assert not np.isfinite(y[first:]).any()
        assert np.isfinite(y[:first]).all()


@holds("ATT-7", "kv_write", "attention")
def a_step_reads_what_it_writes(subject: Subject, data: st.DataObject) -> None:
    """Every query points at its own position, whose slot held another sequence's token before."""
    case = data.draw(sequences(st.just([9, 9]), WIDE, softcap=st.none()))
    case, _ = pointing(case, data, own=True)
    attending = Attending(subject, case)
    attending.step([Piece(0, 0, 9)])
    (y,) = attending.steps(data.draw(cuts(case.lengths))[1:], [case.tables()[0]] * 2)
    check_bits(y, _values(subject, case)[1])


@holds("ATT-8", "attention", "kv_write", level="L3")
def where_blocks_lie_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """One cache, the same sequences first through one set of tables, then through another."""
    case = data.draw(sequences())
    cut = data.draw(cuts(case.lengths))
    attending = Attending(subject, case)
    first = attending.steps(cut)
    second = attending.steps(cut, case.tables(data.draw(st.permutations(range(case.num_blocks)))))
    _check_each(second, first)


@holds("ATT-9", "attention", "kv_write", level="L3")
def company_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Each sequence alone, and all in one step in any order."""
    case = data.draw(sequences(st.lists(st.integers(1, 14), min_size=2, max_size=4)))
    order = data.draw(st.permutations(range(len(case.lengths))))
    together = Attending(subject, case).step([case.whole[s] for s in order])
    alone = Attending(subject, case)
    for sequence, y in zip(order, together, strict=True):
        check_bits(y, alone.step([case.whole[sequence]])[0])


@holds("ATT-9", "attention", "kv_write", level="L3")
def decoding_beside_a_prompt_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """A step of one token beside a step of many, and beside none."""
    case = data.draw(sequences(st.tuples(st.integers(2, 14), st.integers(2, 40)).map(list)))
    last = case.lengths[0] - 1
    attending = Attending(subject, case)
    attending.step([Piece(0, 0, last)])
    (alone,) = attending.step([Piece(0, last, last + 1)])
    beside, _ = attending.step([Piece(0, last, last + 1), case.whole[1]])
    _, behind = attending.step([case.whole[1], Piece(0, last, last + 1)])
    check_bits(beside, alone)
    check_bits(behind, alone)


@holds("ATT-10", "attention", "kv_write", level="L3")
def cutting_into_steps_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """In one step, and in as many as one likes."""
    case = data.draw(sequences(LONG, window=st.sampled_from([None, 5, 150, 1000])))
    whole = Attending(subject, case).step(case.whole)
    pieces = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    _check_each(pieces, whole)


@holds("ATT-10", "attention", "kv_write", level="L3")
def generating_token_by_token_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Queries that follow each other, each in a step of its own."""
    case = data.draw(sequences(ONE))
    whole = Attending(subject, case).step(case.whole)
    single = [[Piece(0, p, p + 1) for p in range(case.lengths[0])]]
    _check_each(Attending(subject, case).steps(single), whole)


@holds("ATT-11", "attention", "kv_write")
def memory_that_is_not_seen_may_hold_anything(subject: Subject, data: st.DataObject) -> None:
    """Every slot of the pool holds NaN or infinity before the sequences are written."""
    case, spoiler = _with_spoiler(data.draw(sequences()), data)
    cut = data.draw(cuts(case.lengths))[:spoiler]
    tables = case.tables(data.draw(st.permutations(range(case.num_blocks))))
    clean, spoilt = _filled_pools(subject, case, spoiler)
    _check_each(spoilt.steps(cut, tables), clean.steps(cut, tables))


@holds("ATT-11", "attention", "kv_write")
def released_blocks_may_hold_anything(subject: Subject, data: st.DataObject) -> None:
    """Another sequence gets the blocks that the window has passed, and fills them with NaN or infinity."""
    case = data.draw(sequences(ONE, window=st.integers(1, 6)))
    case, spoiler = _with_spoiler(case, data)
    (table,) = case.tables()[:spoiler]
    (clean, spoilt), results = _filled_pools(subject, case, spoiler), []
    pieces = data.draw(cuts(case.lengths))[0]
    for piece in pieces:
        spoilt.spoil(spoiler, table[: case.first_seen(piece.start) // case.block_size])
        results += spoilt.step([piece])
    check_bits(np.concatenate(results), clean.steps([pieces])[0])


@holds("ATT-12", "attention")
def table_entries_that_are_not_seen_may_be_anything(subject: Subject, data: st.DataObject) -> None:
    """Before the first query's window and behind the context's end: numbers of no block, in a spoilt pool."""
    case = data.draw(sequences(ONE, window=st.sampled_from([None, 1, 2, 5])))
    case, spoiler = _with_spoiler(case, data)
    table = case.tables(data.draw(st.permutations(range(case.num_blocks))))[0]
    pieces = data.draw(cuts(case.lengths))[0]
    (clean, spoilt), results = _filled_pools(subject, case, spoiler), []
    for piece in pieces:
        first = case.first_seen(piece.start) // case.block_size
        end = -(-piece.stop // case.block_size)
        garbage = data.draw(st.lists(GARBAGE, min_size=len(table) + 2, max_size=len(table) + 2))
        results += spoilt.step([piece], [garbage[:first] + table[first:end] + garbage[end:]])
    check_bits(np.concatenate(results), clean.steps([pieces], [table])[0])


@holds("ATT-13", "attention")
def a_value_that_is_not_finite_spoils_who_sees_it(subject: Subject, data: st.DataObject) -> None:
    """One token is NaN or infinite: who sees the NaN gets NaN, and who sees neither the same bits."""
    case = data.draw(sequences(ONE))
    position = data.draw(st.integers(0, case.lengths[0] - 1))
    spoilt = replace(case, damaged=(position,), damage=data.draw(st.sampled_from([math.nan, math.inf])))
    cut = data.draw(cuts(case.lengths))
    (y,) = Attending(subject, case).steps(cut)
    (z,) = Attending(subject, spoilt).steps(cut)
    for query in range(case.lengths[0]):
        if not case.first_seen(query) <= position <= query:
            check_bits(z[query], y[query])
        elif math.isnan(spoilt.damage):
            assert np.isnan(z[query]).all()


@holds("ATT-14", "attention")
def scores_of_any_size_are_weighed(subject: Subject, data: st.DataObject) -> None:
    """The one score that is far above the others wins: high above zero, or all of them far below it."""
    case = data.draw(sequences(ONE, WIDE, window=st.none(), softcap=st.none()))
    case, targets = pointing(case, data)
    depth = np.float32(data.draw(st.sampled_from([0, 1, 50])))
    case = replace(case, k=case.k - depth, scale=data.draw(st.sampled_from([1.0, 1e6])))
    (y,) = Attending(subject, case).step(case.whole)
    check_bits(y, _values(subject, case)[0][targets[0]])


def _check_each(results: list[FloatArray], expected: list[FloatArray]) -> None:
    for result, e in zip(results, expected, strict=True):
        check_bits(result, e)


def _telling(case: Sequences) -> Sequences:
    """The same with unit vectors for values: the results of one sequence are its weights."""
    v = np.zeros_like(case.v)
    for position in range(len(v)):
        v[position, :, position] = 1
    return replace(case, v=v)


def pointing(case: Sequences, data: st.DataObject, *, own: bool = False) -> tuple[Sequences, list[list[int]]]:
    """The same with queries that point at one position each, and these.

    Key ``j`` is the ``j``-th unit vector and a query 1024 times one of them: of the weights, 1 and
    ``exp(-1024)``, the second is zero in every precision.
    """
    q, k = np.zeros_like(case.q), np.zeros_like(case.k)
    targets = []
    for sequence, length in enumerate(case.lengths):
        drawn = [position if own else data.draw(st.integers(0, position)) for position in range(length)]
        for position, target in enumerate(drawn):
            row = case.starts[sequence] + position
            k[row, :, position] = 1
            q[row, :, target] = 1024
        targets.append(drawn)
    return replace(case, q=q, k=k, scale=1.0), targets


def _values(subject: Subject, case: Sequences) -> list[FloatArray]:
    """The values of each sequence, one per query head."""
    group = case.q.shape[1] // case.v.shape[1]
    v = np.repeat(case.v, group, axis=1).astype(subject.policy.activations)
    return [v[case.rows(s)] for s in range(len(case.lengths))]


def _other(case: Sequences, rows: slice, data: st.DataObject) -> Sequences:
    """The same with other keys and values in some rows."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    k, v = case.k.copy(), case.v.copy()
    for array in (k, v):
        array[rows] = rng.standard_normal(array[rows].shape) * 10
    return replace(case, k=k, v=v)


def _with_spoiler(case: Sequences, data: st.DataObject) -> tuple[Sequences, int]:
    """The same and one more sequence, a block of keys and values that are not finite; its number."""
    q, k, v = (
        np.concatenate([a, np.ones((case.block_size, *a.shape[1:]), a.dtype)])
        for a in (case.q, case.k, case.v)
    )
    damaged = tuple(range(len(case.q), len(q)))
    damage = data.draw(st.sampled_from([math.nan, math.inf]))
    lengths = (*case.lengths, case.block_size)
    return replace(case, lengths=lengths, q=q, k=k, v=v, damaged=damaged, damage=damage), len(case.lengths)


def _filled_pools(subject: Subject, case: Sequences, spoiler: int) -> tuple[Attending, Attending]:
    """Two caches: every slot of one holds ones, of the other what is not finite."""
    pools = Attending(subject, replace(case, damaged=())), Attending(subject, case)
    for pool in pools:
        pool.spoil(spoiler, range(case.num_blocks))
    return pools


def _check_values(subject: Subject, case: Sequences, data: st.DataObject) -> None:
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for sequence, y in enumerate(results):
        expected, bound = softmax_means(case, sequence, subject.unit_roundoff + 2.0**-53)
        check_bound(y, expected, bound)


def softmax_means(
    case: Sequences,
    sequence: int,
    u: float,
    read: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The attention of one sequence in float64, and the bound of ATT-4 and ATT-5.

    The loop is itself such a computation, with the unit roundoff 2⁻⁵³, which ``u`` includes.

    Args:
        case: the sequences.
        sequence: which of them.
        u: unit roundoff of the result's arithmetic, and of the loop's.
        read: the keys and the values that each query reads, ``[N, N, G, D]``, where these are not what the
            tokens have.
    """
    q, k, v = (a[case.rows(sequence)].astype(np.float64) for a in case.arrays)
    (length, heads, size), group = q.shape, q.shape[1] // k.shape[1]
    y, bound = np.zeros(q.shape), np.zeros(q.shape)
    for p in range(length):
        seen = slice(case.first_seen(p), p + 1)
        keys_read, values_read = (k, v) if read is None else (read[0][p], read[1][p])
        for h in range(heads):
            keys, values = keys_read[seen, h // group], values_read[seen, h // group]
            score = case.scale * (keys @ q[p, h])
            slip = (size + 2) * u * case.scale * (np.abs(keys) @ np.abs(q[p, h]))
            if case.softcap is not None:
                score = case.softcap * np.tanh(score / case.softcap)
                slip += 12 * u * np.abs(score)
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            y[p, h] = weight @ values
            relative = 2 * slip.max() + (8 * np.ptp(score) + 20 * len(score) + 10) * u
            bound[p, h] = math.expm1(relative) * (weight @ np.abs(values))
    return y, bound
