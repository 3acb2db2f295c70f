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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.errors import MemoryLimitError
from refengine_cupy.backend import CupyBackend
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel, text_of

COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-march=native",
    "-w",
)
HEADER = Path(__file__).with_name("emulation.h")


@cache
def folder() -> Path:
    return Path(tempfile.gettempdir()) / "refengine-emulated-kernels"


@cache
def library(module: str, encoding: str | None) -> ctypes.CDLL:
    """A module, compiled with the header that plays the device."""
    text = f'#include "{HEADER}"\n{text_of(module, encoding)}'
    key = hashlib.sha256((text + HEADER.read_text()).encode()).hexdigest()[:24]
    path = folder() / f"{module}-{key}.so"
    if not path.exists():
        folder().mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            source, made = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
            source.write_text(text)
            subprocess.run([str(COMPILER), *FLAGS, str(source), "-o", str(made)], check=True)
            made.replace(path)
    return ctypes.CDLL(str(path))


class HostMemory:
    """Memory that begins as bytes of ones: NaN."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = np.full(nbytes + 256, 0xFF, np.uint8)
        self.address = -(-self._bytes.ctypes.data // 256) * 256


class HostAddresses:
    """Addresses that the host backs by itself; what is not backed is poisoned."""

    piece = 2**16

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.empty(nbytes + 2 * self.piece, np.uint8)
        self.address = -(-self._bytes.ctypes.data // 256) * 256
        self.backed: set[int] = set()

    def back(self, piece: int) -> None:
        assert piece not in self.backed
        self.backed.add(piece)
        ctypes.memset(self.address + piece * self.piece, 0xFF, self.piece)

    def unback(self, piece: int) -> None:
        self.backed.remove(piece)
        ctypes.memset(self.address + piece * self.piece, 0xFF, self.piece)


class EmulatedRuntime:
    """See ``refengine_cupy.runtime.Runtime``; ``most`` bytes may be allocated."""

    name = "a GPU, played by the CPU"
    total_bytes = 2**32
    matrix_units = True
    multiprocessors = 2

    def __init__(self, most: int = 2**32) -> None:
        self.most, self.launched = most, []

    def allocate(self, nbytes: int, purpose: str) -> HostMemory:
        if nbytes > self.most:
            raise MemoryLimitError(f"the device has no {nbytes} bytes left for {purpose}", needed=nbytes)
        return HostMemory(nbytes)

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

    def prepare(self, kernel: Kernel) -> None:
        library(kernel.module, kernel.encoding)

    def launch(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            kernel = launch.kernel
            function = getattr(library(kernel.module, kernel.encoding), f"run_{kernel.name}")
            numbers = [ctypes.c_uint(n) for n in (*launch.grid, kernel.threads, kernel.shared)]
            status = function(launch.arguments, *numbers)
            assert status == 0, (
                f"{kernel.name} {launch.grid}: {['', 'threads wait for each other', 'too many threads'][status]}"
            )
            self.launched.append(kernel.name)

    def record(self, launches: Sequence[Launch]) -> Callable[[], None]:
        return lambda: self.launch(launches)

    def synchronise(self) -> None:
        pass


class EmulatedBackend(CupyBackend):
    """The backend on the device that the host plays."""

    name = "cupy-emulated"

    def __init__(self) -> None:
        super().__init__(EmulatedRuntime())
