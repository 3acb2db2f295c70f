"""Steps with one thing out of range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from refengine.errors import RequestError, TokenIdError
from refengine.program import StepBatch, StepInputs, input_arrays
from refengine_conformance.prompts import Prompts

Arrays = dict[str, Any]
Pick = Callable[[int], int]
"""Draws one of ``0 … n - 1``."""


def corrupted(name: str, case: Prompts, data: st.DataObject) -> tuple[StepBatch, type[Exception]]:
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
