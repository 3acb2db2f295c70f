"""An accelerator played by the CPU, as strict as the strictest real one.

Its memory is its own: nothing gets in or out but by a copy. It begins poisoned. Work is queued, and what it
gives can be seen once somebody has waited for it. A program that is careless about any of this runs on a CPU,
and fails on somebody's GPU; here it fails on a CPU too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from refengine.memory import SealedFormat
from refengine.ops import LayerCache, SealedLayerCache


class DeviceAccessError(TypeError):
    """The host touched the device's memory in a way that no accelerator allows."""


class DeviceArray:
    """An array in the device's memory. The host knows its shape and dtype, and nothing of what it holds."""

    def __init__(self, memory: NDArray[Any]) -> None:
        self._memory = memory

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._memory.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""
        return self._memory.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self._memory.nbytes

    def part(self, offset: int, shape: tuple[int, ...]) -> DeviceArray:
        """An array of this shape in the same memory, from a byte offset on."""
        start = offset // self.dtype.itemsize
        stop = start + math.prod(shape)
        if offset % self.dtype.itemsize or stop > self._memory.size:
            raise DeviceAccessError(f"{list(shape)} at byte {offset} does not fit into {self.nbytes} bytes")
        return DeviceArray(self._memory.reshape(-1)[start:stop].reshape(shape))

    def overlaps(self, other: DeviceArray) -> bool:
        """Whether two arrays share memory."""
        return np.shares_memory(self._memory, other._memory)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise DeviceAccessError("what an array on the device holds is not the host's to touch: copy it first")

    __array__ = __iter__ = __getitem__ = __setitem__ = __len__ = __bool__ = __float__ = __int__ = _refuse
    __array_ufunc__ = __array_function__ = _refuse


class DeviceCache(NamedTuple):
    """One layer's keys and values on the device."""

    keys: DeviceArray
    values: DeviceArray


class DeviceSealedCache(NamedTuple):
    """One layer's sealed keys and values on the device, and their formats."""

    keys: DeviceArray
    values: DeviceArray
    formats: tuple[SealedFormat, SealedFormat]


class Device:
    """Memory, and a queue of work on it."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], object]] = []

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """New memory, poisoned: NaN, bytes of ones, or for integers the smallest there is."""
        return DeviceArray(_poisoned(np.empty(shape, dtype)))

    def to_device(self, array: NDArray[Any], dtype: DTypeLike | None = None) -> DeviceArray:
        """A copy, read-only for the device; the host may change its own as soon as this returns."""
        copy = np.array(array, dtype)
        copy.flags.writeable = False
        return DeviceArray(copy)

    def poison(self, array: DeviceArray) -> None:
        """Queue: spoil what an array holds."""
        self._queue.append(lambda: _poisoned(array._memory))

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queue: copy all elements in order, whatever the shapes."""
        self._queue.append(lambda: np.copyto(target._memory, source._memory.reshape(target.shape)))

    def launch(
        self,
        kernel: Callable[..., Any],
        operands: Sequence[Any],
        attributes: Mapping[str, Any],
        out: DeviceArray | None = None,
    ) -> None:
        """Queue: call a function on the memory of its operands."""
        results = {} if out is None else {"out": out._memory}
        self._queue.append(lambda: kernel(*map(_memory, operands), **attributes, **results))

    def synchronise(self) -> None:
        """Do what is queued, in order. What fails takes the rest of the queue with it."""
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def to_host(self, array: DeviceArray) -> NDArray[Any]:
        """A copy for the host.

        Raises:
            DeviceAccessError: work is queued that nobody has waited for.
        """
        if self._queue:
            raise DeviceAccessError("read before synchronise: the result may not be there yet")
        return array._memory.copy()


def _poisoned(memory: NDArray[Any]) -> NDArray[Any]:
    match memory.dtype.kind:
        case "f":
            memory[...] = np.nan
        case "u":  # bytes of numbers: ones, which are NaN in every float format
            memory[...] = np.iinfo(memory.dtype).max
        case _:
            memory[...] = np.iinfo(memory.dtype).min
    return memory


def _memory(operand: Any) -> Any:
    """What a kernel sees of an operand."""
    if isinstance(operand, DeviceCache):
        return LayerCache(operand.keys._memory, operand.values._memory)
    if isinstance(operand, DeviceSealedCache):
        return SealedLayerCache(operand.keys._memory, operand.values._memory, operand.formats)
    return operand._memory if isinstance(operand, DeviceArray) else operand
