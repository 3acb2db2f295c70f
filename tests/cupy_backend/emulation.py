"""The kernels as they are, compiled for the host, on a device played by one thread: see emulation.h."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refengine.errors import MemoryLimitError
from refengine.program import policy
from refengine_cupy.backend import POLICIES, CupyBackend
from refengine_cupy.modules import Module, modules_for
from refengine_cupy.runtime import Await, Copy, Fetch, Launch, Work
from refengine_cupy.source import Kernel, text_of

COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-march=native",
    "-fsanitize=alignment",
    "-fno-gnu-unique",
    "-w",
)
HEADER = Path(__file__).with_name("emulation.h")
OUTCOMES = (
    "",
    "threads wait for each other",
    "too many threads",
    "threads wait in different lines",
    "misaligned address",
)
"""By what a run gives."""


@cache
def folder() -> Path:
    return Path(tempfile.gettempdir()) / "refengine-emulated-kernels"


@cache
def library(module: str, encoding: str | None) -> ctypes.CDLL:
    """A module, compiled with the header that plays the device."""
    return compiled(module, text_of(module, encoding))


@cache
def known_modules() -> frozenset[Module]:
    """All that backends compile beforehand."""
    return frozenset(module for name in POLICIES for module in modules_for(policy(name)))


def source(text: str) -> str:
    """With that header."""
    return f'#include "{HEADER}"\n{text}'


def compiled(module: str, source_text: str) -> ctypes.CDLL:
    """Source, compiled with that header; kept under the module's name."""
    text = source(source_text)
    key = hashlib.sha256(repr((text, HEADER.read_text(), FLAGS)).encode()).hexdigest()[:24]
    path = folder() / f"{module}-{key}.so"
    if not path.exists():
        folder().mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            file, object, made = (Path(work) / f"kernels.{kind}" for kind in ("cpp", "o", "so"))
            file.write_text(text)
            subprocess.run([str(COMPILER), *FLAGS, "-c", str(file), "-o", str(object)], check=True)
            subprocess.run([str(COMPILER), "-shared", str(object), "-o", str(made)], check=True)
            made.replace(path)
    return ctypes.CDLL(str(path))


def misaligned(kernel: Kernel, made: ctypes.CDLL) -> str:
    """The line where a kernel's last run read or wrote at a misaligned address, if it did."""
    file, line = made.file_of_misaligned_access, made.line_of_misaligned_access()
    file.restype = ctypes.c_char_p
    if (name := file()) is None:
        return ""
    text = (
        HEADER.read_text()
        if Path(name.decode()) == HEADER
        else source(text_of(kernel.module, kernel.encoding))
    )
    return f": {text.splitlines()[line - 1].strip()}"


class HostMemory:
    """Memory that begins as bytes of ones: NaN."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = np.full(nbytes + 256, 0xFF, np.uint8)
        self.address = -(-self._bytes.ctypes.data // 256) * 256


class HostPinned(HostMemory):
    """Memory that the host writes and the device reads."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        start = self.address - self._bytes.ctypes.data
        self.data = self._bytes[start : start + nbytes]


