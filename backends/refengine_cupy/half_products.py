"""Launches of products of float16 numbers (``linear_a16``), and of what rounds their activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, Value, concrete
from refengine_cupy.binding import Binding, operand
from refengine_cupy.elementwise import MOST_CODED, norm
from refengine_cupy.launches import Emit, elementwise_kernel, launch, over
from refengine_cupy.packing import LAYOUTS, Layout
from refengine_cupy.products import matrices
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel
from refengine_cupy.step_shape import Places, StepShape

STEP = 128
"""Columns that a row of activations is filled up to a multiple of; see ``halves.h``."""

SEGMENTS = 8
"""Stretches of a row that are added up apart; see ``segments.h``."""

TILES = {8: 1, 32: 1, 64: 2}
"""By the tokens of a version of ``linear_a16.cu``: its tiles of 16 rows. Those that are gated have two."""

MANY_ROWS, MANY_TOKENS, STAGES = 128, 128, 2
"""Of a block of threads in ``linear_a16_tiles.cu``, and the stages of its pipeline."""


def row_bytes(columns: int) -> int:
    """Bytes of a row of activations in float16."""
    return -(-columns // STEP) * STEP * 2


def rounded_workspace(instruction: Instruction, sizes: Mapping[str, int]) -> int:
    """Bytes of a product's activations in float16, and of the power that each row is divided by."""
    tokens, columns = concrete(operand(instruction, 0).shape, sizes)
    return tokens * (row_bytes(columns) + 4)


def can_norm(columns: int) -> bool:
    """Whether a norm over so many columns gives float16 itself."""
    return columns % GROUP == 0 and columns <= MOST_CODED


def few_bytes(tokens: int, *, gated: bool) -> int:
    """Shared memory of ``FewTokens`` in ``linear_a16.cu``: sums of every segment."""
    rows = 16 * (2 if gated else TILES[tokens])
    return SEGMENTS * rows * (tokens + 1) * 4


def many_bytes(layout: Layout) -> int:
    """Shared memory of ``Stage`` in ``linear_a16_tiles.cu``, twice."""
    items = MANY_ROWS // 16 * 4 * 16
    weights = items * (layout.codes + layout.high) + items // layout.sharing * layout.scales
    weights += 0 if layout.high else 16
    return STAGES * (weights + (MANY_ROWS * layout.blocks or 16) + MANY_TOKENS * STEP * 2)


def product(
    binding: Binding,
    at: int,
    parts: Sequence[Instruction],
    *,
    results: Sequence[Value] | None = None,
    residual: Value | None = None,
    gated: Instruction | None = None,
    normed: Instruction | None = None,
) -> Emit:
    """Products of the same activations with up to three weights, and what is fused with them.

    Args:
        binding: where values are.
        at: position of the instruction whose workspace takes the activations in float16.
        parts: the products.
        results: where they go; the parts' results unless others are given.
        residual: what is added to the one product.
        gated: reads two of them, and takes their place.
        normed: gives the activations, and takes the place of rounding them.
    """
    x = operand(parts[0], 0)
    weights = [binding.weight(part) for part in parts]
    encoding, columns = weights[0].encoding, weights[0].shape[1]
    outputs = results or [part.result for part in parts]
    rows = [weight.shape[0] for weight in weights]
    fixed = matrices(binding, parts) | {"codes": None, "scalars": None, "first_token": 0}
    activation = f"_{gated.attributes['activation']}" if gated is not None else ""
    workspace = binding.plan.workspaces[at]
    many = (
        binding.matrix_units and encoding in LAYOUTS and many_bytes(LAYOUTS[encoding]) <= binding.shared_bytes
    )
    few = [most for most in TILES if few_bytes(most, gated=gated is not None) <= binding.shared_bytes]

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        tokens = concrete(x.shape, shape.sizes)[0]
        if not tokens:
            return
        halves = places.arena + workspace.offset
        powers = halves + tokens * row_bytes(columns)
        if normed is None:
            yield launch(
                elementwise_kernel("round_rows", "RoundRows", 1024), (tokens, 1, 1),
                x=binding.address(x, places), halves=halves, powers=powers, columns=columns,
            )  # fmt: skip
        else:
            yield from norm(binding, normed, halves=(halves, powers))(shape, places)
        values: dict[str, Any] = fixed | {
            "x_codes": halves, "x_scalars": powers, "tokens": tokens,
            "residual": None if residual is None else binding.address(residual, places),
        }  # fmt: skip
        for number in range(3):
            output = outputs[number] if number < len(outputs) else None
            values[f"y_{number}"] = None if output is None else binding.address(output, places)
        if tokens > max(TILES) and many:
            kernel = Kernel(
                "linear_a16_tiles",
                f"many_{encoding}",
                "Product",
                256,
                encoding,
                many_bytes(LAYOUTS[encoding]),
            )
            blocks = sum(-(-count // MANY_ROWS) for count in rows)
            yield launch(kernel, (blocks, -(-tokens // MANY_TOKENS), 1), **values)
            if gated is not None:
                count = tokens * rows[0]
                yield over(
                    count, 256, elementwise_kernel(f"gated{activation}", "Binary"), x=values["y_0"],
                    y=values["y_1"], z=binding.address(gated.result, places), count=count,
                )  # fmt: skip
            return
        most = next((most for most in few if tokens <= most), max(few))
        shared = few_bytes(most, gated=gated is not None)
        kernel = Kernel("linear_a16", f"few_{most}{activation}_{encoding}", "Product", 256, encoding, shared)
        if gated is not None:
            values["y_0"] = binding.address(gated.result, places)
            blocks = -(-rows[0] // 16)
        else:
            blocks = sum(-(-count // (16 * TILES[most])) for count in rows)
        yield launch(kernel, (blocks, -(-tokens // most), 1), **values)

    return emit


def linear_a16(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """A product by itself."""
    return product(binding, at, [instruction])
