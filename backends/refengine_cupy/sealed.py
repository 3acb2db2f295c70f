"""Launches for a sealed KV cache: what seals the blocks that a step fills, and attention over them."""

from __future__ import annotations

from collections.abc import Iterable

from refengine.errors import UnsupportedError
from refengine.program import Instruction
from refengine.quantizer import SEALED_KEYS
from refengine_cupy.attention import (
    MOST_TILED_SIZE,
    PARTITION,
    QUERY_TILE,
    Attending,
    tile_bytes,
)
from refengine_cupy.binding import Binding, operand
from refengine_cupy.kv import LayerPlace
from refengine_cupy.launches import Emit, launch
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel, formats_name
from refengine_cupy.step_shape import Places, StepShape

RUN = 16
"""Positions whose values are added up before they join others; see ``attention.h``."""

SEALED_TILE_BYTES = tile_bytes() + 4 * QUERY_TILE
"""Shared memory of a tile of queries: ``SealedTileMemory`` in ``attention_sealed_tiles.cu``."""


def kv_seal(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Blocks that the step fills, sealed. Which these are the kernel finds out itself: launches depend on the
    step's shape only, which says no more than whether there are any.
    """
    cache, exact, tables, exact_tables = (operand(instruction, i) for i in range(4))
    sealed, copies = binding.state(cache), binding.state(exact)
    kernel = Kernel("seal", "kv_seal", "Seal", 128, _version(binding, sealed, copies, even=False))
    block_size = binding.layout.block_size

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        if not shape.fills:
            return
        stretch = min(block_size, max(1, shape.tokens // shape.sequences))
        yield launch(
            kernel, (-(-shape.tokens // stretch), sealed.kv_heads, 2), exact_keys=copies.keys,
            exact_values=copies.values, keys=sealed.keys, values=sealed.values,
            exact_tables=binding.address(exact_tables, places), tables=binding.address(tables, places),
            sequences=places.inputs["sequences"], positions=places.inputs["positions"],
            exact_block_bytes=copies.block_bytes, block_bytes=sealed.block_bytes, tokens=shape.tokens,
            blocks=shape.blocks, kv_heads=sealed.kv_heads, size=sealed.head_size, block_size=block_size,
            stretch=stretch,
        )  # fmt: skip

    return emit


def sealed_attention(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Attention that reads the first block and a query's own from exact copies, others as sealed.

    Blocks of whole runs of positions, with heads of whole chunks, are read by words, and by tiles of queries
    where sequences have many; others number by number, each query by itself.
    """
    cache, exact, tables, exact_tables = (operand(instruction, i) for i in range(1, 5))
    sealed, copies = binding.state(cache), binding.state(exact)
    attending = Attending(binding, at, instruction, copies, exact_tables)
    even = reads_words(sealed, copies, binding.layout.block_size)
    version = _version(binding, sealed, copies, even=even)
    name = "attention_sealed"
    tiled = Kernel(f"{name}_tiles", f"{name}_tiles", "Attention", 256, version, SEALED_TILE_BYTES)
    tiles = even and attending.size <= MOST_TILED_SIZE and binding.shared_bytes >= SEALED_TILE_BYTES

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        given = attending.arguments(shape, places) | {
            "sealed_keys": sealed.keys,
            "sealed_values": sealed.values,
            "sealed_tables": binding.address(tables, places),
            "sealed_block_bytes": sealed.block_bytes,
        }
        if tiles and shape.query_tiles:
            yield launch(tiled, (shape.query_tiles, attending.heads, 1), **given)
            return
        single = f"{name}_{attending.version(attending.split(shape))}".rstrip("_")
        kernel = Kernel(name, single, "Attention", PARTITION, version)
        yield launch(kernel, attending.grid(shape), **given)

    return emit


def reads_words(sealed: LayerPlace, exact: LayerPlace, block_size: int) -> bool:
    """Whether all that kernels read at once lies at a multiple of its bytes, and in one block."""
    formats, size = sealed.formats or (), sealed.head_size
    floats = any(name.startswith("float") for name in formats)
    return (
        block_size % RUN == 0
        and size % (16 if "int4" in formats else 8) == 0
        and sealed.aligned(16 if floats else 8)
        and exact.aligned(16)
    )


def _version(binding: Binding, sealed: LayerPlace, exact: LayerPlace, *, even: bool) -> str:
    if sealed.formats is None or exact.formats is not None or not SEALED_KEYS.keys() >= {*sealed.formats}:
        raise UnsupportedError(f"backend 'cupy' has no kernels for sealed keys and values {sealed.formats}")
    return formats_name(*sealed.formats, binding.layout.dtype.name, even=even)
