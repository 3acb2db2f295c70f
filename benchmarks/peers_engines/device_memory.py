"""Device memory of a process, by the GPU's driver: what is given out while the process works.

Standard library only. The driver counts what it has given to everybody; processes that are compared work one
at a time, so what changes while one works is its own.

Source: NVML API Reference, "Device Queries" (``nvmlDeviceGetMemoryInfo``) and "System Queries".
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

INTERVAL = 0.002
"""Seconds between two looks at the driver, where a peak is wanted."""


class Driver(Protocol):
    """What counts memory."""

    def used(self) -> float:
        """10^6 bytes that are given out, to all processes."""
        ...


class MemoryInfo(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The first GPU of NVIDIA.

    Raises:
        OSError: there is no driver, or it does not start.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise OSError("device memory is counted by NVIDIA's driver, which is not there") from error
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self._device))

    def used(self) -> float:
        """10^6 bytes that are given out, to all processes."""
        found = MemoryInfo()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(found))
        return float(found.used / 1e6)

    def about(self) -> str:
        """Name of the GPU, and the driver's version."""
        name, version = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", self._device, name, 96)
        self._call("nvmlSystemGetDriverVersion", version, 96)
        return f"{name.value.decode()}, driver {version.value.decode()}"

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise OSError(f"{name} gives {status}")


class DeviceMemory:
    """What this process holds of the device, in 10^6 bytes.

    Args:
        driver: counts; what it has given out by now is not this process's.

    Attributes:
        held: by now, the context included.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver, self.held = driver, 0.0

    def during(self, action: Callable[[], T]) -> T:
        """What an action takes or gives back is this process's."""
        before = self._driver.used()
        result = action()
        self.held += self._driver.used() - before
        return result

    def peak_during(self, action: Callable[[], object]) -> float:
        """The most that this process holds while it acts; looks take time, so nothing is timed meanwhile."""
        before, seen, done = self._driver.used(), [0.0], threading.Event()

        def look() -> None:
            while not done.wait(INTERVAL):
                seen.append(self._driver.used() - before)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            action()
        finally:
            done.set()
            thread.join()
        after = self._driver.used() - before
        peak = self.held + max(*seen, after)
        self.held += after
        return peak
