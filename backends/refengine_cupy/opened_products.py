"""Launches of products of float16 numbers whose weights become float16 in memory first: for many tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refengine_cupy.launches import launch
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel

LEAST_OPENED, OPENED_BYTES = 512, 36 * 2**20
"""Tokens from which on it is faster, and the most memory that weights take then."""

PANEL_ROWS, STEP = 128, 128
"""Rows of a panel; columns that a row is filled up to a multiple of, in two panels; see ``halves.h``."""

ALIGNMENT = 64
"""Of opened weights: places in the arena are aligned so."""

STAGES, CLUSTER = {128: 6, 192: 5}, 2
"""In ``multiply_panels.cu``: stages, by the tokens of a block; blocks that begin together."""


def opens(tokens: int) -> bool:
    """Whether weights are opened for so many tokens."""
    return tokens >= LEAST_OPENED


def opened_bytes(rows: int, columns: int, tokens: int) -> int:
    """Bytes for so many rows of weights that are opened for a step of so many tokens, or for as many of them
    as may be at once.
    """
    if not opens(tokens):
        return 0
    block = block_bytes(columns)
    blocks = -(-rows // (PANEL_ROWS * CLUSTER)) * CLUSTER
    return ALIGNMENT + block * max(CLUSTER, min(blocks, OPENED_BYTES // block))


def block_bytes(columns: int) -> int:
    """Bytes of a block of rows, opened."""
    return PANEL_ROWS * -(-columns // STEP) * STEP * 2


def panel_bytes(tokens: int) -> int:
    """Shared memory of ``PanelMemory`` in ``multiply_panels.cu``, for blocks of so many tokens."""
    return STAGES[tokens] * ((PANEL_ROWS + tokens) * STEP + 16)


def opened_products(
    *,
    matrices: Mapping[str, Any],
    encoding: str,
    rows: Sequence[int],
    tokens: int,
    activation: str,
    given: Mapping[str, int | None],
    space: range,
    multiprocessors: int,
) -> Iterable[Launch]:
    """As many weights as there is room for are opened, and multiplied; then the next ones.

    Args:
        matrices: where up to three weights and biases are; see ``products.matrices``.
        encoding: of the weights.
        rows: of each.
        tokens: of the step.
        activation: with an underscore before it, where two products are gated; else nothing.
        given: ``x``, ``powers``, ``residual`` and results.
        space: addresses for opened weights.
        multiprocessors: of the device.
    """
    columns = matrices["columns"]
    start = -(-space.start // ALIGNMENT) * ALIGNMENT
    blocks = -(-rows[0] // (PANEL_ROWS // 2)) if activation else sum(-(-r // PANEL_ROWS) for r in rows)
    most = (space.stop - start) // block_bytes(columns) // CLUSTER * CLUSTER
    sources = {name: value for name, value in matrices.items() if not name.startswith("bias")}
    steps = -(-columns // STEP)
    for first in range(0, blocks, most):
        some = min(most, blocks - first)
        opening = Kernel("linear_a16_open", f"open_{encoding}", "Opening", 256, encoding)
        yield launch(
            opening, (steps, some, 1), **sources, opened=start, first_block=first, gated=int(bool(activation))
        )
        wide = block_tokens(some, tokens, multiprocessors)
        name = f"multiply{activation}_{wide}"
        multiply = Kernel("multiply_panels", name, "PanelProduct", 384, shared=panel_bytes(wide))
        tiles = -(-some // CLUSTER) * -(-tokens // wide)
        clusters = min(tiles, multiprocessors // CLUSTER)
        described = {n: v for n, v in matrices.items() if n.startswith(("bias", "rows", "columns"))}
        yield launch(
            multiply, (clusters * CLUSTER, 1, 1), **described, **given, weights=start, first_block=first,
            blocks=some, tokens=tokens,
        )  # fmt: skip


def block_tokens(blocks: int, tokens: int, multiprocessors: int) -> int:
    """The tokens of a block of threads: those for which the last ones end soonest."""

    def cost(wide: int) -> int:
        return -(-blocks * -(-tokens // wide) // multiprocessors) * wide

    return min(sorted(STAGES, reverse=True), key=cost)
