"""KV caches under test: of which layouts, what happens to sequences, and what can be seen of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.errors import BlockStateError, OutOfBlocksError
from refengine.memory import KVCacheManager, KVGroupLayout, KVLayout
from refengine_conformance.subject import Subject

POOL = st.integers(1, 9)
"""Blocks of a pool."""


WINDOW = st.sampled_from([None, 1, 2, 3, 5, 8])


WINDOWS = st.lists(WINDOW, min_size=1, max_size=3)
"""One to three groups."""


SEVERAL = st.lists(WINDOW, min_size=2, max_size=3)
"""Two or three."""


NAMES = "abc"
"""Sequences."""


LIVES = st.lists(
    st.tuples(st.sampled_from(["grow", "grow", "grow", "end"]), st.sampled_from(NAMES), st.integers(1, 9)),
    max_size=15,
)
"""What happens to sequences: so many tokens are computed, and the windows move on; or it ends."""


@st.composite
def layouts(
    draw: st.DrawFn,
    blocks: st.SearchStrategy[int] = POOL,
    windows: st.SearchStrategy[list[int | None]] = WINDOWS,
) -> KVLayout:
    """One to three groups, each with a pool of its own size."""
    dtype = np.dtype(draw(st.sampled_from([np.float16, np.float32, np.float64])))
    groups, layer = [], 0
    for window in draw(windows):
        shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=2))
        layers = tuple((layer + i, heads, size) for i, (heads, size) in enumerate(shapes))
        layer += len(layers)
        groups.append(KVGroupLayout(window, layers, draw(blocks)))
    return KVLayout(draw(st.sampled_from([1, 2, 3, 4])), dtype, tuple(groups))


@st.composite
def mixed(draw: st.DrawFn, blocks: st.SearchStrategy[int]) -> KVLayout:
    """A pool that keeps everything, and one or two that may not, in any order."""
    kinds = st.tuples(st.sampled_from([2, 3, 5, 8, None]), st.booleans())
    pools = draw(st.permutations([(None, False), *draw(st.lists(kinds, min_size=1, max_size=2))]))
    size = draw(st.sampled_from([2, 3, 4]))
    return KVLayout(
        size,
        np.dtype(np.float16),
        tuple(
            KVGroupLayout(window, ((g, 1, 8),), draw(blocks), recent=recent)
            for g, (window, recent) in enumerate(pools)
        ),
    )


ROOMY = layouts(blocks=st.just(64))
"""Pools that hold whatever is asked for here."""


def new_cache(subject: Subject, layout: KVLayout) -> tuple[KVLayout, KVCacheManager]:
    """The layout, and the subject's manager of it."""
    return layout, subject.kv_cache(layout)


def happens(cache: KVCacheManager, act: tuple[str, str, int]) -> bool:
    """Let something happen to a sequence; tells whether it could."""
    what, name, tokens = act
    if what == "end":
        cache.release(name)
        return True
    length = len(tables_of(cache, name)[0]) * cache.layout.block_size + tokens
    if not succeeds(lambda: cache.grow(name, length)):
        return False
    cache.release_passed(name, length)
    return True


def succeeds(act: Callable[[], Any]) -> bool:
    """Do something; tells whether there were blocks for it."""
    try:
        act()
    except (OutOfBlocksError, BlockStateError):
        return False
    return True


def tables_of(cache: KVCacheManager, name: str) -> list[list[int]]:
    """The tables of a sequence."""
    return [table.blocks.tolist() for table in cache.tables(name)]


def snapshot(cache: KVCacheManager) -> tuple[dict[str, list[list[int]]], tuple[int, ...]]:
    """All tables and all pools."""
    return {name: tables_of(cache, name) for name in NAMES}, cache.free_blocks
