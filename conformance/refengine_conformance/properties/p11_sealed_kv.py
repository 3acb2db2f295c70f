"""Chapter *Sealed keys and values*."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refengine.errors import UnsupportedError
from refengine.memory import SealedFormat
from refengine.ops import FloatArray
from refengine.ops.scratch import Scratch
from refengine.program import kv_formats
from refengine_conformance.bits import check_bits
from refengine_conformance.bounds import check_bound
from refengine_conformance.naive_model import Sealing, naive_logits
from refengine_conformance.naive_sealing import block_bytes, open_block
from refengine_conformance.prompts import Chunk, Prompting, Prompts
from refengine_conformance.properties.p05_attention import ONE, WIDE, pointing, softmax_means
from refengine_conformance.registry import holds
from refengine_conformance.rounding import decoded_weights, sealed_deviation
from refengine_conformance.sequences import (
    CAPS,
    HEADS,
    LENGTHS,
    WINDOWS,
    Attending,
    Sequences,
    cuts,
    sequences,
)
from refengine_conformance.subject import KVPart, Subject
from refengine_conformance.tiny_model import tiny_model

PARTS: st.SearchStrategy[KVPart] = st.sampled_from(["keys", "values"])

INTEGERS = st.sampled_from(["int8", "int4"])

FLOATS = st.sampled_from(["float16", "float32"])

FORMATS = st.sampled_from(["int8", "int4", "float16", "float32"])

SEALED = st.tuples(FORMATS, FORMATS)

BLOCKS = st.sampled_from([1, 3, 4])
"""Positions per block, few enough for short sequences to fill some."""

LONG = st.sampled_from([[14], [9, 13, 2], [140], [200, 3], [5, 270]])
"""Lengths on both sides of the tiles that kernels cut contexts into."""

GARBAGE = st.sampled_from([-1, -(2**31), 2**31 - 1, 10**6])
"""Numbers that are no block's."""


