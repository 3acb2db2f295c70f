"""Launches of attention, and of what writes the keys and values that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from refengine.errors import UnsupportedError
from refengine.program import Instruction, Value
from refengine_cupy.binding import Binding, operand
from refengine_cupy.kv import LayerPlace
from refengine_cupy.launches import Emit, elementwise_kernel, launch, over
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel
from refengine_cupy.step_shape import Places, StepShape

PARTITION = 128
"""Positions that attention treats at once; see ``attention.h``."""

MOST_PARTIALS = 512
"""Partitions, times tokens, whose results attention may keep until they are joined."""

ENOUGH_BLOCKS = 512
"""Blocks of threads that keep a device busy: with so many, attention need not cut contexts up."""

MOST_HEAD_SIZE = 256
"""Elements of a head, in attention."""

HALVES_COMPANY = 2
"""Blocks of threads that share a multiprocessor, where matrix units compute attention query by query."""

QUERY_TILE = 64
"""Queries that attention treats at once, where a sequence has many."""

GROUPS_TILE = 2 * QUERY_TILE
"""The same, by warpgroups."""

GROUPS = "attention_halves_groups"
"""The module of tiles by warpgroups."""

MOST_TILED_SIZE = 128
"""Elements of a head, in attention by tiles of queries."""


def attention_workspace(instruction: Instruction, sizes: Mapping[str, int]) -> int:
    """Bytes of what partitions leave to be joined."""
    q = instruction.operands[0]
    if q is None:
        return 0
    _, heads, size = q.shape
    return MOST_PARTIALS * int(heads) * (int(size) + 2) * 4


def tile_bytes() -> int:
    """Shared memory of a tile of queries over float32: ``TileMemory`` in ``attention_tile.h``."""
    floats = QUERY_TILE * ((MOST_TILED_SIZE + 4) + (PARTITION + 4) + (PARTITION // 16 + 1))
    return 4 * floats + PARTITION * (8 + MOST_TILED_SIZE * 4 + 16)


def halves_bytes(padded: int) -> tuple[int, int]:
    """Shared memory of the kernels of matrix units: for queries one by one, and by tiles.

    ``FewMemory`` in ``attention_halves.cu`` and ``TileMemory`` in ``attention_halves_tiles.cu``, for heads of
        so many elements.
    """
    one = PARTITION * padded * 2
    weights, queries = 2 * 8 * PARTITION * 2, 2 * QUERY_TILE * padded * 2
    few = 3 * one + weights + 2 * 4 * 8 * 4 + 4 * PARTITION * 8 + 2 * padded * 2
    return few, 2 * one + PARTITION * 8 + queries


def groups_bytes(padded: int) -> int:
    """Shared memory of the kernel of warpgroups, likewise: ``GroupMemory`` in
    ``attention_halves_groups.cu``.
    """
    numbers = (4 * PARTITION + 2 * GROUPS_TILE) * padded * 2
    barriers, others = 11 * 8, 10 * 4
    return -(-(numbers + 2 * PARTITION * 16 + 2 * PARTITION * 8 + barriers + others) // 16) * 16


def groups_tiles(shape: StepShape) -> int:
    """Blocks of threads that have a head, by warpgroups: enough, where each sequence has an odd number of
    tiles.
    """
    return (shape.query_tiles + shape.sequences) // 2


def halves_blocks(partitions: int, others: int, multiprocessors: int) -> int:
    """Blocks of threads that a context is cut up for, where matrix units compute attention query by query.

    As many as a device has room for at once beside ``others``, the number of queries times that of key heads;
    each takes every so many-th partition.
    """
    return min(partitions, max(2, HALVES_COMPANY * multiprocessors // others))


def kv_write(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Keys and values into their slots."""
    cache, k, v, slots = (operand(instruction, i) for i in range(4))
    state = binding.state(cache)
    width = state.kv_heads * state.head_size
    kernel = elementwise_kernel(f"kv_write_{binding.kv}", "Store")

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        yield over(
            shape.tokens * width,
            256,
            kernel,
            k=binding.address(k, places),
            v=binding.address(v, places),
            slots=binding.address(slots, places),
            keys=state.keys,
            values=state.values,
            block_bytes=state.block_bytes,
            count=shape.tokens,
            width=width,
            block_size=binding.layout.block_size,
        )

    return emit


