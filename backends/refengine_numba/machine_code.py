"""Machine code on disk: kernels that were compiled once are loaded without Numba, by LLVM's linker alone.

Importing Numba and letting it load a cached function takes most of a start, and most of a process's memory
before the first weight. What a kernel is in the end is an object file with one function that a program in C
could call; so that is what is kept, in a folder named by the text of all modules, the versions of the
compilers and the processor. A change of any of these starts an empty one.

An object file refers to functions of Numba's runtime on paths that are never taken (a reference count that
falls to zero, an error to be reported to Python). These lead to ``abort``. One that could raise an exception
is not kept: it takes Numba to make one.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import sys
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

VARIABLE = "REFENGINE_NUMBA_CACHE"
"""The environment variable that names the folder for compiled code; empty: compile in every process."""

HEADER = b"refengine kernel 1\n"

NEVER_CALLED = ("NRT_MemInfo_call_dtor", "numba_gil_ensure", "numba_gil_release")
"""What object files refer to of Numba's runtime."""

RAISES = b"numba_do_raise"
"""What an object file that can raise an exception refers to."""

SETTINGS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")
"""Environment variables that change what Numba compiles."""


def checks_bounds() -> bool:
    """Whether compiled code looks before it reads: ``NUMBA_BOUNDSCHECK``. Such code needs Numba to run."""
    return os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")


@lru_cache(maxsize=1)
def folder() -> Path | None:
    """Where compiled kernels are kept; ``None`` where they are not, or there can be no such folder."""
    root = os.environ.get(VARIABLE)
    if root == "":
        return None
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME") or (
            os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
        )
        root = str(Path(base or Path.home() / ".cache") / "refengine" / "numba")
    made_by = [version("numba"), version("llvmlite"), sys.platform, llvm.get_host_cpu_name()]
    made_by.append(llvm.get_host_cpu_features().flatten())
    made_by += [os.environ.get(name, "") for name in SETTINGS]
    text = hashlib.sha256("\n".join(made_by).encode())
    here = Path(__file__).parent
    for module in sorted([*here.glob("*.py"), *here.glob("kernels/*.py")]):
        text.update(module.read_bytes())
    path = Path(root) / f"{text.hexdigest()[:16]}{'-checked' if checks_bounds() else ''}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path


def can_keep() -> bool:
    """Whether the next start finds what is compiled now: not in an image that is read only."""
    here = folder()
    return here is not None and os.access(here, os.W_OK)


def store(name: str, symbol: str, image: bytes) -> bool:
    """Keep an object file and the name of its function; whether there was a folder, and room in it."""
    here = folder()
    if here is None or RAISES in image:
        return False
    digest = hashlib.sha256(image).hexdigest()
    unfinished = here / f"{name}.{os.getpid()}"
    try:
        unfinished.write_bytes(b"".join((HEADER, f"{symbol}\n{digest}\n".encode(), image)))
        unfinished.replace(here / f"{name}.o")
    except OSError:
        unfinished.unlink(missing_ok=True)
        return False
    return True


def load(name: str) -> tuple[int, Any] | None:
    """The address of a kept kernel's function, and what must live for as long as it is called.

    ``None`` where there is none, its file is damaged, or this process lacks what it refers to. A kernel may
    be loaded more than once: each is a library of its own, under a name that the linker has not seen yet.
    """
    here = folder()
    try:
        data = b"" if here is None else (here / f"{name}.o").read_bytes()
    except OSError:
        return None
    if not data.startswith(HEADER):
        return None
    symbol, digest, image = (data[len(HEADER) :].split(b"\n", 2) + [b""] * 3)[:3]
    if hashlib.sha256(image).hexdigest().encode() != digest:
        return None
    library = llvm.JITLibraryBuilder().add_object_img(image).add_current_process()
    for missing in NEVER_CALLED:
        library.import_symbol(missing, _abort())
    try:
        linked = library.export_symbol(symbol.decode()).link(_linker(), f"{name} {os.urandom(8).hex()}")
    except RuntimeError:
        return None
    return linked[symbol.decode()], linked


def give_back() -> None:
    """Let the linker's own code leave the process, for as long as nothing is linked.

    It is some 20 to 70 MB of a library's file, as much as the system maps around what was touched; it is
    mapped again when it is needed. Where the system does not tell where it lies, nothing happens.
    """
    for address, nbytes in _linker_code():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)


@cache
def _linker_code() -> tuple[tuple[int, int], ...]:
    """Address and bytes of the mappings of LLVM's library that are code: nobody has written there."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return ()
    mappings = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    code = [fields[0] for fields in mappings if fields[1] == "r-xp" and fields[-1].endswith("libllvmlite.so")]
    ends = [[int(end, 16) for end in place.split("-")] for place in code]
    return tuple((start, stop - start) for start, stop in ends)


@cache
def _linker() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


@cache
def _abort() -> int:
    library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return ctypes.cast(library.abort, ctypes.c_void_p).value or 0
