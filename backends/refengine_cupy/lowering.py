"""From a Program to launches: which kernels compute it, in which order, over which addresses.

Instructions that follow each other are fused where one kernel does the work of several with the same bits:

- ``rms_norm`` and the ``quantize_a8`` that alone reads it
- ``linear_a8`` of the same codes, up to three (q, k and v; gate and up with ``gated`` and, of one token, the
  ``quantize_a8`` of that), and one with the ``add`` after it
- ``rope`` of q and of k, and ``kv_write``

A kernel that stands for several instructions runs where the last of them stands, when what the first has read
may have been given to another value: so none is fused whose result lies over what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import numpy as np

from refengine.errors import UnsupportedError
from refengine.memory import KVLayout
from refengine.program import Instruction, MemoryPlan, Program, Value, concrete
from refengine_cupy.kv import LayerPlace
from refengine_cupy.packing import LAYOUTS
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel, pack
from refengine_cupy.weights import DeviceWeight

PARTITION = 128
"""Positions that attention treats at once; see ``attention.h``."""

MOST_PARTIALS = 512
"""Partitions, times tokens, whose results attention may keep until they are joined."""

ENOUGH_BLOCKS = 512
"""Blocks of threads that keep a device busy: with so many, attention need not cut contexts up."""

MOST_HEAD_SIZE = 256
"""Elements of a head, in attention."""

QUERY_TILE = 64
"""Queries that attention treats at once, where a sequence has many."""

MOST_TILED_SIZE = 128
"""Elements of a head, in attention by tiles of queries."""

FEW_TOKENS = 4
"""Up to so many tokens, products go row by row; above, by tiles of matrix units, where there are any."""


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

GROUP = 32

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class StepShape:
    """What launches depend on.

    Attributes:
        tokens, sequences, rows: T, S and R.
        blocks: columns of the block tables.
        partitions: of the longest context that some query sees.
        query_tiles: tiles of at most ``QUERY_TILE`` queries of one sequence each; 0 where queries go one by
            one.
    """

    tokens: int
    sequences: int
    rows: int
    blocks: int
    partitions: int
    query_tiles: int

    @property
    def sizes(self) -> dict[str, int]:
        """By symbol."""
        return {"T": self.tokens, "S": self.sequences, "S1": self.sequences + 1, "R": self.rows}


@dataclass(frozen=True)
class Places:
    """Where everything is.

    Attributes:
        arena: address of the arena.
        output: address of the program's result.
        counters: zeros, as many as tokens and key heads that attention is cut up for.
        inputs: addresses of a step's arrays, by name; ``sequences`` among them: each token's sequence.
        frequencies: of ``rope_table``, by the position of its instruction.
    """

    arena: int
    output: int
    counters: int
    inputs: Mapping[str, int]
    frequencies: Mapping[int, int]


Emit = Callable[[StepShape, Places], Iterable[Launch]]


def attention_workspace(instruction: Instruction, sizes: Sizes) -> int:
    """Bytes of what partitions leave to be joined."""
    q = instruction.operands[0]
    if q is None:
        return 0
    _, heads, size = q.shape
    return MOST_PARTIALS * int(heads) * (int(size) + 2) * 4


class Lowering:
    """A Program's launches for steps of any shape.

    Args:
        program: what is computed.
        plan: where its values lie.
        weights: by role.
        states: by name, where layers' keys and values are.
        layout: of the KV cache.
        matrix_units: whether the device has kernels for them.
        multiprocessors: of the device.

    Raises:
        UnsupportedError: a head is larger than attention's kernels can do.
    """

    def __init__(
        self,
        program: Program,
        plan: MemoryPlan,
        weights: Callable[[str], DeviceWeight],
        states: Mapping[str, LayerPlace],
        layout: KVLayout,
        *,
        matrix_units: bool,
        multiprocessors: int,
    ) -> None:
        self._program, self._plan, self._weights, self._layout = program, plan, weights, layout
        self._states, self._matrix_units, self._multiprocessors = states, matrix_units, multiprocessors
        self._kv = "f16" if layout.dtype == np.float16 else "f32"
        self._uses: dict[int, int] = {}
        for instruction in program:
            for value in instruction.operands:
                if value is not None:
                    self._uses[value.index] = self._uses.get(value.index, 0) + 1
        self._uses[program.output.index] = self._uses.get(program.output.index, 0) + 1
        self._source: dict[int, Value] = {}  # what a view or a state shows
        self._emits: list[Emit] = []
        at = 0
        while at < len(program.instructions):
            emit, at = self._lower(at)
            if emit is not None:
                self._emits.append(emit)
        if self._source.get(program.output.index) is not None:
            self._emits.append(self._copy_out)

    @property
    def rope_tables(self) -> Mapping[int, tuple[float, ...]]:
        """Frequencies of every ``rope_table``, by the position of its instruction."""
        return {
            at: tuple(i.attributes["frequencies"])  # type: ignore[arg-type]
            for at, i in enumerate(self._program)
            if i.op.name == "rope_table"
        }

    def launches(self, shape: StepShape, places: Places) -> list[Launch]:
        """The launches of a step."""
        return [launch for emit in self._emits for launch in emit(shape, places)]

    # Fusing

    def _lower(self, at: int) -> tuple[Emit | None, int]:
        """What computes the instruction at a position, and perhaps those after it; and where it goes on."""
        instruction = self._program.instructions[at]
        for fuse in (self._norm_and_codes, self._gated_products, self._products, self._rope_and_write):
            if (fused := fuse(at)) is not None:
                return fused
        if instruction.op.sharing == "view":
            self._source[instruction.result.index] = _operand(instruction, 0)
            return None, at + 1
        lower = getattr(self, f"_{instruction.op.name}")
        return lower(at, instruction), at + 1

    def _skip_views(self, at: int) -> int:
        """The next position whose instruction computes something; views on the way are noted."""
        while at < len(self._program.instructions):
            instruction = self._program.instructions[at]
            if instruction.op.sharing != "view":
                break
            self._source[instruction.result.index] = _operand(instruction, 0)
            at += 1
        return at

    def _named(self, at: int, name: str) -> Instruction | None:
        if at >= len(self._program.instructions):
            return None
        instruction = self._program.instructions[at]
        return instruction if instruction.op.name == name else None

    def _only_use(self, value: Value) -> bool:
        return self._uses.get(value.index, 0) == 1

    def _apart(self, result: Value, *read: Value) -> bool:
        """Whether a result lies over none of the values that are read for it."""
        place = self._plan.placements.get(self._root(result).index)
        if place is None:
            return True
        for value in read:
            other = self._plan.placements.get(self._root(value).index)
            if (
                other
                and other.offset < place.offset + place.nbytes
                and place.offset < other.offset + other.nbytes
            ):
                return False
        return True

    def _norm_and_codes(self, at: int) -> tuple[Emit, int] | None:
        norm = self._named(at, "rms_norm")
        if norm is None or len(norm.result.shape) != 2 or not self._only_use(norm.result):
            return None
        quantize = self._named(at + 1, "quantize_a8")
        if quantize is None or quantize.operands[0] is not norm.result:
            return None
        x, codes = _operand(norm, 0), quantize.result
        if int(norm.result.shape[1]) > max(most for most in _NORMS.values() if most < inf):
            return None
        if codes is self._program.output or not self._apart(codes, x):
            return None
        return self._norm(norm, None, codes), at + 2

    def _products(self, at: int) -> tuple[Emit, int] | None:
        first = self._named(at, "linear_a8")
        if first is None:
            return None
        parts, end = [first], self._skip_views(at + 1)
        encoding = self._weight(first).encoding
        while len(parts) < 3 and (other := self._named(end, "linear_a8")) is not None:
            if other.operands[0] is not first.operands[0] or self._weight(other).encoding != encoding:
                break
            parts.append(other)
            end = self._skip_views(end + 1)
        if len(parts) == 1 and (add := self._named(end, "add")) is not None:
            x, y = add.operands
            codes = _operand(first, 0)
            if y is first.result and self._only_use(y) and x is not y and x is not None:
                exact = self._plan.placements.get(add.result.index) == self._plan.placements.get(x.index)
                if self._apart(add.result, codes) and (exact or self._apart(add.result, x)):
                    return self._product(parts, results=[add.result], residual=x), end + 1
        return self._product(parts), end

    def _gated_products(self, at: int) -> tuple[Emit, int] | None:
        gate = self._named(at, "linear_a8")
        up_at = self._skip_views(at + 1)
        up = self._named(up_at, "linear_a8")
        gated = self._named(up_at + 1, "gated")
        if gate is None or up is None or gated is None:
            return None
        codes = _operand(gate, 0)
        fits = (
            up.operands[0] is codes
            and self._weight(gate).encoding == self._weight(up).encoding
            and gated.operands == (gate.result, up.result)
            and self._only_use(gate.result)
            and self._only_use(up.result)
            and self._apart(gated.result, codes)
        )
        if not fits:
            return None
        quantize = self._named(up_at + 2, "quantize_a8")
        if (
            quantize is not None
            and quantize.operands[0] is gated.result
            and self._only_use(gated.result)
            and int(gated.result.shape[1]) % GROUP == 0
            and quantize.result is not self._program.output
            and self._apart(quantize.result, codes)
            and self._apart(quantize.result, gated.result)
        ):
            return self._product([gate, up], gated=gated, quantize=quantize), up_at + 3
        return self._product([gate, up], gated=gated), up_at + 2

    def _rope_and_write(self, at: int) -> tuple[Emit, int] | None:
        q, k, write = (
            self._named(at, "rope"),
            self._named(at + 1, "rope"),
            self._named(at + 2, "kv_write"),
        )
        if q is None or k is None or write is None:
            return None
        size = q.result.shape[2]
        fits = (
            write.operands[1] is k.result
            and self._only_use(k.result)
            and q.operands[1] is k.operands[1]
            and q.attributes == k.attributes
            and int(size) % 2 == 0
        )
        if not fits:
            return None
        source, v, table = _operand(q, 0), _operand(write, 2), _operand(q, 1)
        same = self._plan.placements.get(q.result.index) == self._plan.placements.get(
            self._root(source).index
        )
        if not (same or self._apart(q.result, source)) or not self._apart(q.result, _operand(k, 0), v, table):
            return None
        self._source[write.result.index] = _operand(write, 0)
        return self._rope_write(q, k, write), at + 3

    # Addresses

    def _root(self, value: Value) -> Value:
        while value.index in self._source:
            value = self._source[value.index]
        return value

    def _address(self, value: Value, places: Places) -> int:
        value = self._root(value)
        if value.kind == "input":
            return places.inputs[value.name]
        if value.kind == "weight":
            return self._weights(value.name).address
        if value is self._program.output:
            return places.output
        return places.arena + self._plan.placements[value.index].offset

    def _weight(self, instruction: Instruction, operand: int = 1) -> DeviceWeight:
        return self._weights(_operand(instruction, operand).name)

    def _bias(self, instruction: Instruction) -> int | None:
        bias = instruction.operands[2] if len(instruction.operands) > 2 else None
        return None if bias is None else self._weights(bias.name).address

    def _codes(self, value: Value, shape: StepShape, places: Places) -> tuple[int, int]:
        """Addresses of codes and scalars."""
        address = self._address(value, places)
        rows, groups = concrete(value.shape, shape.sizes)[:2]
        return address, address + rows * groups * GROUP

    # Ops

    def _copy_out(self, shape: StepShape, places: Places) -> Iterable[Launch]:
        output = self._program.output
        count = prod(concrete(output.shape, shape.sizes))
        source = self._address(output, places)
        yield _over(
            count, 256, _elementwise("copy", "Unary"), x=source, y=places.output, count=count, parameter=0.0
        )

    def _embedding(self, at: int, instruction: Instruction) -> Emit:
        rows, table = _operand(instruction, 0), self._weight(instruction)
        kernel = Kernel("elementwise", f"embedding_{table.encoding}", "LookUp", 128)
        columns = table.shape[1]
        each = columns // GROUP if table.encoding in LAYOUTS else columns

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            count = concrete(instruction.result.shape, shape.sizes)[0]
            yield _over(
                count * each, 128, kernel, rows=self._address(rows, places),
                y=self._address(instruction.result, places), count=count, columns=columns, **_planes(table),
            )  # fmt: skip

        return emit

    def _take_rows(self, at: int, instruction: Instruction) -> Emit:
        x, rows = _operand(instruction, 0), _operand(instruction, 1)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            count, columns = concrete(instruction.result.shape, shape.sizes)
            yield _over(
                count * columns, 256, _elementwise("take_rows", "TakeRows"), x=self._address(x, places),
                rows=self._address(rows, places), y=self._address(instruction.result, places),
                count=count, columns=columns,
            )  # fmt: skip

        return emit

    def _binary(self, kernel: str, instruction: Instruction) -> Emit:
        x, y = _operand(instruction, 0), _operand(instruction, 1)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            count = prod(concrete(instruction.result.shape, shape.sizes))
            yield _over(
                count, 256, _elementwise(kernel, "Binary"), x=self._address(x, places), y=self._address(y,
                places), z=self._address(instruction.result, places), count=count,
            )  # fmt: skip

        return emit

    def _add(self, at: int, instruction: Instruction) -> Emit:
        return self._binary("add", instruction)

    def _gated(self, at: int, instruction: Instruction) -> Emit:
        return self._binary(f"gated_{instruction.attributes['activation']}", instruction)

    def _unary(self, kernel: str, instruction: Instruction, parameter: float) -> Emit:
        x = _operand(instruction, 0)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            count = prod(concrete(instruction.result.shape, shape.sizes))
            yield _over(
                count, 256, _elementwise(kernel, "Unary"), x=self._address(x, places),
                y=self._address(instruction.result, places), count=count, parameter=parameter,
            )  # fmt: skip

        return emit

    def _scale(self, at: int, instruction: Instruction) -> Emit:
        return self._unary("scale", instruction, _number(instruction, "factor"))

    def _softcap(self, at: int, instruction: Instruction) -> Emit:
        return self._unary("softcap", instruction, _number(instruction, "cap"))

    def _rms_norm(self, at: int, instruction: Instruction) -> Emit:
        return self._norm(instruction, instruction.result, None)

    def _norm(self, norm: Instruction, y: Value | None, codes: Value | None) -> Emit:
        x, weight = _operand(norm, 0), self._weight(norm)
        columns = weight.shape[0]
        kernel = next(
            k for k, most in _NORMS.items() if columns <= most and (columns % GROUP == 0 or most == inf)
        )

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            rows = prod(concrete(norm.result.shape, shape.sizes)) // columns
            code, scalars = (None, None) if codes is None else self._codes(codes, shape, places)
            if rows:
                yield _launch(
                    kernel, (rows, 1, 1), x=self._address(x, places), weight=weight.address,
                    y=None if y is None else self._address(y, places), codes=code, scalars=scalars,
                    columns=columns, epsilon=_number(norm, "eps"),
                )  # fmt: skip

        return emit

    def _quantize_a8(self, at: int, instruction: Instruction) -> Emit:
        x = _operand(instruction, 0)
        records = instruction.result is self._program.output
        kernel = Kernel("elementwise", "quantize_a8_records" if records else "quantize_a8", "Quantize", 256)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            rows, groups, _ = concrete(instruction.result.shape, shape.sizes)
            codes, scalars = self._codes(instruction.result, shape, places)
            yield _over(
                rows * groups * 8, 256, kernel, x=self._address(x, places), codes=codes, scalars=scalars,
                groups=rows * groups,
            )  # fmt: skip

        return emit

    def _linear(self, at: int, instruction: Instruction) -> Emit:
        x, weight, bias = _operand(instruction, 0), self._weight(instruction), self._bias(instruction)
        rows, columns = weight.shape
        kernel = Kernel("linear", f"linear_{weight.encoding}", "Linear", 256, weight.encoding)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            tokens = concrete(instruction.result.shape, shape.sizes)[0]
            if tokens and rows:
                yield _launch(
                    kernel, (-(-rows // 8), -(-tokens // 8), 1), x=self._address(x, places), bias=bias,
                    y=self._address(instruction.result, places), tokens=tokens, rows=rows, columns=columns,
                    **_planes(weight),
                )  # fmt: skip

        return emit

    def _product(
        self,
        parts: Sequence[Instruction],
        *,
        results: Sequence[Value] | None = None,
        residual: Value | None = None,
        gated: Instruction | None = None,
        quantize: Instruction | None = None,
    ) -> Emit:
        codes = _operand(parts[0], 0)
        weights = [self._weight(part) for part in parts]
        encoding, columns = weights[0].encoding, weights[0].shape[1]
        outputs = results or [part.result for part in parts]
        fixed: dict[str, Any] = {"columns": columns}
        for number in range(3):
            weight = weights[number] if number < len(parts) else None
            planes = _planes(weight) if weight else dict.fromkeys(("codes", "high", "scales", "blocks"))
            fixed |= {f"{plane}_{number}": address for plane, address in planes.items()}
            fixed[f"rows_{number}"] = weight.shape[0] if weight else 0
            fixed[f"bias_{number}"] = self._bias(parts[number]) if weight else None
        activation = f"_{gated.attributes['activation']}" if gated is not None else ""
        tiles = [-(-weight.shape[0] // 16) for weight in weights]
        grid = tiles[0] if gated is not None else sum(tiles)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            tokens = concrete(codes.shape, shape.sizes)[0]
            code, scalars = self._codes(codes, shape, places)
            values = fixed | {
                "x_codes": code,
                "x_scalars": scalars,
                "codes": None,
                "scalars": None,
                "residual": None if residual is None else self._address(residual, places),
                "tokens": tokens,
            }
            for number in range(3):
                output = outputs[number] if number < len(outputs) else None
                values[f"y_{number}"] = None if output is None else self._address(output, places)
            if tokens > FEW_TOKENS and self._matrix_units:
                yield from self._tiles(tokens, encoding, [weight.shape[0] for weight in weights], values)
                if gated is not None:
                    count = tokens * weights[0].shape[0]
                    yield _over(
                        count, 256, _elementwise(f"gated{activation}", "Binary"), x=values["y_0"],
                        y=values["y_1"], z=self._address(gated.result, places), count=count,
                    )  # fmt: skip
                if quantize is not None:
                    yield from self._quantize_a8(0, quantize)(shape, places)
                return
            if gated is not None:
                values["y_0"] = self._address(gated.result, places)
            pairs = quantize is not None and tokens == 1
            if quantize is not None and pairs:
                values["codes"], values["scalars"] = self._codes(quantize.result, shape, places)
            for first in range(0, tokens, FEW_TOKENS):
                some = min(FEW_TOKENS, tokens - first)
                version = f"product_{1 if some == 1 else FEW_TOKENS}{activation}_{encoding}"
                shared = columns // GROUP * 48 if some == 1 else 0
                kernel = Kernel("linear_a8", version, "Product", 288, encoding, shared)
                blocks = min(grid // 2 if pairs else grid, 3 * self._multiprocessors)
                yield _launch(kernel, (blocks, 1, 1), **(values | {"first_token": first, "tokens": some}))
            if quantize is not None and not pairs:
                yield from self._quantize_a8(0, quantize)(shape, places)

        return emit

    def _tiles(self, tokens: int, encoding: str, rows: list[int], values: dict[str, Any]) -> Iterable[Launch]:
        name, tiles = next((n, t) for n, t in TILE_SHAPES.items() if tokens <= t.most)
        shared = tiles.stages * stage_bytes(encoding, tiles)
        kernel = Kernel("linear_a8_tiles", f"{name}_{encoding}", "Product", tiles.threads, encoding, shared)
        blocks = sum(-(-count // (16 * tiles.rows)) for count in rows)
        yield _launch(kernel, (blocks, -(-tokens // tiles.tokens), 1), **(values | {"first_token": 0}))

    def _rope_table(self, at: int, instruction: Instruction) -> Emit:
        positions, pairs = _operand(instruction, 0), int(instruction.result.shape[1]) // 2
        kernel = Kernel("elementwise", "rope_table", "RopeTable", 128)

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            count = shape.tokens
            yield _over(
                count * pairs, 128, kernel, positions=self._address(positions, places),
                frequencies=places.frequencies[at], table=self._address(instruction.result, places),
                magnitude=float(instruction.attributes.get("magnitude", 1.0)),  # type: ignore[arg-type]
                count=count, pairs=pairs,
            )  # fmt: skip

        return emit

    def _rope(self, at: int, instruction: Instruction) -> Emit:
        x, table = _operand(instruction, 0), _operand(instruction, 1)
        _, heads, size = instruction.result.shape
        if int(size) > 1024:
            raise UnsupportedError(f"backend 'cupy' rotates heads of at most 1024 elements, not {size}")

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            yield _launch(
                Kernel("elementwise", "rope", "Turn", 256),
                (shape.tokens, 1, 1),
                x=self._address(x, places),
                table=self._address(table, places),
                y=self._address(instruction.result, places),
                heads=int(heads),
                size=int(size),
                dims=int(table.shape[1]),
                halves=int(instruction.attributes["pairing"] == "halves"),
            )

        return emit

    def _kv_write(self, at: int, instruction: Instruction) -> Emit:
        cache, k, v, slots = (_operand(instruction, i) for i in range(4))
        self._source[instruction.result.index] = cache
        state = self._states[self._root(cache).name]
        width = state.kv_heads * state.head_size
        kernel = _elementwise(f"kv_write_{self._kv}", "Store")

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            yield _over(
                shape.tokens * width,
                256,
                kernel,
                k=self._address(k, places),
                v=self._address(v, places),
                slots=self._address(slots, places),
                keys=state.keys,
                values=state.values,
                block_bytes=state.block_bytes,
                count=shape.tokens,
                width=width,
                block_size=self._layout.block_size,
            )

        return emit

    def _rope_write(self, q: Instruction, k: Instruction, write: Instruction) -> Emit:
        state = self._states[self._root(_operand(write, 0)).name]
        heads, size = int(q.result.shape[1]), int(q.result.shape[2])
        items = (heads + 2 * state.kv_heads) * (size // 2)
        kernel = _elementwise(f"rope_and_store_{self._kv}", "Rope")

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            yield _launch(
                kernel, (-(-items // 256), shape.tokens, 1), q=self._address(_operand(q, 0), places),
                k=self._address(_operand(k, 0), places), v=self._address(_operand(write, 2), places),
                table=self._address(_operand(q, 1), places), slots=self._address(_operand(write, 3), places),
                q_out=self._address(q.result, places), keys=state.keys, values=state.values,
                block_bytes=state.block_bytes, heads=heads, kv_heads=state.kv_heads, size=size,
                dims=int(_operand(q, 1).shape[1]), halves=int(q.attributes["pairing"] == "halves"),
                block_size=self._layout.block_size,
            )  # fmt: skip

        return emit

    def _attention(self, at: int, instruction: Instruction) -> Emit:
        q, cache, tables = (_operand(instruction, i) for i in range(3))
        state = self._states[self._root(cache).name]
        heads, size = int(q.shape[1]), int(q.shape[2])
        if size > MOST_HEAD_SIZE:
            raise UnsupportedError(
                f"backend 'cupy' computes attention over heads of at most {MOST_HEAD_SIZE} elements, "
                f"not {size}"
            )
        workspace = self._plan.workspaces.get(at)
        window = instruction.attributes.get("window")
        scale, softcap = instruction.attributes["scale"], instruction.attributes.get("softcap")
        tiled = Kernel(
            "attention_tiles",
            f"attention_tiles_{self._kv}",
            "Attention",
            256,
            shared=tile_bytes(self._layout.dtype.itemsize),
        )

        def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
            given: dict[str, Any] = {
                "q": self._address(q, places),
                "keys": state.keys,
                "values": state.values,
                "tables": self._address(tables, places),
                "sequences": places.inputs["sequences"],
                "positions": places.inputs["positions"],
                "query_starts": places.inputs["query_starts"],
                "query_tiles": places.inputs["query_tiles"],
                "y": self._address(instruction.result, places),
                "partials": places.arena + workspace.offset if workspace else None,
                "counters": places.counters,
                "block_bytes": state.block_bytes,
                "tokens": shape.tokens,
                "blocks": shape.blocks,
                "heads": heads,
                "kv_heads": state.kv_heads,
                "size": size,
                "block_size": self._layout.block_size,
                "window": window or 0,
                "partitions": shape.partitions,
                "scale": scale,
                "softcap": softcap or 0.0,
            }
            if shape.query_tiles and size % 8 == 0 and size <= MOST_TILED_SIZE:
                yield _launch(tiled, (shape.query_tiles, heads, 1), **given)
                return
            busy = shape.tokens * state.kv_heads >= ENOUGH_BLOCKS
            split = (
                workspace is not None
                and shape.partitions > 1
                and shape.tokens * shape.partitions <= MOST_PARTIALS
                and not busy
            )
            name = f"attention_{'1_' if heads == state.kv_heads else ''}{'split_' if split else ''}{self._kv}"
            yield _launch(
                Kernel("attention", name, "Attention", PARTITION),
                (shape.partitions if split else 1, state.kv_heads, shape.tokens),
                **given,
            )

        return emit


def tile_bytes(itemsize: int) -> int:
    """Shared memory of a tile of queries: ``TileMemory`` in ``attention_tiles.cu``."""
    floats = QUERY_TILE * ((MOST_TILED_SIZE + 4) + (PARTITION + 4) + (PARTITION // 16 + 1))
    return 4 * floats + PARTITION * (8 + MOST_TILED_SIZE * itemsize + 16)


def stage_bytes(encoding: str, tiles: TileShape) -> int:
    """Shared memory of one stage: ``Stage`` in ``linear_a8_tiles.cu``."""
    layout, items = LAYOUTS[encoding], tiles.rows * STAGE_GROUPS * 16
    weights = items * (layout.codes + max(1, layout.high) + layout.scales)
    blocks = tiles.rows * 16 * max(1, layout.blocks)
    fields = 3 if layout.blocks or layout.scales == 4 else 2
    return weights + blocks + STAGE_GROUPS * tiles.tokens * (32 + 4 * fields)


_NORMS = {
    Kernel("elementwise", "norm_512", "Norm", 32): 512,
    Kernel("elementwise", "norm_8192", "Norm", 1024): 8192,
    Kernel("elementwise", "norm_32768", "Norm", 1024): 32768,
    Kernel("elementwise", "norm_any", "Norm", 32): inf,
}
"""Kernels of ``rms_norm``, with the most columns that each takes; all but the last take whole groups."""


def _operand(instruction: Instruction, number: int) -> Value:
    value = instruction.operands[number]
    if value is None:
        raise UnsupportedError(f"{instruction.op.name} lacks an operand that it needs")
    return value


def _number(instruction: Instruction, name: str) -> float:
    return float(instruction.attributes[name])  # type: ignore[arg-type]


def _elementwise(name: str, arguments: str) -> Kernel:
    return Kernel("elementwise", name, arguments, 256)


def _planes(weight: DeviceWeight) -> dict[str, int | None]:
    return {plane: weight.planes.get(plane) for plane in ("codes", "high", "scales", "blocks")}


def _launch(kernel: Kernel, grid: tuple[int, int, int], **arguments: int | float | None) -> Launch:
    return Launch(kernel, grid, pack(kernel.arguments, arguments))


def _over(items: int, threads: int, kernel: Kernel, /, **arguments: int | float | None) -> Launch:
    """One thread for each of so many items; one block, which finds nothing to do, for none."""
    return _launch(kernel, (max(1, -(-items // threads)), 1, 1), **arguments)
