"""Memory: the block allocator, block tables and the KV cache's layout."""

from __future__ import annotations

from refengine.memory.block_table import RELEASED, BlockTable
from refengine.memory.blocks import BlockAllocator
from refengine.memory.kv_cache import KVCacheManager, KVGroupLayout, KVLayout

__all__ = ["RELEASED", "BlockAllocator", "BlockTable", "KVCacheManager", "KVGroupLayout", "KVLayout"]
