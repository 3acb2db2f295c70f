"""What the backend asks of a device: memory, copies, launches, and addresses whose memory comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refengine_cupy.source import Kernel


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments.

    Attributes:
        kernel: what is launched.
        grid: blocks of threads, along three axes.
        arguments: the bytes of the kernel's structure.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: bytes


@dataclass(frozen=True)
class Copy:
    """A copy between pinned memory and the device, in line with launches: after those before it, and done
    before those behind it begin.

    Attributes:
        source, destination: addresses, one of pinned memory, the other on the device.
        nbytes: how many.
    """

    source: int
    destination: int
    nbytes: int


@dataclass(frozen=True)
class Fetch:
    """A copy to the device that goes on beside launches, and after the fetches before it.

    It begins when the launches before it in its list are done, and those queued before the list.

    Attributes:
        source: address in pinned memory.
        destination: address on the device.
        nbytes: how many.
    """

    source: int
    destination: int
    nbytes: int


@dataclass(frozen=True)
class Await:
    """What follows begins when so many fetches of its list are done, counted from the list's first."""

    fetches: int


Work = Launch | Copy | Fetch | Await
"""What is queued. A list ends when its launches and copies have ended; each of its fetches is awaited in it.
"""


class Memory(Protocol):
    """Memory of the device; given back when nobody holds it any more."""

    address: int
    nbytes: int


class Pinned(Protocol):
    """Memory of the host that the device copies from, or reads at the same address; given back likewise.

    Attributes:
        address: the first.
        nbytes: how many.
        data: what it holds, uint8 [nbytes].
    """

    address: int
    nbytes: int
    data: NDArray[np.uint8]


class Addresses(Protocol):
    """Addresses of the device, taken at once; memory is put behind them piece by piece.

    Attributes:
        address: the first.
        piece: bytes of a piece.
    """

    address: int
    piece: int

    def back(self, pieces: range) -> None:
        """Put memory behind pieces that follow each other: all or none.

        Raises:
            MemoryManagerError: the device has not so much left.
        """
        ...

    def unback(self, pieces: range) -> None:
        """Give that memory back."""
        ...


class Runtime(Protocol):
    """A device. What is asked of it happens in order; only ``download`` and ``synchronise`` wait.

    Attributes:
        name: as its vendor calls it.
        total_bytes: of its memory.
        matrix_units: whether kernels may use them.
        warpgroups: whether four warps may use them together, see ``warpgroups.h``.
        multiprocessors: how many it has.
        shared_bytes: the most shared memory that a block of threads may have.
    """

    name: str
    total_bytes: int
    matrix_units: bool
    warpgroups: bool
    multiprocessors: int
    shared_bytes: int

    def allocate(self, nbytes: int, purpose: str) -> Memory:
        """Memory, whatever it holds.

        Raises:
            MemoryLimitError: there is not so much left; the text names the purpose.
        """
        ...

    def free_bytes(self) -> int:
        """Of the device's memory, what ``allocate`` may still give."""
        ...

    def pinned(self, nbytes: int, purpose: str) -> Pinned:
        """Memory of the host, whatever it holds.

        Raises:
            MemoryLimitError: there is not so much left; the text names the purpose.
        """
        ...

    def reserve(self, nbytes: int) -> Addresses:
        """Addresses without memory."""
        ...

    def staging(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory of the host that copies to and from the device are fast with."""
        ...

    def upload(self, address: int, data: NDArray[Any]) -> None:
        """Copy to the device; ``data`` is C-contiguous, and in use until the next ``synchronise`` if it is
        staging.
        """
        ...

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy from the device, and wait for it."""
        ...

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set bytes."""
        ...

    def copy(self, source: int, destination: int, nbytes: int) -> None:
        """Copy within the device."""
        ...

    def compile(self, modules: Sequence[tuple[str, str | None]]) -> None:
        """Compile modules, each in a version, and keep them for this process and others; loads none.

        Raises:
            BackendFailedError: a source does not compile.
        """
        ...

    def prepare(self, kernel: Kernel) -> None:
        """Compile and load a kernel.

        Raises:
            BackendFailedError: its source does not compile.
        """
        ...

    def launch(self, launches: Sequence[Work]) -> None:
        """Queue kernels and copies, one after the other, and the fetches beside them."""
        ...

    def record(self, launches: Sequence[Work]) -> Callable[[], None]:
        """The same as one graph; calling it queues all of it. Copies take what is in memory then."""
        ...

    def synchronise(self) -> None:
        """Wait until all is done.

        Raises:
            BackendFailedError: a kernel failed.
        """
        ...
