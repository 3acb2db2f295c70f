"""A GPU through CuPy: compiled modules, memory, streams, graphs; and the driver, for what CuPy does not
offer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime as cuda
from cupy_backends.cuda.libs import nvrtc
from numpy.typing import NDArray

from refengine.errors import BackendFailedError, MemoryLimitError
from refengine_cupy.driver import Driver
from refengine_cupy.info import INFO
from refengine_cupy.mapped_addresses import MappedAddresses
from refengine_cupy.runtime import Await, Copy, Fetch, Launch, Work
from refengine_cupy.source import Kernel, text_of

FLAGS = ("--std=c++17", "--fmad=false")
HIP_FLAGS = ("--std=c++17", "-ffp-contract=off", "-fno-strict-aliasing")


class DeviceMemory:
    """Memory taken from the device."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may have ended before
            cuda.free(self.address)


class PinnedMemory:
    """Memory of the host that stays where it is; the device reads it at the same address."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self.data: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may have ended before
            cuda.freeHost(self.address)


class CupyRuntime:
    """The first GPU; see ``refengine_cupy.runtime.Runtime``.

    Raises:
        BackendFailedError: it does not start.
    """

    matrix_units = not cuda.is_hip
    stream: int

    def __init__(self) -> None:
        try:
            properties = cuda.getDeviceProperties(0)
            cuda.setDevice(0)
            cuda.free(0)  # starts it
            self.stream = cuda.streamCreateWithFlags(cuda.streamNonBlocking)
            self._copies = cuda.streamCreateWithFlags(cuda.streamNonBlocking)
            self._launched = cuda.eventCreateWithFlags(cuda.eventDisableTiming)
        except cuda.CUDARuntimeError as cause:
            raise _failed("the GPU does not start", cause) from cause
        self.name = properties["name"].decode()
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.warpgroups = not cuda.is_hip and (properties.get("major"), properties.get("minor")) == (9, 0)
        most = "sharedMemPerBlock" if cuda.is_hip else "sharedMemPerBlockOptin"
        self.shared_bytes = int(properties[most])
        self.total_bytes = int(properties["totalGlobalMem"])
        self._driver = Driver(0)
        self._modules: dict[tuple[str, str | None], Any] = {}
        self._functions: dict[Kernel, int] = {}
        self._fetched: list[int] = []  # events, by a fetch's number in its list
        self._shared: dict[int, int] = {}  # the most shared memory that a function may have

    def allocate(self, nbytes: int, purpose: str) -> DeviceMemory:
        """Memory of the device."""
        self._use()
        try:
            return DeviceMemory(cuda.malloc(nbytes), nbytes)
        except cuda.CUDARuntimeError as cause:
            free, _ = cuda.memGetInfo()
            raise MemoryLimitError(
                f"{self.name} has {free / 1e6:,.1f} MB of memory left, and {nbytes / 1e6:,.1f} MB are needed "
                f"for {purpose}: end what else uses it, or choose a smaller model, token budget or KV "
                f"cache ({cause})",
                needed=nbytes,
            ) from cause

    def free_bytes(self) -> int:
        """Memory that the device has left."""
        self._use()
        return int(cuda.memGetInfo()[0])

    def pinned(self, nbytes: int, purpose: str) -> PinnedMemory:
        """Pinned memory, exactly as much: a pool would round it up to a power of two."""
        self._use()
        try:
            return PinnedMemory(cuda.hostAlloc(nbytes, 0), nbytes)
        except cuda.CUDARuntimeError as cause:
            raise MemoryLimitError(
                f"the host does not give {nbytes / 1e6:,.1f} MB of pinned memory for {purpose}: end what "
                "else uses its memory, choose a smaller model, or a larger --memory if the device has it "
                f"({cause})",
                needed=nbytes,
            ) from cause

    def reserve(self, nbytes: int) -> MappedAddresses:
        """Addresses, of which pieces get memory."""
        self._use()
        return MappedAddresses(self._driver, nbytes, self.name, cuda.deviceSynchronize)

    def staging(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory."""
        self._use()
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        """Copy to the device."""
        if not data.nbytes:
            return
        self._use()
        cuda.memcpyAsync(address, data.ctypes.data, data.nbytes, cuda.memcpyHostToDevice, self.stream)

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy from the device, and wait for it."""
        self._use()
        try:
            if out.nbytes:
                cuda.memcpyAsync(out.ctypes.data, address, out.nbytes, cuda.memcpyDeviceToHost, self.stream)
            cuda.streamSynchronize(self.stream)
        except cuda.CUDARuntimeError as cause:
            raise _failed("a kernel failed", cause) from cause

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set bytes."""
        self._use()
        cuda.memsetAsync(address, value, nbytes, self.stream)

    def copy(self, source: int, destination: int, nbytes: int) -> None:
        """Copy within the device."""
        self._use()
        cuda.memcpyAsync(destination, source, nbytes, cuda.memcpyDeviceToDevice, self.stream)

    def compile(self, modules: Sequence[tuple[str, str | None]]) -> None:
        """With as many threads as there are cores: the compiler lets others go on.

        On HIP one after the other, into CuPy's own cache.
        """
        self._use()
        if cuda.is_hip:
            for module in modules:
                _compiled(*module)
            return
        with ThreadPoolExecutor(os.cpu_count(), initializer=self._use) as pool:
            made = [pool.submit(_binary, *module) for module in modules]
        for one in made:
            one.result()  # raises what compiling it has

    def prepare(self, kernel: Kernel) -> None:
        """Compile and load."""
        self._function(kernel)

    def launch(self, launches: Sequence[Work]) -> None:
        """Queue kernels and copies in one stream, fetches in another; events say what waits for what.

        A kernel behind a copy, or one that waits for a fetch, does not begin before what is ahead of it has
        ended: kernels read weights before they wait for that.
        """
        self._use()
        fetched, launched_since, waits = 0, True, False
        for work in launches:
            if isinstance(work, Fetch):
                if launched_since:
                    cuda.eventRecord(self._launched, self.stream)
                    cuda.streamWaitEvent(self._copies, self._launched)
                    launched_since = False
                self._fetch(work, fetched)
                fetched += 1
            elif isinstance(work, Await):
                cuda.streamWaitEvent(self.stream, self._fetched[work.fetches - 1])
                waits = True
            elif isinstance(work, Copy):
                cuda.memcpyAsync(work.destination, work.source, work.nbytes, cuda.memcpyDefault, self.stream)
                launched_since = waits = True
            else:
                kernel = work.kernel
                self._driver.launch(
                    self._function(kernel),
                    work.grid,
                    kernel.threads,
                    kernel.shared,
                    self.stream,
                    work.arguments,
                    may_overlap=not waits,
                )
                launched_since, waits = True, False

    def _fetch(self, fetch: Fetch, number: int) -> None:
        """Queue a copy, and what tells that it is done."""
        if number == len(self._fetched):
            self._fetched.append(cuda.eventCreateWithFlags(cuda.eventDisableTiming))
        cuda.memcpyAsync(fetch.destination, fetch.source, fetch.nbytes, cuda.memcpyHostToDevice, self._copies)
        cuda.eventRecord(self._fetched[number], self._copies)

    def record(self, launches: Sequence[Work]) -> Callable[[], None]:
        """As one graph; the stream of copies joins it with its first wait, and leaves with its last fetch."""
        self._use()
        for work in launches:
            if isinstance(work, Launch):
                self._function(work.kernel)
        collecting = gc.isenabled()
        gc.disable()  # what is collected gives memory back, which ends a recording
        cuda.streamBeginCapture(self.stream, cuda.streamCaptureModeRelaxed)
        try:
            self.launch(launches)
        finally:
            graph = cuda.streamEndCapture(self.stream)
            if collecting:
                gc.enable()
        return Graph(self, graph)

    def replay(self, executable: int) -> None:
        """Queue a graph."""
        self._use()
        cuda.graphLaunch(executable, self.stream)

    def synchronise(self) -> None:
        """Wait until all is done."""
        self._use()
        try:
            cuda.streamSynchronize(self.stream)
        except cuda.CUDARuntimeError as cause:
            raise _failed("a kernel failed", cause) from cause

    def _use(self) -> None:
        """Threads begin without a device."""
        cuda.setDevice(0)

    def _function(self, kernel: Kernel) -> int:
        if kernel not in self._functions:
            module = (kernel.module, kernel.encoding)
            if module not in self._modules:
                self._modules[module] = _compiled(*module)
            function = self._modules[module].get_function(kernel.name).ptr
            if kernel.shared > self._shared.get(function, 0):
                self._driver.allow_shared(function, kernel.shared)
                self._shared[function] = kernel.shared
            self._functions[kernel] = function
        return self._functions[kernel]


