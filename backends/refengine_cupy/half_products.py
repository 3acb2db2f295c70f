"""Launches of products of float16 numbers (``linear_a16``), and of what rounds their activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, Value, concrete
from refengine_cupy.binding import Binding, operand
from refengine_cupy.elementwise import MOST_CODED, norm
from refengine_cupy.launches import Emit, elementwise_kernel, launch, over
from refengine_cupy.opened_products import opened_bytes, opened_products, opens
from refengine_cupy.packing import LAYOUTS, Layout
from refengine_cupy.products import Units, matrices
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel
from refengine_cupy.step_shape import Places, StepShape

STEP = 128
"""Columns that a row of activations is filled up to a multiple of; see ``halves.h``."""

SEGMENTS = 8
"""Stretches of a row that are added up apart; see ``segments.h``."""

TILES = {8: 1, 32: 1, 64: 2}
"""By the tokens of a version of ``linear_a16.cu``: its tiles of 16 rows. Those that are gated have two."""

ONE_THREADS, ONE_STAGES, ONE_COLUMNS, ONE_BLOCKS = 256, 6, 8192, 3
"""In ``linear_a16_one.cu``: of a block; steps that a warp asks for ahead; the most columns that it
normalises; blocks of a multiprocessor.
"""

MANY_ROWS, MANY_TOKENS, STAGES = 128, 128, 2
"""Of a block of threads in ``linear_a16_tiles.cu``, and the stages of its pipeline."""

GROUP_ROWS, PANEL_ROWS, WEIGHT_STAGES, X_STAGES = 64, 128, 2, {1: 6, 2: 3}
"""In ``linear_a16_warpgroups.cu``: rows of a warpgroup, two of which are a block; its tokens; its stages,
those of activations by how many times 64 rows a warpgroup has.
"""

MOST_WITHOUT_GROUPS = 64
"""Tokens up to which kernels of ``linear_a16.cu`` are faster than warpgroups, whose panels are not full."""

NARROW_COST = 1.15
"""How much longer blocks of half as many rows take for each row: they read activations twice as often."""


def row_bytes(columns: int) -> int:
    """Bytes of a row of activations in float16."""
    return -(-columns // STEP) * STEP * 2


def rounded_workspace(instruction: Instruction, sizes: Mapping[str, int], *, warpgroups: bool) -> int:
    """Bytes that a product by itself needs: see ``rounded_bytes``; and opened weights, of up to three."""
    tokens, columns = concrete(operand(instruction, 0).shape, sizes)
    rows = 3 * int(operand(instruction, 1).shape[0])
    return rounded_bytes(tokens, columns) + (opened_bytes(rows, columns, tokens) if warpgroups else 0)


def rounded_bytes(tokens: int, columns: int) -> int:
    """Bytes of a product's activations in float16, and of the power that each row is divided by; where a step
    may have so many tokens, in whole panels.
    """
    rows = -(-tokens // PANEL_ROWS) * PANEL_ROWS if tokens > MOST_WITHOUT_GROUPS else tokens
    return rows * row_bytes(columns) + tokens * 4


def can_norm(columns: int) -> bool:
    """Whether a norm over so many columns gives float16 itself."""
    return columns % GROUP == 0 and columns <= MOST_CODED


def few_bytes(tokens: int, *, gated: bool) -> int:
    """Shared memory of ``FewTokens`` in ``linear_a16.cu``: sums of every segment."""
    rows = 16 * (2 if gated else TILES[tokens])
    return SEGMENTS * rows * (tokens + 1) * 4


def stage_bytes(layout: Layout, tiles: int) -> int:
    """Shared memory of so many tiles in a step: ``WeightStage`` in ``weight_stage.h``."""
    items = tiles * 4 * 16
    planes = items * layout.codes, items * layout.high or 16, tiles * 16 * layout.blocks or 16
    return sum(planes) + items // layout.sharing * layout.scales


def one_bytes(layout: Layout, columns: int, *, gated: bool) -> int:
    """Shared memory of ``OneToken`` in ``linear_a16_one.cu``, and of the row behind it."""
    own = SEGMENTS * ONE_STAGES * stage_bytes(layout, 1) + 2 * (2 if gated else 1) * SEGMENTS * 16 * 4 + 16
    return own + row_bytes(columns)


def many_bytes(layout: Layout) -> int:
    """Shared memory of ``Stage`` in ``linear_a16_tiles.cu``, twice."""
    return STAGES * (stage_bytes(layout, MANY_ROWS // 16) + MANY_TOKENS * STEP * 2)


def group_bytes(layout: Layout, times: int) -> int:
    """Shared memory of ``ManyMemory`` in ``linear_a16_warpgroups.cu``: so many times 64 rows a warpgroup."""
    rows = 2 * times * GROUP_ROWS
    weights = WEIGHT_STAGES * stage_bytes(layout, rows // 16)
    barriers = -(-(X_STAGES[times] + WEIGHT_STAGES) // 2) * 16
    return X_STAGES[times] * PANEL_ROWS * STEP + rows * PANEL_ROWS * 4 + weights + barriers


def has_tiles(layout: Layout | None, units: Units) -> bool:
    """Whether there are kernels of ``linear_a16_tiles.cu`` for these weights."""
    return layout is not None and many_bytes(layout) <= units.shared_bytes and units.matrix_units


def gates_alone(encoding: str, tokens: int, units: Units) -> bool:
    """Whether of two products that are gated nothing else is ever written, in steps of up to so many tokens:
    tiles alone write both.
    """
    layout = LAYOUTS.get(encoding)
    if layout is None or not has_tiles(layout, units) or tokens <= max(TILES):
        return True
    return units.warpgroups and group_bytes(layout, 2) <= units.shared_bytes


class HalfProduct:
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

    def __init__(
        self,
        binding: Binding,
        at: int,
        parts: Sequence[Instruction],
        *,
        results: Sequence[Value] | None = None,
        residual: Value | None = None,
        gated: Instruction | None = None,
        normed: Instruction | None = None,
    ) -> None:
        self._binding, self._gated, self._normed = binding, gated, normed
        self._x, self._residual = operand(parts[0], 0), residual
        self._outputs = results or [part.result for part in parts]
        weights = [binding.weight(part) for part in parts]
        self._encoding, self._columns = weights[0].encoding, weights[0].shape[1]
        self._layout = LAYOUTS.get(self._encoding)
        self._rows = [weight.shape[0] for weight in weights]
        self._matrices = matrices(binding, parts)
        self._activation = f"_{gated.attributes['activation']}" if gated is not None else ""
        self._workspace = binding.plan.workspaces[at]
        self._source = self._x if normed is None else operand(normed, 0)
        written = self._outputs if gated is None else [gated.result]
        # Blocks of threads read all of the row, some of them when others write results already.
        self._apart = all(binding.apart(value, self._source) for value in written)

    def __call__(self, shape: StepShape, places: Places) -> Iterable[Launch]:
        """The launches of a step."""
        tokens = concrete(self._x.shape, shape.sizes)[0]
        if not tokens:
            return
        if tokens == 1 and self._has_one:
            yield self._one(places)
            return
        opened = self._binding.warpgroups and opens(tokens)
        grouped = self._group_times(tokens) if tokens > MOST_WITHOUT_GROUPS and not opened else 0
        powers = places.arena + self._workspace.offset
        in_panels = -(-tokens // PANEL_ROWS) * PANEL_ROWS
        powers += row_bytes(self._columns) * (in_panels if grouped or opened else tokens)
        yield from self._rounded(shape, places, powers, panels=bool(grouped or opened))
        if opened:
            yield from self._by_panels(places, powers, tokens)
            return
        given = self._given(places, powers, tokens)
        if grouped:
            yield self._by_warpgroups(given, places, tokens, grouped)
        elif tokens > max(TILES) and has_tiles(self._layout, self._binding):
            yield from self._by_tiles(given, places, tokens)
        else:
            yield self._few(given, places, tokens)

    @property
    def _has_one(self) -> bool:
        """Whether there is a kernel for one token: what the row comes from may be a norm."""
        if self._layout is None or not self._binding.matrix_units:
            return False
        fits = self._apart and (self._normed is None or self._columns <= ONE_COLUMNS)
        needed = one_bytes(self._layout, self._columns, gated=self._gated is not None)
        return fits and needed <= self._binding.shared_bytes

    def _group_times(self, tokens: int) -> int:
        """How many times 64 rows a warpgroup should have; 0 where there are none for these weights."""
        if self._layout is None or not self._binding.warpgroups:
            return 0
        fitting = [t for t in (1, 2) if group_bytes(self._layout, t) <= self._binding.shared_bytes]
        if self._gated is not None:
            return 2 if 2 in fitting else 0

        def cost(times: int) -> float:
            blocks = self._blocks(2 * times * GROUP_ROWS) * -(-tokens // PANEL_ROWS)
            return -(-blocks // self._binding.multiprocessors) * times * (NARROW_COST if times == 1 else 1.0)

        return min(fitting, key=cost, default=0)

    def _blocks(self, rows: int) -> int:
        """Blocks of so many rows, of all parts, each of which begins one."""
        return sum(-(-count // rows) for count in self._rows)

    def _rounded(self, shape: StepShape, places: Places, powers: int, *, panels: bool) -> Iterable[Launch]:
        """The activations in float16: rows by themselves or in panels, and their powers."""
        halves = places.arena + self._workspace.offset
        if self._normed is not None:
            yield from norm(self._binding, self._normed, halves=(halves, powers, panels))(shape, places)
            return
        tokens = concrete(self._x.shape, shape.sizes)[0]
        yield launch(
            elementwise_kernel("round_rows", "RoundRows", 1024), (tokens, 1, 1),
            x=self._binding.address(self._x, places), halves=halves, powers=powers, columns=self._columns,
            panels=int(panels),
        )  # fmt: skip

    def _results(self, places: Places) -> dict[str, int | None]:
        """Addresses of results and of what is added to them."""
        address = self._binding.address
        residual = None if self._residual is None else address(self._residual, places)
        found: dict[str, int | None] = {"residual": residual}
        for number in range(3):
            output = self._outputs[number] if number < len(self._outputs) else None
            written = output is not None and self._binding.has_place(output)
            found[f"y_{number}"] = address(output, places) if output is not None and written else None
        return found

    def _given(self, places: Places, powers: int, tokens: int) -> dict[str, Any]:
        """The fields of ``Product``, of activations that are rounded."""
        return self._matrices | self._results(places) | {
            "codes": None, "scalars": None, "first_token": 0, "x_scalars": powers, "tokens": tokens,
            "x_codes": places.arena + self._workspace.offset,
        }  # fmt: skip

    def _to_gated(self, values: dict[str, Any], places: Places) -> dict[str, Any]:
        """With the result of what is gated in the place of the first."""
        if self._gated is None:
            return values
        return values | {"y_0": self._binding.address(self._gated.result, places)}

    def _one(self, places: Places) -> Launch:
        tiles = -(-self._rows[0] // 16) if self._gated is not None else self._blocks(16)
        scale = None if self._normed is None else self._binding.weight(self._normed).address
        given = self._matrices | self._results(places) | {
            "x": self._binding.address(self._source, places), "norm": scale, "tiles": tiles,
            "epsilon": 0.0 if self._normed is None else self._normed.attributes["eps"],
        }  # fmt: skip
        kernel = Kernel(
            "linear_a16_one", f"one{self._activation}_{self._encoding}", "TokenProduct", ONE_THREADS,
            self._encoding, one_bytes(LAYOUTS[self._encoding], self._columns, gated=self._gated is not None),
        )  # fmt: skip
        blocks = min(tiles, ONE_BLOCKS * self._binding.multiprocessors)
        return launch(kernel, (blocks, 1, 1), **self._to_gated(given, places))

    def _few(self, given: dict[str, Any], places: Places, tokens: int) -> Launch:
        gated = self._gated is not None
        fitting = [most for most in TILES if few_bytes(most, gated=gated) <= self._binding.shared_bytes]
        most = next((most for most in fitting if tokens <= most), max(fitting))
        kernel = Kernel(
            "linear_a16", f"few_{most}{self._activation}_{self._encoding}", "Product", 256, self._encoding,
            few_bytes(most, gated=gated),
        )  # fmt: skip
        blocks = -(-self._rows[0] // 16) if gated else self._blocks(16 * TILES[most])
        return launch(kernel, (blocks, -(-tokens // most), 1), **self._to_gated(given, places))

    def _by_warpgroups(self, given: dict[str, Any], places: Places, tokens: int, times: int) -> Launch:
        name = f"many{self._activation or f'_{times}'}_{self._encoding}"
        shared = group_bytes(LAYOUTS[self._encoding], times)
        kernel = Kernel("linear_a16_warpgroups", name, "Product", 256, self._encoding, shared)
        blocks = -(-self._rows[0] // 128) if self._gated is not None else self._blocks(128 * times)
        return launch(kernel, (-(-tokens // PANEL_ROWS), blocks, 1), **self._to_gated(given, places))

    def _by_panels(self, places: Places, powers: int, tokens: int) -> Iterable[Launch]:
        start = places.arena + self._workspace.offset
        given = self._to_gated(self._results(places), places)
        return opened_products(
            matrices=self._matrices, encoding=self._encoding, rows=self._rows, tokens=tokens,
            activation=self._activation, given=given | {"x": start, "powers": powers},
            space=self._opened_space(places, powers + 4 * tokens),
            multiprocessors=self._binding.multiprocessors,
        )  # fmt: skip

    def _opened_space(self, places: Places, start: int) -> range:
        """Where opened weights may lie: behind what the workspace has already, or over what has been rounded,
        if nobody reads that again.
        """
        behind = range(start, places.arena + self._workspace.offset + self._workspace.nbytes)
        source = self._binding.root(self._source)
        place = self._binding.plan.placements.get(source.index)
        added = None if self._residual is None else self._binding.root(self._residual)
        if place is None or added is source or place.last > self._workspace.last or not self._apart:
            return behind
        over = range(places.arena + place.offset, places.arena + place.offset + place.nbytes)
        return max(behind, over, key=len)

    def _by_tiles(self, given: dict[str, Any], places: Places, tokens: int) -> Iterable[Launch]:
        kernel = Kernel(
            "linear_a16_tiles", f"many_{self._encoding}", "Product", 256, self._encoding,
            many_bytes(LAYOUTS[self._encoding]),
        )  # fmt: skip
        yield launch(kernel, (self._blocks(MANY_ROWS), -(-tokens // MANY_TOKENS), 1), **given)
        if self._gated is not None:
            count = tokens * self._rows[0]
            yield over(
                count, 256, elementwise_kernel(f"gated{self._activation}", "Binary"), x=given["y_0"],
                y=given["y_1"], z=self._binding.address(self._gated.result, places), count=count,
            )  # fmt: skip


def linear_a16(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """A product by itself."""
    return HalfProduct(binding, at, [instruction])
