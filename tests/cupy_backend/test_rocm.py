"""AMD's compilers take every kernel. Nothing here runs on a GPU: nobody has run them on one yet."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from cupy_backend import rocm
from cupy_backend.test_source import MODULES, versions

from refengine_cupy.source import FOLDER, text_of

AMDGPU = 224
"""The number of AMD's GPUs in the header of an object file."""

HIP_FLAGS = ("--std=c++17", "-ffp-contract=off", "-fno-strict-aliasing")
"""As ``cupy_runtime`` has them, which imports CuPy."""


def text(module: str) -> str:
    """Of one version, where a module has several."""
    return text_of(module, versions(module)[0])


@pytest.mark.skipif(
    not os.environ.get(rocm.NEEDED), reason=f"{rocm.NEEDED} is not set: that is so outside CI"
)
def test_there_are_compilers_where_they_are_needed() -> None:
    assert rocm.why_not() is None
    assert rocm.runtime_compiler() is not None


@pytest.mark.skipif(rocm.why_not() is not None, reason=str(rocm.why_not()))
@pytest.mark.parametrize("architecture", rocm.TARGETS)
@pytest.mark.parametrize("module", MODULES)
def test_hipcc_makes_machine_code(module: str, architecture: str, tmp_path: Path) -> None:
    """From the same source for waves of 64 threads and of 32; every function is defined."""
    code, target = rocm.compiled(text(module), architecture, tmp_path), rocm.TARGETS[architecture]
    machine, flags = struct.unpack_from("<H", code, 18)[0], struct.unpack_from("<I", code, 48)[0]
    assert (code[:4], machine, flags & 0xFF) == (b"\x7fELF", AMDGPU, target.machine)
    waves = {found[0] for found in re.findall(rb"\.wavefront_size(.)", code, re.S)}
    assert waves == ({target.wave} if re.search(rb"\.kd\0", code) else set())
    assert waves or "HAS_MATRIX_UNITS" in text(module)


@pytest.mark.skipif(
    rocm.runtime_compiler() is None, reason="hipRTC is not installed (Debian: hipcc brings it)"
)
@pytest.mark.parametrize("module", MODULES)
def test_the_compiler_that_a_gpu_would_run_takes_every_module(module: str) -> None:
    """With the backend's flags, for gfx90a: of those that CI compiles for, hipRTC 5.2 knows no other."""
    assert rocm.compiled_at_run_time(text(module), "gfx90a", (*HIP_FLAGS, "-O1")) is None


def test_flags_are_those_of_the_backend() -> None:
    source = (FOLDER.parent / "cupy_runtime.py").read_text()
    assert f"HIP_FLAGS = {HIP_FLAGS}".replace("'", '"') in source


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_kernel_asks_for_the_width_of_waves(path: Path) -> None:
    """Vendors' names that know waves, or that only one vendor has, are in ``vendor.h`` alone, and in what only
    one vendor has.
    """
    allowed = {"__syncthreads", "__threadfence"}
    code = re.sub(r"//.*", "", path.read_text())
    found = set(re.findall(r"\b__\w+|\bwarpSize\b|\basm\b", code)) - allowed
    assert path.name in ("vendor.h", "warpgroups.h") or not found
