"""Launches of products with weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, Placement, Value, concrete
from refengine_cupy.binding import Binding, operand, plane_addresses
from refengine_cupy.elementwise import TOKEN_NORM, norm, quantize_a8
from refengine_cupy.launches import Emit, elementwise_kernel, launch, over
from refengine_cupy.packing import LAYOUTS, PLAIN
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel
from refengine_cupy.step_shape import Places, StepShape

FEW_TOKENS = 4
"""Up to so many tokens, products go row by row; above, by tiles of matrix units, where there are any."""


STRETCH_BYTES = 34 * 2**10
"""Shared memory that a product of one token has beside its codes: ``Stretch`` in ``linear_a8.cu``."""


@dataclass(frozen=True)
class TileShape:
    """A version of the kernel for matrix units.

    Attributes:
        most: tokens up to which it is taken.
        rows: tiles of 16 rows in a block of threads.
        tokens: in a block of threads.
        threads: of a block.
        stages: of the pipeline through shared memory.
    """

    most: float
    rows: int
    tokens: int
    threads: int
    stages: int


TILE_SHAPES = {
    "tiles_16": TileShape(16, 2, 16, 64, 6),
    "tiles_64": TileShape(128, 2, 64, 128, 5),
    "tiles_128": TileShape(float("inf"), 8, 64, 256, 3),
}
"""By the names of kernels in ``linear_a8_tiles.cu``, which has the same figures."""

STAGE_GROUPS = 4
"""Groups in a stage."""

SCALARS_BYTES = 16
"""Of a group of codes: ``Scalars`` in ``codes.h``."""

GATED_TOKENS = 1024
"""Tokens whose products are gated before those of the next are computed, where there is room for no more."""


class Units(Protocol):
    """What a device has, or a binding to one; see ``Runtime``."""

    matrix_units: bool
    warpgroups: bool
    shared_bytes: int


def gated_bytes(rows: int, tokens: int, units: Units) -> int:
    """Bytes for one of two products that are gated, in steps of up to so many tokens, where tiles write them.
    The other goes where what is gated does.
    """
    return min(tokens, GATED_TOKENS) * rows * 4 if units.matrix_units and tokens > FEW_TOKENS else 0


def stage_bytes(encoding: str, tiles: TileShape) -> int:
    """Shared memory of one stage: ``Stage`` in ``linear_a8_tiles.cu``."""
    layout, items = LAYOUTS[encoding], tiles.rows * STAGE_GROUPS * 16
    weights = items * (layout.codes + max(1, layout.high)) + items // layout.sharing * layout.scales
    blocks = tiles.rows * 16 * max(1, layout.blocks)
    fields = 3 if layout.blocks or layout.scales == 4 else 2
    return weights + blocks + STAGE_GROUPS * tiles.tokens * (32 + 4 * fields)


def linear(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """A product with decoded weights; of many tokens with weights that lie as stored, by tiles of 8 by 8."""
    x, weight, bias = operand(instruction, 0), binding.weight(instruction), binding.bias(instruction)
    rows, columns = weight.shape
    kernel = Kernel("linear", f"linear_{weight.encoding}", "Linear", 256, weight.encoding)
    tiles = Kernel("linear", f"linear_tiles_{weight.encoding}", "Linear", 256, weight.encoding)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        tokens = concrete(instruction.result.shape, shape.sizes)[0]
        many = weight.encoding in PLAIN and tokens > 8 and rows >= 8
        grid = (-(-tokens // 16), -(-rows // 32), 1) if many else (-(-rows // 8), -(-tokens // 8), 1)
        if tokens and rows:
            yield launch(
                tiles if many else kernel, grid, x=binding.address(x, places), bias=bias,
                y=binding.address(instruction.result, places), tokens=tokens, rows=rows, columns=columns,
                **plane_addresses(weight),
            )  # fmt: skip

    return emit


def matrices(binding: Binding, parts: Sequence[Instruction]) -> dict[str, Any]:
    """The fields of ``Product`` that say where up to three weights are, and their biases."""
    fields: dict[str, Any] = {"columns": binding.weight(parts[0]).shape[1]}
    for number in range(3):
        weight = binding.weight(parts[number]) if number < len(parts) else None
        fields |= {f"{plane}_{number}": address for plane, address in plane_addresses(weight).items()}
        fields[f"rows_{number}"] = weight.shape[0] if weight else 0
        fields[f"bias_{number}"] = binding.bias(parts[number]) if weight else None
    return fields


def product(
    binding: Binding,
    parts: Sequence[Instruction],
    *,
    results: Sequence[Value] | None = None,
    residual: Value | None = None,
    gated: Instruction | None = None,
    quantize: Instruction | None = None,
    workspace: Placement | None = None,
    normed: Instruction | None = None,
) -> Emit:
    """Products of the same codes with up to three weights, and what is fused with them.

    Args:
        binding: where values are.
        parts: the products.
        results: where they go; the parts' results unless others are given.
        residual: what is added to the one product.
        gated: reads two of them, and takes their place.
        quantize: reads ``gated``.
        workspace: takes one of two products that are gated, where these have no places.
        normed: what the codes are made of, which they alone read.
    """
    codes = operand(parts[0], 0)
    weights = [binding.weight(part) for part in parts]
    encoding, columns = weights[0].encoding, weights[0].shape[1]
    outputs = results or [part.result for part in parts]
    fixed = matrices(binding, parts)
    activation = f"_{gated.attributes['activation']}" if gated is not None else ""
    tiles = [-(-weight.shape[0] // 16) for weight in weights]
    grid = tiles[0] if gated is not None else sum(tiles)
    held = columns // GROUP * 48
    alone = STRETCH_BYTES + held <= binding.shared_bytes  # a token's codes in shared memory
    row = None if normed is None else operand(normed, 0)
    given = [*outputs, *(i.result for i in (gated, quantize) if i is not None)]
    # Blocks of threads read all of the row, some of them when others write results already.
    by_row = row is not None and columns in TOKEN_NORM and all(binding.apart(value, row) for value in given)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        tokens = concrete(codes.shape, shape.sizes)[0]
        from_row = tokens == 1 and alone and by_row
        if normed is not None and not from_row:
            yield from norm(binding, normed, codes=codes)(shape, places)
        code, scalars = binding.codes(codes, shape, places)
        values = fixed | {
            "x_codes": code,
            "x_scalars": scalars,
            "codes": None,
            "scalars": None,
            "residual": None if residual is None else binding.address(residual, places),
            "tokens": tokens,
        }
        for number in range(3):
            output = outputs[number] if number < len(outputs) else None
            written = output is not None and binding.has_place(output)
            values[f"y_{number}"] = (
                binding.address(output, places) if output is not None and written else None
            )
        if tokens > FEW_TOKENS and binding.matrix_units:
            rows = [weight.shape[0] for weight in weights]
            if gated is None:
                yield from _tiles(tokens, encoding, rows, values)
            else:
                z = binding.address(gated.result, places)
                if workspace is not None:
                    values |= {"y_0": z, "y_1": places.arena + workspace.offset}
                stretch = tokens if workspace is None else GATED_TOKENS
                yield from _gated_tiles(tokens, stretch, encoding, rows, values, activation, z)
            if quantize is not None:
                yield from quantize_a8(binding, 0, quantize)(shape, places)
            return
        if gated is not None:
            values["y_0"] = binding.address(gated.result, places)
        x: dict[str, Any] = {"x": None, "norm": None, "epsilon": 0.0}
        if normed is not None and row is not None and from_row:
            x = {
                "x": binding.address(row, places),
                "norm": binding.weight(normed).address,
                "epsilon": normed.attributes["eps"],
            }
        pairs = quantize is not None and tokens == 1 and alone
        if quantize is not None and pairs:
            values["codes"], values["scalars"] = binding.codes(quantize.result, shape, places)
        for first in range(0, tokens, FEW_TOKENS):
            some = min(FEW_TOKENS, tokens - first)
            by_one = some == 1 and alone
            version = f"product_{1 if by_one else FEW_TOKENS}{activation}_{encoding}"
            kernel = Kernel("linear_a8", version, "RowProduct", 288, encoding, held if by_one else 0)
            blocks = min(grid // 2 if pairs else grid, 3 * binding.multiprocessors)
            yield launch(kernel, (blocks, 1, 1), **(values | x | {"first_token": first, "tokens": some}))
        if quantize is not None and not pairs:
            yield from quantize_a8(binding, 0, quantize)(shape, places)

    return emit


def _gated_tiles(
    tokens: int, stretch: int, encoding: str, rows: list[int], values: dict[str, Any], activation: str, z: int
) -> Iterable[Launch]:
    """Two products and what is gated of them, for so many tokens after the other: the second one's rows take
    the same place every time.
    """
    groups = -(-values["columns"] // GROUP)
    for first in range(0, tokens, stretch):
        some = min(stretch, tokens - first)
        x, count, done = values["y_0"] + first * rows[0] * 4, some * rows[0], first * groups
        some_values = values | {
            "x_codes": values["x_codes"] + done * GROUP,
            "x_scalars": values["x_scalars"] + done * SCALARS_BYTES,
            "tokens": some,
            "y_0": x,
        }
        yield from _tiles(some, encoding, rows, some_values)
        yield over(
            count, 256, elementwise_kernel(f"gated{activation}", "Binary"), x=x, y=values["y_1"],
            z=z + first * rows[0] * 4, count=count,
        )  # fmt: skip


def _tiles(tokens: int, encoding: str, rows: list[int], values: dict[str, Any]) -> Iterable[Launch]:
    name, tiles = next((n, t) for n, t in TILE_SHAPES.items() if tokens <= t.most)
    shared = tiles.stages * stage_bytes(encoding, tiles)
    kernel = Kernel("linear_a8_tiles", f"{name}_{encoding}", "Product", tiles.threads, encoding, shared)
    blocks = sum(-(-count // (16 * tiles.rows)) for count in rows)
    yield launch(kernel, (blocks, -(-tokens // tiles.tokens), 1), **(values | {"first_token": 0}))
