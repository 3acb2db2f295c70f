"""The KV cache's segments share the pieces in which a device gives memory, and give them back."""

from __future__ import annotations

import numpy as np
import pytest
from cupy_backend.emulation import EmulatedRuntime, HostAddresses

from refengine.errors import MemoryManagerError
from refengine.memory import KVGroupLayout, KVLayout
from refengine_cupy.kv import DeviceKVStorage

LAYOUT = KVLayout(16, np.dtype(np.float16), (KVGroupLayout(None, ((0, 2, 8), (1, 2, 8)), 200),))


def addresses(storage: DeviceKVStorage) -> HostAddresses:
    found = storage._pools[0]._addresses
    assert isinstance(found, HostAddresses)
    return found


def test_no_memory_is_taken_before_a_segment_is_committed() -> None:
    storage = DeviceKVStorage(EmulatedRuntime(), LAYOUT)
    assert storage.nbytes == 0
    assert addresses(storage).backed == set()


def test_a_piece_goes_back_with_the_last_segment_in_it() -> None:
    storage = DeviceKVStorage(EmulatedRuntime(), LAYOUT)
    per_piece = HostAddresses.piece // LAYOUT.segment_bytes(0)
    for segment in range(per_piece + 1):
        storage.commit(0, segment)
    assert addresses(storage).backed == {0, 1}
    for segment in range(1, per_piece):
        storage.release(0, segment)
    assert addresses(storage).backed == {0, 1}
    storage.release(0, 0)
    assert addresses(storage).backed == {1}
    assert storage.nbytes == LAYOUT.segment_bytes(0)


def test_a_segment_without_memory_leaves_the_pool_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed stays, and a later try succeeds."""
    large = KVLayout(512, np.dtype(np.float32), (KVGroupLayout(None, ((0, 8, 64),), 8),))
    storage = DeviceKVStorage(EmulatedRuntime(), large)
    storage.commit(0, 0)
    before = set(addresses(storage).backed)

    def fails(self: HostAddresses, pieces: range) -> None:
        raise MemoryManagerError("the device has no memory left")

    with monkeypatch.context() as patched:
        patched.setattr(HostAddresses, "back", fails)
        with pytest.raises(MemoryManagerError, match="no memory left"):
            storage.commit(0, 1)
    assert addresses(storage).backed == before
    assert storage.nbytes == large.segment_bytes(0)
    storage.commit(0, 1)


def test_segments_are_committed_and_released_once() -> None:
    storage = DeviceKVStorage(EmulatedRuntime(), LAYOUT)
    storage.commit(0, 0)
    for wrong in (0, -1, LAYOUT.num_segments(0)):
        with pytest.raises(MemoryManagerError, match="cannot be committed"):
            storage.commit(0, wrong)
    with pytest.raises(MemoryManagerError, match="cannot be released"):
        storage.release(0, 1)


def test_segments_that_follow_each_other_get_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all of them, the pieces of neighbours left out; and all or none."""
    storage = DeviceKVStorage(EmulatedRuntime(), LAYOUT)
    per_piece = HostAddresses.piece // LAYOUT.segment_bytes(0)
    storage.commit(0, 0)
    asked: list[range] = []
    back = HostAddresses.back
    monkeypatch.setattr(
        HostAddresses, "back", lambda self, pieces: (asked.append(pieces), back(self, pieces))
    )
    storage.commit_run(0, range(1, 3 * per_piece))
    assert asked == [range(1, 3)]
    assert storage.nbytes == 3 * per_piece * LAYOUT.segment_bytes(0)
    for wrong in (range(3 * per_piece - 1, 3 * per_piece + 2), range(198, 203)):
        with pytest.raises(MemoryManagerError, match="cannot be committed"):
            storage.commit_run(0, wrong)
    with pytest.raises(MemoryManagerError, match="cannot be released"):
        storage.release_run(0, range(3 * per_piece - 1, 3 * per_piece + 1))
    assert storage.nbytes == 3 * per_piece * LAYOUT.segment_bytes(0)
    storage.release_run(0, range(3 * per_piece))
    assert (storage.nbytes, addresses(storage).backed) == (0, set())
