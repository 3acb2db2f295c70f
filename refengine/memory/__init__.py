"""Memory: the block allocator, block tables and the KV cache's layout."""

from __future__ import annotations

from refengine.memory.block_table import RELEASED, BlockTable
from refengine.memory.blocks import BlockAllocator
from refengine.memory.kv_cache import BlockCopy, KVCacheManager
from refengine.memory.kv_layout import KVGroupLayout, KVLayout, SealedFormat
from refengine.memory.kv_use import PoolUse, SequenceUse, pool_use, sequence_use
from refengine.memory.prefix_cache import PrefixCache, PrefixStatistics
from refengine.memory.recorder import Event, FlightRecorder
from refengine.memory.sanitizer import verify

__all__ = [
    "RELEASED",
    "BlockAllocator",
    "BlockCopy",
    "BlockTable",
    "Event",
    "FlightRecorder",
    "KVCacheManager",
    "KVGroupLayout",
    "KVLayout",
    "PoolUse",
    "PrefixCache",
    "PrefixStatistics",
    "SealedFormat",
    "SequenceUse",
    "pool_use",
    "sequence_use",
    "verify",
]
