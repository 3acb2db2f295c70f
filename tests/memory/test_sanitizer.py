"""The sanitiser finds whatever is wrong with a KV cache's books, and names the block and who holds it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from refengine.errors import BlockStateError
from refengine.memory import KVCacheManager, KVGroupLayout, KVLayout, PrefixCache, verify

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def busy() -> KVCacheManager:
    """Three sequences over two pools: a parent and its fork, a copy to be made, and one that has ended."""
    groups = (
        KVGroupLayout(None, ((0, 2, 8),), 16),
        KVGroupLayout(5, ((1, 2, 8),), 16),
    )
    manager = KVCacheManager(KVLayout(4, np.dtype(np.float32), groups), PrefixCache())
    manager.grow("ended", 8)
    manager.publish("ended", TOKENS, "", 8)
    manager.release_passed("ended", 8)
    manager.release("ended")
    assert manager.adopt("parent", TOKENS) == 8
    manager.grow("parent", 10)
    manager.release_passed("parent", 10)
    manager.fork("parent", "child")
    manager.grow("child", 11)
    return manager


def test_sound_books_are_sound() -> None:
    """A busy cache, before its copies are made and after, and when all has ended."""
    manager = busy()
    tokens = {"parent": TOKENS, "child": TOKENS}
    verify(manager, tokens)
    manager.take_copies()
    verify(manager, tokens)
    manager.release("parent")
    manager.release("child")
    verify(manager)


def _lost(manager: KVCacheManager) -> None:
    manager.pools[0].release(manager.tables("child")[0][0])


def _leaked(manager: KVCacheManager) -> None:
    manager.pools[0].allocate()


def _written_by_two(manager: KVCacheManager) -> None:
    """The child names its parent's last block, which it is about to write; the count is right."""
    table, block = manager.tables("child")[0], manager.tables("parent")[0][2]
    manager.pools[0].share(block)
    table.replace(2, block)


def _named_twice(manager: KVCacheManager) -> None:
    table = manager.tables("parent")[0]
    manager.pools[0].share(table[1])
    table.replace(0, table[1])


def _not_idle(manager: KVCacheManager) -> None:
    manager.release("parent")
    manager.release("child")
    manager.take_copies()
    manager.pools[0]._idle.popitem()


def _segment_forgotten(manager: KVCacheManager) -> None:
    manager.pools[1]._used_in[0] = 0


def _unfindable(manager: KVCacheManager) -> None:
    next(iter(manager.prefix_cache.entries())).tokens = b"others, "


def _another_block(manager: KVCacheManager) -> None:
    manager.tables("child")[0].replace(0, manager.pools[0].allocate()[0])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            _lost,
            r"block 0: 2 references are counted, and it is held 3 times: by sequence 'parent', .*'child'",
        ),
        (_leaked, r"1 references are counted, and it is held 0 times: by nobody"),
        (_written_by_two, r"sequence 'child' is about to write it, and sequence 'parent' holds it too"),
        (_named_twice, r"block 1: held more than once by sequence 'parent'"),
        (_not_idle, r"held by the prefix cache, and not counted as held by the prefix cache alone"),
        (_segment_forgotten, r"pool 1: segments \(\) are counted as used, and \(0,\) are"),
        (_unfindable, r"cannot find its blocks"),
        (_another_block, r"of sequence 'child' lie in block \d, and the prefix cache says in block 0"),
    ],
)
def test_harm_is_found(harm: Callable[[KVCacheManager], None], message: str) -> None:
    """With the block, its owners, and what was counted."""
    manager = busy()
    harm(manager)
    with pytest.raises(BlockStateError, match=message):
        verify(manager)


def test_tokens_are_compared_where_they_are_given() -> None:
    """A sequence in blocks that were cached for other tokens than its own."""
    with pytest.raises(BlockStateError, match="positions 4 to 7 of sequence 'parent' lie in blocks"):
        verify(busy(), {"parent": (1, 2, 3, 4, 5, 6, 7, 0, 9, 10)})