class Graph:
    """Launches that were recorded; calling it queues them."""

    def __init__(self, runtime: CupyRuntime, graph: int) -> None:
        self._runtime, self._graph = runtime, graph
        self._executable = cuda.graphInstantiate(graph)

    def __call__(self) -> None:
        """Queue them."""
        self._runtime.replay(self._executable)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            cuda.graphExecDestroy(self._executable)
            cuda.graphDestroy(self._graph)


def _compiled(module: str, encoding: str | None) -> Any:
    """A loaded module."""
    try:
        if cuda.is_hip:
            made = cupy.RawModule(code=text_of(module, encoding), options=HIP_FLAGS)
            made.compile()
            return made.module
        return _loaded(_binary(module, encoding))
    except BackendFailedError:
        raise
    except Exception as cause:
        raise _failed(f"its kernels ({module}) do not load", cause) from cause


def _binary(module: str, encoding: str | None) -> bytes:
    """A compiled module, from the cache where it was compiled before.

    The compiler is called here: CuPy's own cache would have it take subnormal numbers for zero, which the
    definition of codes does not allow.
    """
    text = text_of(module, encoding)
    try:
        arch = _architecture()
        key = hashlib.sha256(repr((text, FLAGS, arch, nvrtc.getVersion())).encode()).hexdigest()
        path = cache_folder() / f"{module}-{encoding or 'all'}-{key[:32]}.cubin"
        if path.exists():
            return path.read_bytes()
        binary = _called(text, f"{module}.cu", (*FLAGS, f"--gpu-architecture=sm_{arch}"))
        _keep(path, binary)
        return binary
    except Exception as cause:
        raise _failed(f"its kernels ({module}) do not compile", cause) from cause


