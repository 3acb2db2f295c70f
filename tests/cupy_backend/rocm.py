"""Kernels to AMD's machine code, with the compilers that Debian 12 has, and no GPU.

Its hipcc is ROCm's of version 5.2, which calls clang 15:

- gfx90a (waves of 64 threads) it compiles by itself.
- gfx1100 (waves of 32) its clang knows, and its libraries of device functions do not: they are given by hand,
  with the one number in which they differ between architectures.
- gfx942 (waves of 64) is younger than its clang. hipcc is pointed to clang 19, with the same libraries.

A newer hipcc knows all of them. In each case what comes out is linked: no function is left undefined.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NEEDED = "REFENGINE_NEEDS_ROCM"
"""Where this variable is set, tests fail for want of a compiler: so they do not end unseen in CI."""

PACKAGES = "hipcc clang-19 lld-19"
"""Debian's."""

BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
LIBRARIES = (
    "hip",
    "ocml",
    "ockl",
    "oclc_daz_opt_off",
    "oclc_unsafe_math_off",
    "oclc_finite_only_off",
    "oclc_correctly_rounded_sqrt_on",
)
FLAGS = (
    "-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", "-std=c++17", "-ffp-contract=off",
    "-fno-strict-aliasing", "-nogpuinc", "-include", "hip/hip_runtime.h", "-w", "-O1",
)  # fmt: skip
ASSEMBLER = Path("/usr/lib/llvm-15/bin/llvm-as")
YOUNGER_CLANG = Path("/usr/lib/llvm-19/bin")
KNOWS_ALL = 18
"""The first version of clang whose hipcc needs no help."""


@dataclass(frozen=True)
class Target:
    """An architecture.

    Attributes:
        machine: its number in the header of an object file.
        wave: threads that go together.
        version: as the libraries count it.
        younger: whether clang 15 does not know it.
        helped: whether hipcc 5.2 has no library for it.
    """

    machine: int
    wave: int
    version: int
    younger: bool
    helped: bool


TARGETS = {
    "gfx90a": Target(0x3F, 64, 9010, younger=False, helped=False),
    "gfx942": Target(0x4C, 64, 9402, younger=True, helped=True),
    "gfx1100": Target(0x41, 32, 11000, younger=False, helped=True),
}


@cache
def why_not() -> str | None:
    """What is missing for compiling."""
    if shutil.which("hipcc") is None:
        return f"hipcc is not installed (Debian: apt-get install {PACKAGES})"
    if clang_version() < KNOWS_ALL and not all((YOUNGER_CLANG / name).exists() for name in ("clang", "lld")):
        return f"clang 19, for gfx942, is not installed (Debian: apt-get install {PACKAGES})"
    return None


@cache
def clang_version() -> int:
    """Of the clang that hipcc calls by itself."""
    said = subprocess.run(
        ["hipcc", "--version"], capture_output=True, text=True, check=True, env=_environment()
    )
    found = re.search(r"clang version (\d+)", said.stdout)
    assert found, said.stdout
    return int(found[1])


def compiled(text: str, architecture: str, folder: Path) -> bytes:
    """Linked machine code of a module; fails with what the compiler says."""
    target, environment = TARGETS[architecture], _environment()
    flags = [*FLAGS, f"--offload-arch={architecture}"]
    if target.helped and clang_version() < KNOWS_ALL:
        abi = "oclc_abi_version_500" if target.younger else "oclc_abi_version_400"  # each clang's own
        wave = f"oclc_wavefrontsize64_{'on' if target.wave == 64 else 'off'}"
        flags.append("-nogpulib")
        given = [BITCODE / f"{name}.bc" for name in (*LIBRARIES, abi, wave)]
        for path in (*given, _version_as_bitcode(target.version, folder / "version")):
            flags += ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", str(path)]
        if target.younger:
            environment["HIP_CLANG_PATH"] = str(_under_older_names(folder / "clang"))
    source, made = folder / "kernels.hip", folder / "kernels.o"
    source.write_text(text)
    run = subprocess.run(
        ["hipcc", *flags, "-c", str(source), "-o", str(made)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, (
        "\n".join(re.findall(r"^.*error.*$", run.stderr, re.M)[:20]) or run.stderr[-3000:]
    )
    return made.read_bytes()


@cache
def runtime_compiler() -> ctypes.CDLL | None:
    """hipRTC, which compiles kernels where they run: of Debian 12, in the library of HIP itself."""
    for name in ("libhiprtc.so", "libamdhip64.so.5"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compiled_at_run_time(text: str, architecture: str, flags: tuple[str, ...]) -> str | None:
    """What hipRTC says where it does not take a module."""
    library, program = runtime_compiler(), ctypes.c_void_p()
    assert library is not None
    source = text.encode()
    assert library.hiprtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    given = (f"--offload-arch={architecture}", *flags)
    options = (ctypes.c_char_p * len(given))(*(flag.encode() for flag in given))
    status = library.hiprtcCompileProgram(program, len(given), options)
    size = ctypes.c_size_t()
    library.hiprtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    library.hiprtcGetProgramLog(program, log)
    library.hiprtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() if status else None


def _environment() -> dict[str, str]:
    return os.environ | {"HIP_PLATFORM": "amd"}


def _version_as_bitcode(version: int, folder: Path) -> Path:
    """A library that tells the others what they compute for, as ROCm's ``oclc_isa_version_*`` do."""
    folder.mkdir()
    text, made = folder / "version.ll", folder / "version.bc"
    text.write_text(
        f"@__oclc_ISA_version = linkonce_odr hidden addrspace(4) constant i32 {version}, align 4\n"
    )
    subprocess.run([str(ASSEMBLER), str(text), "-o", str(made)], check=True)
    return made


def _under_older_names(folder: Path) -> Path:
    """Clang 19 by the names that Debian's hipcc calls, beside its headers."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").symlink_to("/usr/lib")  # where clang/VERSION is
    for name in ("clang", "clang++"):
        (folder / "bin" / f"{name}-15").symlink_to(YOUNGER_CLANG / name)
    return folder / "bin"