@st.composite
def blocks(draw: st.DrawFn) -> FloatArray:
    """Numbers of a block ``[P, G, D]``: channels of any size, to one side of zero, equal, and on the edge."""
    positions, heads = draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from([1, 2]))
    size = draw(st.sampled_from([1, 5, 8, 33, 80]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((positions, heads, size)) * 10.0 ** rng.integers(-7, 4, (heads, size))
    x += rng.standard_normal((heads, size)) * draw(st.sampled_from([0, 1, 300]))
    if draw(st.booleans()):  # quotients in the middle of two codes
        x = np.round(x * 4) / 8
    for special in draw(st.lists(st.sampled_from([0.0, -0.0, 1e-45, 65519.0, 1e6]), max_size=2)):
        x.flat[rng.integers(0, x.size)] = special
    return x.astype(np.float32)


@st.composite
def sealed_sequences(
    draw: st.DrawFn,
    lengths: st.SearchStrategy[list[int]] = LENGTHS,
    heads: st.SearchStrategy[tuple[int, int, int]] = HEADS,
    window: st.SearchStrategy[int | None] = WINDOWS,
    softcap: st.SearchStrategy[float | None] = CAPS,
) -> Sequences:
    """Sequences over a sealed cache."""
    case = draw(sequences(lengths, heads, window, softcap))
    return replace(case, sealed=draw(SEALED), block_size=draw(BLOCKS))


@holds("SKV-1", "kv_format")
def floats_are_rounded_once(subject: Subject, data: st.DataObject) -> None:
    """Against NumPy's conversion, with NaN where that gives infinity."""
    part, name, x = data.draw(PARTS), data.draw(FLOATS), data.draw(blocks())
    x = x.astype(data.draw(st.sampled_from([np.float32, np.float64])))
    x.flat[0] = data.draw(st.sampled_from([0.5, 65519.9, 65520.0, -7e4, math.inf, 1e-8]))
    form = subject.kv_format(part, name)
    check_bits(_opened(form, _sealed(form, x), x.shape, np.dtype(np.float64)), open_block(part, name, x))


@holds("SKV-2", "kv_format")
def a_block_lies_as_the_table_says(subject: Subject, data: st.DataObject) -> None:
    """Its bytes, every one, against a loop over numbers; and their number."""
    part, name, x = data.draw(PARTS), data.draw(FORMATS), data.draw(blocks())
    form = subject.kv_format(part, name)
    expected = block_bytes(part, name, x)
    assert form.nbytes(*x.shape) == len(expected)
    if np.isfinite(open_block(part, name, x)).all():  # NaN has many forms
        assert _sealed(form, x).tobytes() == expected


@holds("SKV-3", "kv_format")
def any_bytes_open_by_the_formula(subject: Subject, data: st.DataObject) -> None:
    """Random steps, centres and codes of one key, in float32 and float64."""
    name = data.draw(INTEGERS)
    step, centre = data.draw(st.integers(0, 255)), data.draw(st.integers(-128, 127))
    half = 128 if name == "int8" else 8
    code, unit = data.draw(st.integers(-half, half - 1)), half // 8
    stored = np.array([[step, centre % 256, code % 256 if name == "int8" else code + 8]], np.uint8)
    d = math.nan if step == 255 else math.ldexp(8 + step % 8, step // 8 - 23)
    for part in ("keys", "values"):
        form = subject.kv_format(part, name)
        for dtype in (np.float32, np.float64):
            opened = _opened(form, stored, (1, 1, 1), np.dtype(dtype))
            check_bits(opened, np.full((1, 1, 1), d * (code + unit * centre), dtype))


@holds("SKV-4", "kv_format")
def the_least_step_and_the_nearest_codes_are_stored(subject: Subject, data: st.DataObject) -> None:
    """Against rational arithmetic; several blocks at once, in float32 and, rounded to it, in float64."""
    part, name, x = data.draw(PARTS), data.draw(INTEGERS), data.draw(blocks())
    if data.draw(st.booleans()):
        x.flat[data.draw(st.integers(0, x.size - 1))] = data.draw(
            st.sampled_from([math.nan, math.inf, 3e38, 6e5, 5e4])
        )
    wide = x.astype(np.float64) * (1 + 2.0**-26)  # rounds back
    form = subject.kv_format(part, name)
    expected = block_bytes(part, name, x)
    assert _sealed(form, x).tobytes() == expected
    assert _sealed(form, wide).tobytes() == expected
    both = np.zeros((2, len(expected)), np.uint8)
    form.seal(np.stack([x, -x]), both, Scratch())
    assert both[0].tobytes() == expected
    assert both[1].tobytes() == block_bytes(part, name, -x)


@holds("SKV-5", "kv_format")
def a_number_moves_by_half_a_step_at_most(subject: Subject, data: st.DataObject) -> None:
    """And the step is no larger than the range of its numbers asks for; zero does not move."""
    part, name, x = data.draw(PARTS), data.draw(INTEGERS), data.draw(blocks())
    codes, reach = (240, 2159) if name == "int8" else (15, 134)
    axis, size = (0, x.shape[0]) if part == "keys" else (2, 32)
    form = subject.kv_format(part, name)
    opened = _opened(form, _sealed(form, x), x.shape, np.dtype(np.float64))
    for start in range(0, x.shape[axis], size):
        group = np.take(x, range(start, min(start + size, x.shape[axis])), axis).astype(np.float64)
        read = np.take(opened, range(start, min(start + size, x.shape[axis])), axis)
        needed = np.maximum(np.ptp(group, axis) / codes, np.abs(group).max(axis) / reach)
        step = np.maximum(9 / 8 * needed, 2.0**-20)
        fits = step < 3000
        error = np.abs(read - group).max(axis)
        assert (error[fits] <= ((0.5 + 2.0**-15) * step)[fits]).all()
        assert (read[group == 0] == 0).all() or not fits.all()


@holds("SKV-6", "kv_seal")
def a_block_is_sealed_by_the_step_that_fills_it(subject: Subject, data: st.DataObject) -> None:
    """Exact copies are overwritten as soon as a step has filled their blocks, and nobody notices."""
    lengths = st.lists(st.integers(5, 14), min_size=1, max_size=2)
    case = data.draw(sealed_sequences(lengths, window=st.none()))
    cut = data.draw(cuts(case.lengths))
    clean, spoilt = Attending(subject, case), Attending(subject, case)
    for number in range(max(map(len, cut))):
        pieces = [pieces[number] for pieces in cut if number < len(pieces)]
        for y, z in zip(clean.step(pieces), spoilt.step(pieces), strict=True):
            check_bits(z, y)
        for piece in pieces:
            spoilt.overwrite_copies(piece.sequence, range(1, piece.stop // case.block_size))


@holds("SKV-7", "kv_seal", "sealed_attention")
def first_and_own_block_are_exact_and_others_sealed(subject: Subject, data: st.DataObject) -> None:
    """Each query points at one position: it gets what that is sealed to, or the number itself, bit by bit."""
    lengths = st.lists(st.integers(1, 14), min_size=1, max_size=3)
    case = data.draw(sealed_sequences(lengths, WIDE, st.none(), st.none()))
    case, targets = pointing(case, data)
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for sequence, (y, aims) in enumerate(zip(results, targets, strict=True)):
        _, values = _read(subject, case, sequence)
        repeated = np.repeat(values, case.q.shape[1] // case.k.shape[1], axis=2)
        check_bits(y, np.stack([repeated[p, aim] for p, aim in enumerate(aims)]).astype(y.dtype))


@holds("SKV-8", "kv_seal", "sealed_attention")
def attention_is_that_over_what_is_read(subject: Subject, data: st.DataObject) -> None:
    """Against a loop over positions and heads: windows, caps, shared heads, ragged batches, any steps."""
    case = data.draw(sealed_sequences())
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for sequence, y in enumerate(results):
        read = _read(subject, case, sequence)
        expected, bound = softmax_means(case, sequence, subject.unit_roundoff + 2.0**-53, read)
        check_bound(y, expected, bound)


@holds("SKV-9", "kv_seal", "sealed_attention", level="L3")
def cutting_into_steps_changes_no_bit(subject: Subject, data: st.DataObject) -> None:
    """In one step, and in as many as one likes."""
    case = data.draw(sealed_sequences(LONG, window=st.sampled_from([None, 5, 150, 1000])))
    case = replace(case, block_size=data.draw(st.sampled_from([1, 3, 16, 150])))
    whole = Attending(subject, case).step(case.whole)
    pieces = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    _check_each(pieces, whole)


@holds("SKV-9", "kv_seal", "sealed_attention", level="L3")
def company_and_places_change_no_bit(subject: Subject, data: st.DataObject) -> None:
    """Each sequence alone, and all in one step in any order, their blocks anywhere."""
    case = data.draw(sealed_sequences(st.lists(st.integers(1, 14), min_size=2, max_size=4)))
    tables = case.tables(data.draw(st.permutations(range(case.num_blocks))))
    order = data.draw(st.permutations(range(len(case.lengths))))
    together = Attending(subject, case).step([case.whole[s] for s in order], tables)
    alone = Attending(subject, case)
    for sequence, y in zip(order, together, strict=True):
        check_bits(y, alone.step([case.whole[sequence]])[0])


@holds("SKV-9", "kv_seal", "sealed_attention", "backend", level="L3", tier="models")
def logits_over_a_sealed_cache_do_not_depend_on_the_schedule(subject: Subject, data: st.DataObject) -> None:
    """A prompt alone in one step, or in pieces with another prompt's pieces beside them: the same bits."""
    case = data.draw(sealed_prompts(st.tuples(st.sampled_from([1, 7, 17, 66]), st.integers(1, 9))))
    alone = Prompting(subject, case).step(case.whole[:1])[0]
    length, other = map(len, case.token_ids)
    edges = sorted({0, length, *data.draw(st.sets(st.integers(1, length), max_size=4))})
    running, parts = Prompting(subject, replace(case, order=case.order + 1)), []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        beside = [Chunk(1, number, number + 1)] if number < other else []
        parts.append(running.step([*beside, Chunk(0, start, stop)])[-1])
    check_bits(np.concatenate(parts), alone)


@holds("SKV-10", "kv_seal", "sealed_attention")
def memory_that_is_not_seen_may_hold_anything(subject: Subject, data: st.DataObject) -> None:
    """Both pools hold NaN before, copies that nobody needs are released, and their entries are anything."""
    case = data.draw(sealed_sequences(window=st.sampled_from([None, 1, 2, 5])))
    spoiler = len(case.lengths)
    q, k, v = (np.concatenate([a, np.ones((case.block_size, *a.shape[1:]), a.dtype)]) for a in case.arrays)
    damaged = tuple(range(len(case.q), len(q)))
    case = replace(case, lengths=(*case.lengths, case.block_size), q=q, k=k, v=v, damaged=damaged)
    pieces = data.draw(cuts(case.lengths))[:spoiler]
    tables = case.tables(data.draw(st.permutations(range(case.num_blocks))))
    clean = Attending(subject, replace(case, damaged=()))
    spoilt = Attending(subject, case)
    for pool in (clean, spoilt):
        pool.spoil(spoiler, range(case.num_blocks))
    _check_each(spoilt.steps(pieces, tables, released=data.draw(GARBAGE)), clean.steps(pieces, tables))


@holds("SKV-11", "kv_seal", "sealed_attention")
def a_number_that_is_not_finite_spoils_who_reads_it(subject: Subject, data: st.DataObject) -> None:
    """Who sees the token gets NaN, as does who reads its block as sealed; others have the same bits."""
    case = data.draw(sealed_sequences(ONE))
    case = replace(case, sealed=data.draw(st.tuples(INTEGERS, INTEGERS)))
    position = data.draw(st.integers(0, case.lengths[0] - 1))
    damage = data.draw(st.sampled_from([math.nan, math.inf]))
    cut = data.draw(cuts(case.lengths))
    (y,) = Attending(subject, case).steps(cut)
    (z,) = Attending(subject, replace(case, damaged=(position,), damage=damage)).steps(cut)
    block = position // case.block_size
    for query in range(case.lengths[0]):
        if block in (0, query // case.block_size):
            spoils, certainly = case.first_seen(query) <= position <= query, math.isnan(damage)
        else:  # its channels are NaN at every position of the block
            last = block * case.block_size + case.block_size - 1
            spoils, certainly = case.first_seen(query) <= last < query, True
        if not spoils:
            check_bits(z[query], y[query])
        elif certainly:
            assert np.isnan(z[query]).all()


@holds("SKV-12", "kv_write", "attention")
def a_plain_cache_rounds_what_is_written(subject: Subject, data: st.DataObject) -> None:
    """Each query points at one position of a float16 cache: it gets the rounded number, bit by bit."""
    lengths = st.lists(st.integers(1, 14), min_size=1, max_size=3)
    case = data.draw(sequences(lengths, WIDE, window=st.none(), softcap=st.none()))
    dtype, _ = kv_formats("float16", subject.policy)
    case, targets = pointing(replace(case, dtype=dtype), data)
    results = Attending(subject, case).steps(data.draw(cuts(case.lengths)))
    for sequence, (y, aims) in enumerate(zip(results, targets, strict=True)):
        values = np.repeat(case.v[case.rows(sequence)], case.q.shape[1] // case.v.shape[1], axis=1)
        check_bits(y, values[aims].astype(np.float16).astype(y.dtype))


@holds("SKV-12", "backend")
def kv_dtypes_mean_what_their_names_say(subject: Subject, data: st.DataObject) -> None:
    """Every name and pair there is, and names that there are not."""
    plain = np.dtype(data.draw(st.sampled_from(["float16", "float32", "float64"])))
    if plain.itemsize <= subject.policy.kv.itemsize:
        assert kv_formats(plain.name, subject.policy) == (plain, None)
        assert kv_formats(f"{plain.name}/{plain.name}", subject.policy) == (plain, None)
    keys, values = data.draw(SEALED)
    if keys != values or keys.startswith("int"):
        dtype, formats = kv_formats(f"{keys}/{values}", subject.policy)
        assert dtype == subject.policy.kv
        assert [form.name for form in formats or ()] == [keys, values]
    unknown = data.draw(
        st.sampled_from(["int3", "int8/", "/int8", "int8/int4/int4", "q8_0", "int8 /int4", ""])
    )
    try:
        kv_formats(unknown, subject.policy)
    except UnsupportedError as error:
        assert "int8" in str(error), f"{error} names no KV dtype there is"
    else:
        raise AssertionError(f"{unknown!r} is taken for a KV dtype")


@holds("SKV-13", "kv_seal", "sealed_attention", "backend", tier="models")
def logits_are_those_of_the_naive_sealed_model(subject: Subject, data: st.DataObject) -> None:
    """Against a float64 forward pass that seals with rational arithmetic, as far as no code is in doubt."""
    case = data.draw(sealed_prompts(st.tuples(st.integers(1, 14))))
    (ids,), sealing = case.token_ids, case.sealing
    assert sealing is not None
    (logits,) = Prompting(subject, case).step(case.whole)
    deviation, certain = sealed_deviation(
        case.model, ids, decoded_weights(case.model), sealing, subject.unit_roundoff
    )
    expected = naive_logits(case.model, ids, sealing)
    check_bound(logits[:certain], expected[:certain], 2 * deviation[:certain, None])


@holds("BCK-2", "backend", tier="models")
def a_backend_without_the_two_ops_says_so(subject: Subject, data: st.DataObject) -> None:
    """Where it has no ``kv_seal`` or no ``sealed_attention``, a sealed cache is refused with its reason."""
    case, backend = data.draw(sealed_prompts(st.tuples(st.integers(1, 9)))), subject.start()
    asked = ((op, subject.policy.name) for op in ("kv_write", "kv_seal", "sealed_attention"))
    reasons = [backend.support(op, encoding=None, policy=policy) for op, policy in asked]
    try:
        Prompting(replace(subject, fallback=False), case).step(case.whole)
    except UnsupportedError as error:
        assert any(reason is not None and reason in str(error) for reason in reasons), f"{error}: {reasons}"
    else:
        assert not any(reasons), f"ran although {reasons}, and nobody asked for golden ops"


@holds("PRG-13", "backend", "memory_plan", "kv_seal", "sealed_attention", level="M")
def no_step_over_a_sealed_cache_takes_more_working_memory_than_was_told(
    subject: Subject, data: st.DataObject
) -> None:
    """Blocks shorter and longer than the tiles of kernels; prompts cut into steps."""
    case = data.draw(sealed_prompts(st.tuples(st.integers(1, 240), st.integers(1, 9))))
    case = replace(case, block_size=data.draw(st.sampled_from([1, 3, 16, 100])))
    size = data.draw(st.integers(1, 250))
    running = Prompting(subject, case, tokens=2 * size)
    for start in range(0, max(map(len, case.token_ids)), size):
        running.step(
            [
                Chunk(number, start, min(start + size, len(ids)))
                for number, ids in enumerate(case.token_ids)
                if start < len(ids)
            ]
        )


@st.composite
def sealed_prompts(draw: st.DrawFn, lengths: st.SearchStrategy[tuple[int, ...]]) -> Prompts:
    """Prompts of these lengths for a tiny model over a sealed cache."""
    model = tiny_model(draw(st.sampled_from(["llama", "gemma3"])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = tuple(
        tuple(rng.integers(0, model.spec.vocabulary_size, length).tolist()) for length in draw(lengths)
    )
    return Prompts(model, ids, draw(BLOCKS), draw(SEALED))


def _sealed(form: SealedFormat, x: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The bytes of one block ``[P, G, D]``, in memory that held others."""
    data = np.full((1, form.nbytes(*x.shape)), 0xA5, np.uint8)
    form.seal(x[None], data, Scratch())
    return data


def _opened(
    form: SealedFormat, data: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[np.floating]
) -> NDArray[np.floating]:
    """The numbers of one block."""
    out: NDArray[np.floating] = np.full((1, *shape), 7, dtype)
    form.open(data, out, Scratch())
    return out.reshape(shape)


def _read(
    subject: Subject, case: Sequences, sequence: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The keys and the values that each query of a sequence reads, ``[p, j, G, D]``."""
    assert case.sealed is not None
    sealing = Sealing(case.sealed, case.block_size)
    k, v = (a[case.rows(sequence)].astype(subject.policy.kv).astype(np.float64) for a in (case.k, case.v))
    return sealing.read("keys", k), sealing.read("values", v)


def _check_each(results: list[FloatArray], expected: list[FloatArray]) -> None:
    for result, e in zip(results, expected, strict=True):
        check_bits(result, e)
