"""The prefix cache: full blocks found again by the tokens that led to them."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from refengine.errors import MemoryManagerError
from refengine.memory.block_table import RELEASED
from refengine.memory.blocks import BlockAllocator

_DOMAIN = b"refengine prefix cache 1\0"


def sha256(data: bytes) -> bytes:
    """SHA-256 (FIPS 180-4): 32 bytes."""
    import hashlib  # brings OpenSSL, which takes megabytes; an engine without a prefix cache hashes nothing

    return hashlib.sha256(data).digest()


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return struct.pack(f"<{len(tokens)}i", *tokens)


@dataclass(eq=False)
class CachedBlock:
    """A full block of some prefix, in every pool that still has it.

    Attributes:
        key: of the tokens up to its end.
        salt: of the prefix.
        parent: the block before it, ``None`` for the first.
        tokens: its own, packed.
        blocks: by pool; ``RELEASED`` where a pool has it no longer, or never had.
        children: the blocks that continue it, by key.
    """

    key: bytes
    salt: str
    parent: CachedBlock | None
    tokens: bytes
    blocks: list[int]
    children: dict[bytes, CachedBlock] = field(default_factory=dict)


@dataclass(frozen=True)
class PrefixStatistics:
    """What the cache was good for.

    Attributes:
        lookups: prompts looked up.
        tokens: that these had.
        hit_tokens: of those, the ones that were found.
        evictions: blocks that were given up for lack of room.
        entries: cached blocks now, counted once over all pools.
    """

    lookups: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    entries: int = 0


class BlockPool(BlockAllocator):
    """A pool whose blocks the prefix cache holds too.

    Blocks that only the cache holds are idle: they count as free, and are given up, least recently used
    first, when the free ones do not suffice.

    Args:
        num_blocks, segment_blocks: see ``BlockAllocator``.
        max_idle: idle blocks at most, ``None`` for as many as there is room for.

    Clauses: KVC-25.
    """

    def __init__(self, num_blocks: int, segment_blocks: int = 1, max_idle: int | None = None) -> None:
        super().__init__(num_blocks, segment_blocks)
        self._max_idle = max_idle
        self._cached: dict[int, CachedBlock] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.evictions = 0
        self.give_up: Callable[[CachedBlock], None] = _nothing

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, idle ones among them."""
        return super().num_free + len(self._idle)

    @property
    def idle(self) -> tuple[int, ...]:
        """Blocks that only the cache holds, in the order in which they will be given up."""
        return tuple(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that the cache holds, alone or not."""
        return len(self._cached)

    def holders(self, block: int) -> int:
        """References that are not the cache's."""
        return self.references(block) - (block in self._cached)

    def allocate(self, count: int = 1) -> list[int]:
        """Take the lowest free blocks; where they do not suffice, idle ones are given up for it before."""
        if count <= self.num_free:
            while count > super().num_free:
                self._evict()
        return super().allocate(count)

    def share(self, block: int) -> None:
        """Add a reference to a block in use; an idle one is in use again."""
        super().share(block)
        self._idle.pop(block, None)

    def release(self, block: int) -> bool:
        """Drop a reference; tells whether nobody holds the block now, not even the cache."""
        freed = super().release(block)
        if block in self._cached and not freed and self._references[block] == 1:
            self._idle[block] = None
            while self._max_idle is not None and len(self._idle) > self._max_idle:
                self._evict()
        return freed

    def cache(self, block: int, entry: CachedBlock) -> None:
        """Let the cache hold a block."""
        self.share(block)
        self._cached[block] = entry

    def uncache(self, block: int) -> None:
        """Let the cache drop a block."""
        del self._cached[block]
        self._idle.pop(block, None)
        self.release(block)

    def _evict(self) -> None:
        self.evictions += 1
        self.give_up(self._cached[next(iter(self._idle))])


def _nothing(entry: CachedBlock) -> None:
    """What a pool without a prefix cache does with its cached blocks, of which there are none."""


class PrefixCache:
    """Finds the blocks of a prefix that was computed before.

    A block's key hashes all tokens up to its end, the salt (one per tenant: prefixes of different salts
    share nothing) and the identity of what computes. A key only leads to a candidate: it counts where salt,
    tokens and the block before it are the same, so that no collision of keys can serve another prompt.

    Args:
        identity: of the model and everything else that keys and values depend on.
        max_idle_blocks: blocks that only the cache holds, in each pool at most; ``None`` for no bound but the
            pool's.
        hash: of keys.

    Clauses: KVC-20, KVC-21, KVC-22.
    """

    def __init__(
        self,
        identity: bytes = b"",
        max_idle_blocks: int | None = None,
        *,
        hash: Callable[[bytes], bytes] = sha256,
    ) -> None:
        self.max_idle_blocks = max_idle_blocks
        self._identity, self._hash = identity, hash
        self._entries: dict[bytes, CachedBlock] = {}
        self._pools: tuple[BlockPool, ...] = ()
        self._chained: tuple[int, ...] = ()
        self._lookups = self._tokens = self._hit_tokens = 0

    def attach(self, pools: tuple[BlockPool, ...], chained: tuple[int, ...]) -> None:
        """Work on these pools; ``chained`` are those in which a block is no good without all before it.

        Raises:
            MemoryManagerError: it works on others already.
        """
        if self._pools:
            raise MemoryManagerError("a prefix cache belongs to one KV cache; make another for the other")
        self._pools, self._chained = pools, chained
        for number, pool in enumerate(pools):
            pool.give_up = partial(self._give_up, pool=number)

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Iterable[CachedBlock]:
        """All cached blocks."""
        return self._entries.values()

    @property
    def statistics(self) -> PrefixStatistics:
        """What the cache was good for so far."""
        return PrefixStatistics(
            self._lookups,
            self._tokens,
            self._hit_tokens,
            sum(pool.evictions for pool in self._pools),
            len(self._entries),
        )

    def count(self, tokens: int, hit: int) -> None:
        """Count a prompt that was looked up, and how many of its tokens were found."""
        self._lookups, self._tokens, self._hit_tokens = (
            self._lookups + 1,
            self._tokens + tokens,
            self._hit_tokens + hit,
        )

    def root(self, salt: str) -> bytes:
        """The key before the first block.

        Clauses: KVC-20.
        """
        encoded = salt.encode()
        return self._hash(_DOMAIN + struct.pack("<Q", len(encoded)) + encoded + self._identity)

    def find(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        """The block of these tokens behind ``parent``, if it is cached.

        Clauses: KVC-21.
        """
        return self._match(self._key(salt, parent, tokens), salt, parent, tokens)

    def walk(self, salt: str, tokens: bytes, block_bytes: int) -> list[CachedBlock]:
        """The cached blocks of these tokens, as far as they follow each other."""
        chain: list[CachedBlock] = []
        for start in range(0, len(tokens), block_bytes):
            entry = self.find(salt, chain[-1] if chain else None, tokens[start : start + block_bytes])
            if entry is None:
                break
            chain.append(entry)
        return chain

    def add(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        """The block of these tokens behind ``parent``, new where it was not cached.

        ``None`` where another block has its key: the first keeps it.

        Clauses: KVC-21, KVC-24.
        """
        key = self._key(salt, parent, tokens)
        if key in self._entries:
            return self._match(key, salt, parent, tokens)
        entry = CachedBlock(key, salt, parent, tokens, [RELEASED] * len(self._pools))
        self._entries[key] = entry
        if parent is not None:
            parent.children[key] = entry
        return entry

    def hold(self, entry: CachedBlock, pool: int, block: int) -> None:
        """Hold a block for an entry that has none in this pool."""
        entry.blocks[pool] = block
        self._pools[pool].cache(block, entry)

    def is_live(self, entry: CachedBlock) -> bool:
        """Whether an entry is still in the cache, and so all before it."""
        return self._entries.get(entry.key) is entry

    def prune(self, entry: CachedBlock) -> None:
        """Forget an entry that has no block and leads to none; and so those before it."""
        left: CachedBlock | None = entry
        while left is not None and not left.children and set(left.blocks) == {RELEASED}:
            self._remove(left)
            left = left.parent

    def _match(self, key: bytes, salt: str, parent: CachedBlock | None, tokens: bytes) -> CachedBlock | None:
        found = self._entries.get(key)
        if found is None or found.salt != salt or found.parent is not parent or found.tokens != tokens:
            return None
        return found

    def _key(self, salt: str, parent: CachedBlock | None, tokens: bytes) -> bytes:
        return self._hash((self.root(salt) if parent is None else parent.key) + tokens)

    def _give_up(self, entry: CachedBlock, pool: int) -> None:
        """Drop a block, and with it all that is of no use without it."""
        if pool in self._chained:
            self._drop_from(entry)
            return
        self._let_go(entry, pool)
        self.prune(entry)

    def _drop_from(self, entry: CachedBlock) -> None:
        self._remove(entry)
        stack = [entry]
        while stack:
            dropped = stack.pop()
            for pool in range(len(self._pools)):
                self._let_go(dropped, pool)
            for key in dropped.children:
                del self._entries[key]
            stack += dropped.children.values()

    def _remove(self, entry: CachedBlock) -> None:
        del self._entries[entry.key]
        if entry.parent is not None:
            del entry.parent.children[entry.key]

    def _let_go(self, entry: CachedBlock, pool: int) -> None:
        if entry.blocks[pool] != RELEASED:
            self._pools[pool].uncache(entry.blocks[pool])
            entry.blocks[pool] = RELEASED
