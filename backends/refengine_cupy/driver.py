"""The GPU's driver, called directly: launches that may overlap, and memory that is mapped piece by piece.

Source: CUDA Driver API, "Execution Control" (``cuLaunchKernelEx``) and "Virtual Memory Management"; HIP has
    the latter under names of its own.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from cupy.cuda import runtime as cuda
from cupy_backends.cuda.api import driver as cupy_driver

OUT_OF_MEMORY = 2
"""The status of CUDA and HIP."""

OVERLAP = 6
"""``CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION``."""

MOST_SHARED = 8
"""``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``."""


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = (("id", c_int), ("pad", ctypes.c_char * 4), ("value", c_int), ("rest", ctypes.c_char * 60))


class LaunchConfiguration(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("count", c_uint),
    )


class AllocationProperties(ctypes.Structure):
    """``CUmemAllocationProp``, ``hipMemAllocationProp``."""

    _fields_ = (
        ("type", c_int),
        ("handles", c_int),
        ("location_type", c_int),
        ("location", c_int),
        ("metadata", c_void_p),
        ("flags", ctypes.c_char * 8),
    )


class AccessDescription(ctypes.Structure):
    """``CUmemAccessDesc``, ``hipMemAccessDesc``."""

    _fields_ = (("location_type", c_int), ("location", c_int), ("flags", c_int))


class Driver:
    """The driver of one device, whose context CuPy has made."""

    def __init__(self, device: int) -> None:
        self._hip = bool(cuda.is_hip)
        self._library = ctypes.CDLL("libamdhip64.so" if self._hip else "libcuda.so.1")
        self._properties = AllocationProperties(1, 0, 1, device, None, b"")
        self._access = AccessDescription(1, device, 3)
        major = cuda.deviceGetAttribute(75, device)  # compute capability
        self._overlaps = not self._hip and major >= 9
        self._attribute = LaunchAttribute(OVERLAP, b"", 1, b"")

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: bytes,
        *,
        may_overlap: bool = True,
    ) -> None:
        """Queue a kernel that takes one structure; if it may, it begins before its predecessor ends, where
        that says so.
        """
        structure = ctypes.create_string_buffer(arguments, len(arguments))
        parameters = (c_void_p * 1)(ctypes.addressof(structure))
        if not (self._overlaps and may_overlap):
            cupy_driver.launchKernel(
                function, *grid, threads, 1, 1, shared, stream, ctypes.addressof(parameters), 0
            )
            return
        configuration = LaunchConfiguration(
            (c_uint * 3)(*grid),
            (c_uint * 3)(threads, 1, 1),
            shared,
            stream,
            ctypes.pointer(self._attribute),
            1,
        )
        status = self._library.cuLaunchKernelEx(byref(configuration), c_void_p(function), parameters, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx gives {status} for a grid of {grid} × {threads} threads")

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Let a kernel have more shared memory than kernels have unasked."""
        if not self._hip:
            cupy_driver.funcSetAttribute(function, MOST_SHARED, nbytes)

    def granularity(self) -> int:
        """Bytes of the least that is mapped."""
        found = c_size_t()
        self._call("MemGetAllocationGranularity", byref(found), byref(self._properties), c_int(0))
        return found.value

    def reserve(self, nbytes: int) -> int:
        """Addresses without memory."""
        address = c_ulonglong()
        self._call(
            "MemAddressReserve", byref(address), c_size_t(nbytes), c_size_t(0), c_ulonglong(0), c_ulonglong(0)
        )
        return address.value

    def free_addresses(self, address: int, nbytes: int) -> None:
        """Give them back."""
        self._call("MemAddressFree", c_ulonglong(address), c_size_t(nbytes))

    def map(self, address: int, nbytes: int) -> int:
        """Put memory behind addresses, which nobody may use yet; gives its handle.

        Raises:
            MemoryError: there is none left.
        """
        handle = c_ulonglong()
        self._call("MemCreate", byref(handle), c_size_t(nbytes), byref(self._properties), c_ulonglong(0))
        self._call("MemMap", c_ulonglong(address), c_size_t(nbytes), c_size_t(0), handle, c_ulonglong(0))
        return handle.value

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device use addresses with memory behind them."""
        self._call("MemSetAccess", c_ulonglong(address), c_size_t(nbytes), byref(self._access), c_size_t(1))

    def unmap(self, address: int, nbytes: int, handle: int) -> None:
        """Give the memory behind addresses back."""
        self._call("MemUnmap", c_ulonglong(address), c_size_t(nbytes))
        self._call("MemRelease", c_ulonglong(handle))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, ("hip" if self._hip else "cu") + name)(*arguments)
        if status == OUT_OF_MEMORY:
            raise MemoryError(name)
        if status:
            raise RuntimeError(f"the GPU's driver gives {status} for {name}")
