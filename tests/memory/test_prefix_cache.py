"""The prefix cache: what it counts, what it costs, and what it refuses."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from refengine.errors import MemoryManagerError, SequenceStateError
from refengine.memory import KVCacheManager, KVGroupLayout, KVLayout, PrefixCache, PrefixStatistics, verify


def manager(cache: PrefixCache, *windows: int | None, blocks: int = 16) -> KVCacheManager:
    """Pools of 16 blocks of 4 positions."""
    groups = tuple(KVGroupLayout(window, ((g, 1, 8),), blocks) for g, window in enumerate(windows))
    return KVCacheManager(KVLayout(4, np.dtype(np.float16), groups), cache)


def compute(made: KVCacheManager, name: str, tokens: tuple[int, ...], salt: str = "") -> None:
    """A whole prompt, and its end."""
    made.grow(name, len(tokens))
    made.publish(name, tokens, salt, len(tokens))
    made.release_passed(name, len(tokens))
    made.release(name)


def test_statistics_count_prompts_tokens_and_hits() -> None:
    """Two lookups of 9 and 10 tokens: none found, then 8; and nothing was evicted."""
    made = manager(PrefixCache(), None)
    assert made.adopt("a", range(9)) == 0
    compute(made, "a", tuple(range(9)))
    assert made.adopt("b", range(10)) == 8
    assert made.prefix_cache.statistics == PrefixStatistics(2, 19, 8, 0, 2)


def test_a_full_window_is_found_after_the_window_has_moved_on() -> None:
    """What a window has passed stays cached as long as there is room; a shorter prefix finds its own there."""
    made = manager(PrefixCache(), None, 5)
    tokens = tuple(range(32))
    made.grow("a", 32)
    made.publish("a", tokens, "", 32)
    made.release_passed("a", 32)
    assert made.held("a") == (8, 1)
    assert made.adopt("b", tokens[:17]) == 16
    assert made.tables("b")[1].blocks.tolist() == [-1, -1, -1, 3]


def test_a_window_that_was_evicted_shortens_the_prefix() -> None:
    """The windowed pool lacks positions 12 to 15: 12 positions can be adopted, whose window is still there."""
    made = manager(PrefixCache(), None, 5, blocks=8)
    compute(made, "a", tuple(range(16)))
    last = next(e for e in made.prefix_cache.entries() if e.blocks[1] == 3)
    made.pools[1].uncache(3)
    last.blocks[1] = -1
    assert made.adopt("b", range(17)) == 12


def test_each_block_is_hashed_once_by_its_sequence() -> None:
    """One hash per full block, and one for the root; however often a growing sequence is published."""
    hashed = []

    def counting(data: bytes) -> bytes:
        hashed.append(data)
        return hashlib.sha256(data).digest()

    made, tokens = manager(PrefixCache(hash=counting), None), list(range(40))
    for length in range(1, 41):
        made.grow("a", length)
        made.publish("a", tokens, "", length)
        made.release_passed("a", length)
    assert len(hashed) == 10 + 1


def test_idle_blocks_are_bounded_where_that_is_asked_for() -> None:
    """At most 2 blocks that nobody else holds: a prompt's first ones are kept, its tail goes."""
    made = manager(PrefixCache(max_idle_blocks=2), None)
    compute(made, "a", tuple(range(16)))
    assert made.pools[0].idle == (1, 0)
    assert made.adopt("b", range(16)) == 8
    verify(made)


def test_a_cache_without_windows_to_chain_keeps_what_leads_to_its_blocks() -> None:
    """Where all pools have windows, blocks are found behind others that are gone, until they are gone too."""
    made = manager(PrefixCache(), 5, blocks=4)
    tokens = tuple(range(16))
    for length in range(1, 17):
        made.grow("a", length)
        made.publish("a", tokens, "", length)
        made.release_passed("a", length)
    made.release("a")
    made.grow("b", 8)  # the two blocks least recently used
    assert made.adopt("c", range(17)) == 16
    made.release("c")
    made.grow("b", 16)
    assert len(made.prefix_cache) == 0


def test_other_tokens_and_salts_are_refused_for_a_published_sequence() -> None:
    """Its blocks are found under what they were published for, and hold nothing else."""
    made = manager(PrefixCache(), None)
    made.grow("a", 8)
    made.publish("a", range(8), "", 4)
    with pytest.raises(SequenceStateError, match="another salt"):
        made.publish("a", range(8), "other", 8)
    with pytest.raises(SequenceStateError, match="other tokens"):
        made.publish("a", range(1, 9), "", 8)
    with pytest.raises(SequenceStateError, match="has begun already"):
        made.adopt("a", range(8))
    verify(made)


def test_a_prefix_cache_belongs_to_one_kv_cache() -> None:
    """Blocks are numbers of its pools."""
    cache = PrefixCache()
    manager(cache, None)
    with pytest.raises(MemoryManagerError, match="belongs to one KV cache"):
        manager(cache, None)


def test_without_a_prefix_cache_nothing_is_found_or_kept() -> None:
    """Adopting and publishing are allowed and do nothing."""
    groups = (KVGroupLayout(None, ((0, 1, 8),), 4),)
    made = KVCacheManager(KVLayout(4, np.dtype(np.float16), groups))
    compute(made, "a", tuple(range(8)))
    assert made.adopt("b", range(8)) == 0
    assert made.pools[0].num_cached == 0
