"""Programs of an op or two over operands that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend import Executable
from refengine.program import StepBatch, Tracer, Value, symbolic_inputs
from refengine_conformance.subject import Subject, Weight, activation, one_sequence

Build = Callable[[Tracer, SimpleNamespace], Value]
"""``build(tracer, values)`` writes a program and gives its output; the values are operands, by name, and the
step's ``token_ids``, ``positions`` and ``logit_rows``."""


def started(subject: Subject) -> Subject:
    """The subject, its backend started once for all that follows."""
    backend = subject.start()
    return replace(subject, start=lambda: backend)


def compiled(subject: Subject, build: Build, tokens: int, **operands: NDArray[Any] | Weight) -> Executable:
    """A program over operands, for up to ``tokens`` tokens, whose ids name their rows of an array."""
    tracer, weights = Tracer(), {}
    inputs = symbolic_inputs(tracer, kv_groups=1)
    values = {name: getattr(inputs, name) for name in ("token_ids", "positions", "logit_rows")}
    for name, operand in operands.items():
        if isinstance(operand, Weight):
            weights[name] = operand.tensor(name)
            values[name] = tracer.symbol(name, "weight", weights[name].shape)
        else:
            weights[name] = Weight(operand).tensor(name)
            values[name] = activation(tracer, inputs, name, operand.shape)
    return subject.compile(tracer.finish(build(tracer, SimpleNamespace(**values))), weights, tokens)


def step(ids: Sequence[int], *, first: int = 0, rows: Sequence[int] | None = None) -> StepBatch:
    """A step of one sequence: these token ids, at positions from ``first`` on."""
    tokens = len(ids)
    return replace(
        one_sequence(tokens, rows),
        token_ids=np.array(ids, np.int32),
        positions=np.arange(first, first + tokens, dtype=np.int32),
        context_lens=np.array([first + tokens], np.int32),
        block_tables=(np.zeros((1, first + tokens), np.int32),),
    )