def rope_write(binding: Binding, q: Instruction, k: Instruction, write: Instruction) -> Emit:
    """Queries turned, and keys turned on the way into their slots."""
    state = binding.state(operand(write, 0))
    heads, size = int(q.result.shape[1]), int(q.result.shape[2])
    items = (heads + 2 * state.kv_heads) * (size // 2)
    kernel = elementwise_kernel(f"rope_and_store_{binding.kv}", "Rope")

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        yield launch(
            kernel, (-(-items // 256), shape.tokens, 1), q=binding.address(operand(q, 0), places),
            k=binding.address(operand(k, 0), places), v=binding.address(operand(write, 2), places),
            table=binding.address(operand(q, 1), places), slots=binding.address(operand(write, 3), places),
            q_out=binding.address(q.result, places), keys=state.keys, values=state.values,
            block_bytes=state.block_bytes, heads=heads, kv_heads=state.kv_heads, size=size,
            dims=int(operand(q, 1).shape[1]), halves=int(q.attributes["pairing"] == "halves"),
            block_size=binding.layout.block_size,
        )  # fmt: skip

    return emit


def attention(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Attention: by tiles of queries where sequences have many; else query by query, cut up over its context
    where the device would have too little to do.

    By matrix units where there are some, keys and values are float16, and heads are small enough.
    """
    cache, tables = operand(instruction, 1), operand(instruction, 2)
    attending = Attending(binding, at, instruction, binding.state(cache), tables)
    halves = halves_kernels(binding, attending.size)
    single, tiled = halves or _scalars(binding, attending)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        given = attending.arguments(shape, places)
        if tiled is not None and shape.query_tiles:
            tiles = groups_tiles(shape) if tiled.module == GROUPS else shape.query_tiles
            yield launch(tiled, (tiles, attending.heads, 1), **given)
            return
        grid = attending.halves_grid(shape) if halves else attending.grid(shape)
        yield launch(single(attending.split(shape)), grid, **given)

    return emit


Versions = tuple[Callable[[bool], Kernel], Kernel | None]
"""For queries one by one, given whether contexts are cut up; and for tiles of queries, if there is one."""


def halves_kernels(binding: Binding, size: int) -> Versions | None:
    """Those of matrix units, where they can be used."""
    padded = 64 if size <= 64 else 128
    few, tile = halves_bytes(padded)
    usable = binding.matrix_units and binding.kv == "f16" and size <= padded and few <= binding.shared_bytes
    if not usable:
        return None

    def single(split: bool) -> Kernel:
        name = f"attention_halves_{'split_' if split else ''}{padded}"
        return Kernel("attention_halves", name, "Attention", 128, shared=few)

    name = "attention_halves_tiles"
    tiled = Kernel(name, f"{name}_{padded}", "Attention", 128, shared=tile)
    if binding.warpgroups:
        tiled = Kernel(GROUPS, f"{GROUPS}_{padded}", "Attention", 384, shared=groups_bytes(padded))
    return single, tiled if tiled.shared <= binding.shared_bytes else None


def _scalars(binding: Binding, attending: Attending) -> Versions:
    """Those that compute in float32 as it is."""

    def single(split: bool) -> Kernel:
        name = f"attention_{attending.version(split)}{binding.kv}"
        return Kernel("attention", name, "Attention", PARTITION)

    tiled = Kernel("attention_tiles", "attention_tiles", "Attention", 256, shared=tile_bytes())
    fits = (
        binding.kv == "f32"
        and attending.size % 8 == 0
        and attending.size <= MOST_TILED_SIZE
        and tiled.shared <= binding.shared_bytes  # AMD's devices have less
    )
    return single, tiled if fits else None


class Attending:
    """An instruction of attention, over a plain cache or a sealed one.

    Args:
        binding: where everything is.
        at: the position of the instruction.
        instruction: its first operand are the queries.
        place: where keys and values are as they were written.
        tables: the value that is their block tables.

    Raises:
        UnsupportedError: heads are larger than kernels can do.
    """

    def __init__(
        self, binding: Binding, at: int, instruction: Instruction, place: LayerPlace, tables: Value
    ) -> None:
        self._binding, self._instruction, self._place, self._tables = binding, instruction, place, tables
        self.workspace = binding.plan.workspaces.get(at)
        q = operand(instruction, 0)
        self.heads, self.size = int(q.shape[1]), int(q.shape[2])
        if self.size > MOST_HEAD_SIZE:
            raise UnsupportedError(
                f"backend 'cupy' computes attention over heads of at most {MOST_HEAD_SIZE} elements, "
                f"not {self.size}"
            )

    def split(self, shape: StepShape) -> bool:
        """Whether contexts are cut up, each query by itself."""
        return (
            self.workspace is not None
            and shape.partitions > 1
            and shape.tokens * shape.partitions <= MOST_PARTIALS
            and shape.tokens * self._place.kv_heads < ENOUGH_BLOCKS
        )

    def version(self, split: bool) -> str:
        """The part of a kernel's name that says what it is for, each query by itself."""
        return f"{'1_' if self.heads == self._place.kv_heads else ''}{'split_' if split else ''}"

    def grid(self, shape: StepShape) -> tuple[int, int, int]:
        """Blocks of threads, each query by itself."""
        return shape.partitions if self.split(shape) else 1, self._place.kv_heads, shape.tokens

    def halves_grid(self, shape: StepShape) -> tuple[int, int, int]:
        """The same, for matrix units."""
        partitions, kv_heads, tokens = self.grid(shape)
        return halves_blocks(partitions, kv_heads * tokens, self._binding.multiprocessors), kv_heads, tokens

    def arguments(self, shape: StepShape, places: Places) -> dict[str, Any]:
        """The fields of ``Attention``; those of a sealed cache are null."""
        binding, place, attributes = self._binding, self._place, self._instruction.attributes
        return {
            "q": binding.address(operand(self._instruction, 0), places),
            "keys": place.keys,
            "values": place.values,
            "sealed_keys": None,
            "sealed_values": None,
            "tables": binding.address(self._tables, places),
            "sealed_tables": None,
            "sequences": places.inputs["sequences"],
            "positions": places.inputs["positions"],
            "query_starts": places.inputs["query_starts"],
            "query_tiles": places.inputs["query_tiles"],
            "y": binding.address(self._instruction.result, places),
            "partials": places.arena + self.workspace.offset if self.workspace else None,
            "counters": places.counters,
            "block_bytes": place.block_bytes,
            "sealed_block_bytes": 0,
            "tokens": shape.tokens,
            "blocks": shape.blocks,
            "heads": self.heads,
            "kv_heads": place.kv_heads,
            "size": self.size,
            "block_size": binding.layout.block_size,
            "window": attributes.get("window") or 0,
            "partitions": shape.partitions,
            "scale": attributes["scale"],
            "softcap": attributes.get("softcap") or 0.0,
            **dict.fromkeys(("new_keys", "new_values", "turns", "slots")),
            **dict.fromkeys(("dims", "halves"), 0),
        }