def _architecture() -> str:
    """What kernels are compiled for: the device's own architecture, of Hopper with all that it alone has.

    Of what the compiler does not know yet the latest that it does: a device runs the code of its own
        generation's earlier architectures.
    """
    own = int(cupy.cuda.Device(0).compute_capability)
    known = [number for number in nvrtc.getSupportedArchs() if number <= own]
    return "90a" if own == 90 else str(max(known, default=own))


def _called(text: str, name: str, options: tuple[str, ...]) -> bytes:
    """Machine code of a source.

    Raises:
        RuntimeError: it does not compile; the text is the compiler's.
    """
    program = nvrtc.createProgram(text, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as cause:
        raise RuntimeError(nvrtc.getProgramLog(program)) from cause
    finally:
        nvrtc.destroyProgram(program)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``REFENGINE_CUPY_CACHE``, or a folder of the user's cache."""
    return Path(os.environ.get("REFENGINE_CUPY_CACHE") or Path.home() / ".cache" / "refengine" / "cupy")


def _keep(path: Path, binary: bytes) -> None:
    """Write a file that others see whole or not at all; where none can be written, it is compiled again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as written:
            written.write(binary)
        os.replace(written.name, path)


def _loaded(binary: bytes) -> Any:
    module = cupy.cuda.function.Module()
    module.load(binary)
    return module


def _failed(what: str, cause: Exception) -> BackendFailedError:
    return BackendFailedError(
        state=f"backend 'cupy' failed: {what}",
        available="numpy, which needs no GPU, and what `refengine backends` lists",
        why=f"{type(cause).__name__}: {str(cause)[:2000]}",
        mend=f"check the driver with nvidia-smi (or rocm-smi), and the installation: {INFO.install}",
    )
