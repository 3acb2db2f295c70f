"""The sanitiser: every number a KV cache keeps, counted again from its tables and its prefix cache."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from refengine.errors import BlockStateError
from refengine.memory.block_table import RELEASED
from refengine.memory.kv_cache import KVCacheManager
from refengine.memory.prefix_cache import PrefixCache, packed

Owners = Mapping[int, Sequence[str]]
"""By block: who holds it, in words, as often as they do."""


def verify(manager: KVCacheManager, tokens: Mapping[Hashable, Sequence[int]] | None = None) -> None:
    """Compare what a manager has counted with what its tables, noted copies and prefix cache say.

    Takes time in proportion to the blocks in use: for checking, not for serving.

    Args:
        manager: between two of its calls.
        tokens: of sequences; where given, the blocks that these share through the prefix cache must be those
            of these tokens.

    Raises:
        BlockStateError: a count is wrong; with the block, its owners, and both counts.
    """
    for number in range(len(manager.pools)):
        owners = _owners(manager, number)
        _verify_counts(manager, number, owners)
        _verify_writers(manager, number, owners)
    if manager.prefix_cache is not None:
        _verify_chains(manager, manager.prefix_cache, tokens or {})


def _owners(manager: KVCacheManager, number: int) -> Owners:
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for sequence in manager.sequences:
        for block in manager.tables(sequence)[number].blocks.tolist():
            if block != RELEASED:
                owners[block].append(f"sequence {sequence!r}")
    for copy in manager.pending_copies:
        if copy.pool == number:
            owners[copy.source].append("a copy to be made")
    for entry in () if manager.prefix_cache is None else manager.prefix_cache.entries():
        if entry.blocks[number] != RELEASED:
            owners[entry.blocks[number]].append("the prefix cache")
    return owners


def _verify_counts(manager: KVCacheManager, number: int, owners: Owners) -> None:
    pool = manager.pools[number]
    for block in range(pool.num_blocks):
        held_by = owners.get(block, ())
        if pool.references(block) != len(held_by):
            raise BlockStateError(
                f"pool {number}, block {block}: {pool.references(block)} references are counted, and it is "
                f"held {len(held_by)} times: by {', '.join(held_by) or 'nobody'}"
            )
        twice = [
            name for name, times in Counter(held_by).items() if times > 1 and name != "a copy to be made"
        ]
        if twice:
            raise BlockStateError(f"pool {number}, block {block}: held more than once by {', '.join(twice)}")
    for block in owners.keys() - range(pool.num_blocks):
        raise BlockStateError(
            f"pool {number} has {pool.num_blocks} blocks and {owners[block][0]} names {block}"
        )
    idle = {block for block, held_by in owners.items() if list(held_by) == ["the prefix cache"]}
    if set(pool.idle) != idle:
        wrong = min(set(pool.idle) ^ idle)
        raise BlockStateError(
            f"pool {number}, block {wrong}: held by {', '.join(owners.get(wrong, ())) or 'nobody'}, and "
            f"{'counted' if wrong in pool.idle else 'not counted'} as held by the prefix cache alone"
        )
    free = pool.num_blocks - len(owners) + len(idle)
    if pool.num_free != free:
        raise BlockStateError(f"pool {number}: {pool.num_free} blocks are counted as free, and {free} are")
    segment_blocks = manager.layout.segment_blocks(number)
    segments = tuple(sorted({block // segment_blocks for block in owners}))
    if pool.segments != segments:
        raise BlockStateError(
            f"pool {number}: segments {pool.segments} are counted as used, and {segments} are"
        )


def _verify_writers(manager: KVCacheManager, number: int, owners: Owners) -> None:
    """A block to be written belongs to its writer alone; a copy made from it before does not count."""
    size = manager.layout.block_size
    for sequence in manager.sequences:
        positions, table = manager.writable(sequence), manager.tables(sequence)[number]
        for index in range(positions.start // size, -(-positions.stop // size)) if positions else ():
            others = [
                name
                for name in owners.get(table[index], ())
                if name not in (f"sequence {sequence!r}", "a copy to be made")
            ]
            if others:
                raise BlockStateError(
                    f"pool {number}, block {table[index]}: sequence {sequence!r} is about to write it, and "
                    f"{', '.join(others)} holds it too: {1 + len(others)} holders, where 1 is expected"
                )


def _verify_chains(
    manager: KVCacheManager, cache: PrefixCache, tokens: Mapping[Hashable, Sequence[int]]
) -> None:
    """Cached blocks are found by their keys; a sequence's are in its tables, and of its own tokens."""
    for entry in cache.entries():
        if cache.find(entry.salt, entry.parent, entry.tokens) is not entry:
            raise BlockStateError(f"the prefix cache cannot find its blocks {entry.blocks} by their tokens")
    size = manager.layout.block_size
    for sequence in manager.sequences:
        for index, entry in enumerate(manager.chain(sequence)):
            for number, table in enumerate(manager.tables(sequence)):
                cached, own = entry.blocks[number], table[index]
                if RELEASED not in (cached, own) and cached != own:
                    raise BlockStateError(
                        f"pool {number}: positions {index * size} to {(index + 1) * size - 1} of sequence "
                        f"{sequence!r} lie in block {own}, and the prefix cache says in block {cached}"
                    )
            if sequence in tokens and entry.tokens != packed(
                tokens[sequence][index * size : (index + 1) * size]
            ):
                raise BlockStateError(
                    f"positions {index * size} to {(index + 1) * size - 1} of sequence {sequence!r} lie in "
                    f"blocks {entry.blocks}, which the prefix cache has under other tokens"
                )