class HostAddresses:
    """Addresses that the host backs by itself; what is not backed is poisoned."""

    piece = 2**16

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.empty(nbytes + 2 * self.piece, np.uint8)
        self.address = -(-self._bytes.ctypes.data // 256) * 256
        self.backed: set[int] = set()

    def back(self, pieces: range) -> None:
        for piece in pieces:
            assert piece not in self.backed
            self.backed.add(piece)
            ctypes.memset(self.address + piece * self.piece, 0xFF, self.piece)

    def unback(self, pieces: range) -> None:
        for piece in pieces:
            self.backed.remove(piece)
            ctypes.memset(self.address + piece * self.piece, 0xFF, self.piece)


class EmulatedRuntime:
    """See ``refengine_cupy.runtime.Runtime``; ``most`` bytes may be allocated at a time, ``most_pinned``
    pinned.

    What it does happens in order. Fetches are done as early as the waits allow, or as late.
    """

    name = "a GPU, played by the CPU"
    total_bytes = 2**32
    matrix_units = True
    warpgroups = True
    multiprocessors = 2
    shared_bytes = 227 * 2**10

    def __init__(self, most: int = 2**32, *, fetches: Literal["early", "late"] = "early") -> None:
        self.most, self.most_pinned, self.launched = most, 2**32, []
        self.fetches, self.fetched = fetches, 0  # bytes
        self.free = self.total_bytes
        self.compiled = set[Module]()

    def allocate(self, nbytes: int, purpose: str) -> HostMemory:
        if nbytes > self.most:
            raise MemoryLimitError(f"the device has no {nbytes} bytes left for {purpose}", needed=nbytes)
        return HostMemory(nbytes)

    def free_bytes(self) -> int:
        return self.free

    def pinned(self, nbytes: int, purpose: str) -> HostPinned:
        if nbytes > self.most_pinned:
            raise MemoryLimitError(f"the host has no {nbytes} bytes left for {purpose}", needed=nbytes)
        return HostPinned(nbytes)

    def reserve(self, nbytes: int) -> HostAddresses:
        return HostAddresses(nbytes)

    def staging(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        assert data.flags.c_contiguous
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, address: int, out: NDArray[Any]) -> None:
        ctypes.memmove(out.ctypes.data, address, out.nbytes)

    def fill(self, address: int, value: int, nbytes: int) -> None:
        ctypes.memset(address, value, nbytes)

    def copy(self, source: int, destination: int, nbytes: int) -> None:
        ctypes.memmove(destination, source, nbytes)

    def compile(self, modules: Sequence[Module]) -> None:
        self.compiled.update(modules)

    def prepare(self, kernel: Kernel) -> None:
        library(kernel.module, kernel.encoding)

    def launch(self, launches: Sequence[Work]) -> None:
        waiting, done = list[Fetch](), 0
        for work in launches:
            if isinstance(work, Launch):
                self._launch(work)
                continue
            if isinstance(work, Copy):
                ctypes.memmove(work.destination, work.source, work.nbytes)
                continue
            if isinstance(work, Fetch):
                waiting.append(work)
            due = done + len(waiting) if self.fetches == "early" else 0
            if isinstance(work, Await):
                assert work.fetches <= done + len(waiting), "it waits for a fetch that comes later"
                due = work.fetches
            while done < due:
                fetch = waiting.pop(0)
                ctypes.memmove(fetch.destination, fetch.source, fetch.nbytes)
                self.fetched += fetch.nbytes
                done += 1
        assert not waiting, "a fetch that nothing waits for"

    def _launch(self, launch: Launch) -> None:
        kernel = launch.kernel
        assert (kernel.module, kernel.encoding) in known_modules(), f"{kernel} is not compiled beforehand"
        made = library(kernel.module, kernel.encoding)
        function = getattr(made, f"run_{kernel.name}")
        numbers = [ctypes.c_uint(n) for n in (*launch.grid, kernel.threads, kernel.shared)]
        status = function(launch.arguments, *numbers)
        assert status == 0, f"{kernel.name} {launch.grid}: {OUTCOMES[status]}{misaligned(kernel, made)}"
        assert kernel.shared <= self.shared_bytes, (
            f"{kernel.name} wants {kernel.shared} bytes of shared memory"
        )
        self.launched.append(kernel.name)

    def record(self, launches: Sequence[Work]) -> Callable[[], None]:
        return lambda: self.launch(launches)

    def synchronise(self) -> None:
        pass


class NarrowRuntime(EmulatedRuntime):
    """A device like those of AMD: little shared memory, and no matrix units that kernels know."""

    matrix_units = False
    warpgroups = False
    shared_bytes = 64 * 2**10


class EmulatedBackend(CupyBackend):
    """The backend on the device that the host plays."""

    name = "cupy-emulated"

    def __init__(self) -> None:
        super().__init__(EmulatedRuntime())
