"""The light half of the CuPy backend."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from refengine.backend.info import BackendInfo

LEAST_DRIVER = 12000
"""The version of CUDA that a driver must offer, as drivers count it: 1000 · major + 10 · minor."""


def probe() -> str | None:
    """Whether CuPy is there, and a driver with a device; nothing heavy is imported for it."""
    found = find_spec("cupy")
    if found is None or not found.origin:
        return "the package cupy is not installed"
    cuda, hip = _library("libcuda.so.1", "nvcuda.dll"), _library("libamdhip64.so")
    if cuda is None and hip is not None:
        return _hip(hip)
    return _cuda(cuda)


def _cuda(driver: ctypes.CDLL | None) -> str | None:
    if driver is None:
        return "there is no GPU driver (libcuda.so.1 is not found)"
    version, count = ctypes.c_int(), ctypes.c_int()
    if status := driver.cuInit(0):
        return f"the GPU driver does not start (cuInit gives {status})"
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < LEAST_DRIVER:
        return (
            "the GPU driver is too old: it offers CUDA "
            f"{version.value // 1000}.{version.value % 1000 // 10}, "
            f"and {LEAST_DRIVER // 1000}.{LEAST_DRIVER % 1000 // 10} is needed"
        )
    driver.cuDeviceGetCount(ctypes.byref(count))
    return None if count.value else "there is no GPU"


def _hip(driver: ctypes.CDLL) -> str | None:
    count = ctypes.c_int()
    if status := driver.hipGetDeviceCount(ctypes.byref(count)):
        return f"there is no GPU that ROCm can use (hipGetDeviceCount gives {status})"
    return None if count.value else "there is no GPU"


def _library(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


INFO = BackendInfo(
    description="kernels for NVIDIA and AMD GPUs, over weights repacked for wide loads",
    install="pip install 'refengine[cuda12]' (or cuda13, or rocm), and a driver for the GPU",
    probe=probe,
    priority=20,
)
