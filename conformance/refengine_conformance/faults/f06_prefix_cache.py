"""Chapter *Paged KV*: faults of the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from refengine.memory import RELEASED, BlockAllocator, BlockTable, KVCacheManager, KVLayout, PrefixCache
from refengine.memory.prefix_cache import BlockPool, CachedBlock
from refengine_conformance.faults.fault import Fault
from refengine_conformance.faults.kv_cache_fault import cache_fault, prefix_fault, table_fault

# -- Keys and hits -----------------------------------------------------------------------------------------


class _RootWithoutSalt(PrefixCache):
    def root(self, salt: str) -> bytes:
        return super().root("")


class _RootWithoutLength(PrefixCache):
    def root(self, salt: str) -> bytes:
        return self._hash(b"refengine prefix cache 1\0" + salt.encode() + self._identity)


class _KeysOfOneBlock(PrefixCache):
    def _key(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> bytes:
        return self._hash(self.root(salt) + tokens)


class _LowBytes(PrefixCache):
    def _key(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> bytes:
        return super()._key(salt, parent, tokens[::4])


class _TrustsTheKey(PrefixCache):
    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        return self._entries.get(key)


class _ComparesTokensOnly(PrefixCache):
    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        found = self._entries.get(key)
        return found if found is not None and found.tokens == tokens else None


class _ComparesNoSalt(PrefixCache):
    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        found = self._entries.get(key)
        same = found is not None and found.tokens == tokens and found.parent is parent
        return found if same else None


class _AdoptsAll(KVCacheManager):
    def adopt(
        self,
        sequence: Hashable,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        *,
        again: bool = False,
    ) -> int:
        return super().adopt(sequence, [*tokens, 0], salt, len(tokens) if limit is None else limit)


class _KnowsNoLimit(KVCacheManager):
    def adopt(
        self,
        sequence: Hashable,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        *,
        again: bool = False,
    ) -> int:
        return super().adopt(sequence, tokens, salt)


class _FindsOne(PrefixCache):
    def walk(self, salt: str, tokens: bytes, block_bytes: int) -> list[CachedBlock]:
        return super().walk(salt, tokens, block_bytes)[:1]


# -- Prefixes and windows ----------------------------------------------------------------------------------


class _FullPoolsDecide(KVCacheManager):
    def _adoptable(self, chain: list[CachedBlock], tables: Sequence[BlockTable]) -> int:
        return len(chain)


class _WindowedByNumber(PrefixCache):
    """Windowed pools keep numbers of blocks, and no references to them."""

    def hold(self, entry: CachedBlock, pool: int, block: int) -> None:
        if pool in self._chained:
            super().hold(entry, pool, block)
        else:
            entry.blocks[pool] = block

    def _let_go(self, entry: CachedBlock, pool: int) -> None:
        if pool in self._chained:
            super()._let_go(entry, pool)


class _NeedsOneLess(BlockTable):
    def needed(self, blocks: int) -> range:
        needed = super().needed(blocks)
        return needed if self._window is None else needed[1:]


class _NeedsAll(BlockTable):
    def needed(self, blocks: int) -> range:
        return range(blocks)


# -- Publishing and eviction -------------------------------------------------------------------------------


class _KeepsEqualBlocks(KVCacheManager):
    def _join(self, cache: PrefixCache, entry: CachedBlock, pool: int, table: BlockTable, index: int) -> None:
        if entry.blocks[pool] == RELEASED:
            super()._join(cache, entry, pool, table, index)


class _PublishesTheUnfinished(KVCacheManager):
    def publish(self, sequence: Hashable, tokens: Sequence[int], salt: str, computed: int) -> None:
        size = self.layout.block_size
        super().publish(sequence, tokens, salt, min(len(tokens) // size, -(-computed // size)) * size)


class _PublishesTooLate(KVCacheManager):
    def publish(self, sequence: Hashable, tokens: Sequence[int], salt: str, computed: int) -> None:
        for table in self.tables(sequence):
            table.release_passed(computed)
        super().publish(sequence, tokens, salt, computed)


class _CachedAreUsed(KVCacheManager):
    @property
    def free_blocks(self) -> tuple[int, ...]:
        return tuple(pool.num_blocks - pool.num_used for pool in self.pools)


class _LatestFirst(BlockPool):
    def _evict(self) -> None:
        self._idle.move_to_end(next(reversed(self._idle)), last=False)
        super()._evict()


class _LowestFirst(BlockPool):
    def _evict(self) -> None:
        self._idle.move_to_end(min(self._idle), last=False)
        super()._evict()


class _EvictsUnderPressure(BlockPool):
    """Frees what it evicts, whoever else holds it; and takes for idle what was published by two."""

    def share(self, block: int) -> None:
        idle = block in self._idle
        super().share(block)
        if idle:
            self._idle[block] = None

    def uncache(self, block: int) -> None:
        while self.references(block) > 1:
            BlockAllocator.release(self, block)
        super().uncache(block)


def _pools_of(wrong: type[BlockPool]) -> Callable[..., KVCacheManager]:
    """A cache whose pools are of another class."""

    class Cache(KVCacheManager):
        def __init__(self, layout: KVLayout, prefix_cache: PrefixCache | None = None) -> None:
            super().__init__(layout, prefix_cache)
            for pool in self.pools:
                pool.__class__ = wrong

    return Cache


FAULTS: tuple[Fault, ...] = (
    prefix_fault(
        "tenants share prefixes",
        "KVC-20",
        _RootWithoutSalt,
        "The salt is an argument that nobody hashes: timing tells what others have asked.",
    ),
    prefix_fault(
        "salt and identity run into each other",
        "KVC-20",
        _RootWithoutLength,
        "Joined without a length: `ab` + `c` is `a` + `bc`.",
    ),
    prefix_fault(
        "a key hashes one block",
        "KVC-20",
        _KeysOfOneBlock,
        "The chain is forgotten: the same words behind other words.",
    ),
    prefix_fault(
        "a key hashes the low byte of each token",
        "KVC-20",
        _LowBytes,
        "`t & 0xFF`: every vocabulary above 256 collides (vllm-mlx#444).",
    ),
    prefix_fault(
        "the key is trusted",
        "KVC-21",
        _TrustsTheKey,
        "Only the hash is stored: a collision serves another prompt's cache (openvino.genai#3722).",
    ),
    prefix_fault(
        "a block's own tokens are compared, and not what came before",
        "KVC-21",
        _ComparesTokensOnly,
        "The mend of a collision that sees one block: the one before has collided.",
    ),
    prefix_fault(
        "a collision crosses tenants",
        "KVC-21",
        _ComparesNoSalt,
        "Tokens are compared and salts are not, which is what a salt is for.",
    ),
    cache_fault(
        "a whole prompt is adopted",
        "KVC-22",
        _AdoptsAll,
        "Nothing is left to compute, and there are no logits to sample from.",
    ),
    cache_fault(
        "the limit is not looked at",
        "KVC-22",
        _KnowsNoLimit,
        "Logits are wanted from an earlier position on, and were never computed.",
    ),
    prefix_fault(
        "one block is found", "KVC-22", _FindsOne, "The chain's second key is made from the root again."
    ),
    cache_fault(
        "full pools decide what is adopted",
        "KVC-23",
        _FullPoolsDecide,
        "What the window's layers need was evicted, and nobody asks them (kvcached#446).",
    ),
    prefix_fault(
        "windowed pools are cached by number",
        "KVC-23",
        _WindowedByNumber,
        "The window passes, the block goes to another, and the entry still names it (kvcached#446).",
    ),
    table_fault(
        "a window's first block is not needed",
        "KVC-23",
        _NeedsOneLess,
        "`window // block_size` blocks, where the window begins within one.",
    ),
    table_fault(
        "a windowed pool needs all of a prefix",
        "KVC-23",
        _NeedsAll,
        "Safe, and there is never a hit behind the window.",
    ),
    cache_fault(
        "equal blocks stay two",
        "KVC-24",
        _KeepsEqualBlocks,
        "Equal prompts that arrive together are kept as often as they came.",
    ),
    cache_fault(
        "unfinished blocks are published",
        "KVC-24",
        _PublishesTheUnfinished,
        "The prompt is known, and is taken for computed while it is cut into chunks.",
    ),
    cache_fault(
        "blocks are published behind the window",
        "KVC-22",
        _PublishesTooLate,
        "First release, then publish: windowed pools never have what a prefix needs.",
    ),
    cache_fault(
        "cached blocks count as used",
        "KVC-25",
        _CachedAreUsed,
        "Nobody is admitted, because of what nobody needs.",
    ),
    cache_fault(
        "the most recently used goes first",
        "KVC-25",
        _pools_of(_LatestFirst),
        "`popitem()` takes from the end.",
    ),
    cache_fault(
        "the lowest block goes first",
        "KVC-25",
        _pools_of(_LowestFirst),
        "A set has no order of use; and a prompt loses its beginning before its end.",
    ),
    cache_fault(
        "eviction frees what is read",
        "KVC-25",
        _pools_of(_EvictsUnderPressure),
        "A block is adopted and stays on the list of those to evict: use after free (vllm#37076).",
    ),
)
