"""Models for the mixed policies, and their products one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from refengine.models import Model
from refengine.models.model import expected_shapes
from refengine.program import Program, Value
from refengine.quantizer import ENCODINGS, LazyTensor
from refengine_conformance.bits import check_bits
from refengine_conformance.bounds import check_bound
from refengine_conformance.naive_mixed import CODED, a8_product, a16_product
from refengine_conformance.prompts import Prompts
from refengine_conformance.properties.p03_encodings import AFFINE, LAYOUTS
from refengine_conformance.subject import Subject
from refengine_conformance.tiny_model import tiny_model

HIDDEN = 64
"""Of models in encodings with blocks of 32; those with larger ones have 256."""

VOCABULARY = 50

COMPARED = 12
"""Weight rows whose products are computed once more, in rational arithmetic: it takes its time."""

PLAIN_MATRICES = ("f32", "f16", "bf16")


@cache
def stored_model(family: str, seed: int, *, wide: bool = False, encodings: tuple[str, ...] = CODED) -> Model:
    """A random model of two layers, or of one that is ``wide``, whose matrices have these encodings.

    About one in five is stored as plain numbers. Only a wide model has blocks of more than 32.
    """
    hidden = 256 if wide else HIDDEN
    tiny = tiny_model(family, layers=1 if wide else 2).spec
    size = hidden // 4
    layers = tuple(
        replace(layer, head_size=size, ffn_size=hidden + (0 if wide else 32)) for layer in tiny.layers
    )
    spec = replace(tiny, hidden_size=hidden, layers=layers, vocabulary_size=VOCABULARY)
    rng = np.random.default_rng([seed, wide])
    names = [n for n in encodings if wide or ENCODINGS[n].block_size == 32]
    weights = {}
    biased = seed % 2 == 1
    for role, shape in expected_shapes(spec).items():
        kind = role.rpartition(".")[2]
        if kind.endswith("_bias") and not (biased and kind in ("q_bias", "k_bias", "v_bias")):
            continue
        if kind in ("q_norm", "k_norm", "post_attention_norm", "post_ffn_norm") and family != "gemma3":
            continue
        if len(shape) == 1:
            numbers = rng.standard_normal(shape) * 0.1 + ("norm" in kind)
            weights[role] = LazyTensor(role, shape, "f32", numbers.astype("<f4").view(np.uint8))
        else:
            name = str(rng.choice(PLAIN_MATRICES if rng.random() < 0.2 else names))
            weights[role] = LazyTensor(role, shape, name, stored_matrix(rng, name, shape))
    return Model(spec, weights)


def stored_matrix(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Stored bytes of weights of ordinary size, about 0.1: any integers, with scales of either sign."""
    layout, (rows, columns) = LAYOUTS[name], shape
    if layout.weights == 1:
        numbers = (rng.standard_normal(shape) * 0.1).astype("<f2" if name == "f16" else "<f4")
        return np.ascontiguousarray(numbers[..., None].view(np.uint8)[..., -layout.bytes :]).reshape(rows, -1)
    blocks = rng.integers(0, 256, (rows, columns // layout.weights, layout.bytes), np.uint8)
    if name == "mxfp4":
        blocks[..., 0] = rng.integers(120, 125, blocks.shape[:2])
    large = {"q8_0": 60, "q4_k": 200, "q5_k": 400, "q6_k": 1000} | dict.fromkeys(AFFINE, 100)
    size = 0.1 / large.get(name, 8)
    for start in layout.scales:
        scales = rng.standard_normal((*blocks.shape[:2], 1)) * size
        blocks[..., start : start + 2] = scales.astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def products_of(program: Program) -> list[int]:
    """Positions of the products of a mixed policy."""
    return [at for at, i in enumerate(program) if i.op.name in ("linear_a8", "linear_a16")]


def check_product(subject: Subject, case: Prompts, at: int, seed: int = 0) -> None:
    """One product of a model's program: what it gives, beside what chapter 12 makes of what it reads.

    Both are logits of a program: the model's instructions up to there. Under ``mixed8`` a few weight rows are
    compared, under ``mixed16`` all.

    Raises:
        AssertionError: they differ, or by more than the bound.
    """
    program = subject.program(case.model)
    product = program.instructions[at]
    read, weight, *biases = product.operands
    coded = product.op.name == "linear_a8"
    if coded:
        read = next(i.operands[0] for i in program if i.result is read)
    if read is None or weight is None:
        raise AssertionError(f"{product.op.name} lacks an operand")
    x, y = (_value(subject, case, program, value) for value in (read, product.result))
    stored = case.model.weights[weight.name]
    bias = next((case.model.weights[b.name].decode() for b in biases if b is not None), None)
    if coded:
        rows = np.random.default_rng(seed).permutation(len(stored.data))[:COMPARED]
        some = None if bias is None else bias[rows]
        check_bits(y[:, rows], a8_product(stored.encoding, stored.data[rows], x, some))
    else:
        check_bound(y, *a16_product(stored.decode(), x, bias))


def _value(subject: Subject, case: Prompts, program: Program, value: Value) -> NDArray[np.float32]:
    """What a program's value is in the step that computes whole prompts."""
    last = next(at for at, i in enumerate(program) if i.result is value)
    part = Program(program.instructions[: last + 1], value)
    layout = case.layout(subject.policy, subject.kv_format)
    executable = subject.compile(part, case.model.weights, case.tokens, layout)
    return executable.run(case.batch(case.whole))
