"""The kernels' source: structures as the host packs them, and text that the vendors' compilers take."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from refengine_cupy.attention import tile_bytes
from refengine_cupy.packing import LAYOUTS
from refengine_cupy.products import TILE_SHAPES, stage_bytes
from refengine_cupy.source import FOLDER, pack, structures, text_of

MODULES = sorted(path.stem for path in FOLDER.glob("*.cu"))
NVRTC = next(
    iter(
        glob.glob(f"{Path(sys.prefix)}/lib/python3*/site-packages/nvidia/**/libnvrtc.so.1?", recursive=True)
    ),
    None,
)


def test_structures_are_packed_as_a_compiler_lays_them_out() -> None:
    packed = pack(
        "RopeTable",
        {"positions": 1, "frequencies": 2, "table": None, "magnitude": 0.5, "count": 3, "pairs": 4},
    )
    assert packed == struct.pack("QQQdii", 1, 2, 0, 0.5, 3, 4)
    for name in (
        "LookUp",
        "TakeRows",
        "Binary",
        "Unary",
        "Norm",
        "Quantize",
        "Rope",
        "Turn",
        "Store",
        "Linear",
    ):
        assert set(structures()[name].values()) <= set("Qifd"), name
    for name in ("Product", "Attention"):
        assert set(structures()[name].values()) <= set("Qifd"), name


def test_a_field_too_many_or_too_few_is_an_error() -> None:
    fields = {"x": 1, "y": 2, "z": 3, "count": 4}
    with pytest.raises(KeyError):
        pack("Binary", {k: v for k, v in fields.items() if k != "z"})
    with pytest.raises(TypeError, match="Binary has no w"):
        pack("Binary", fields | {"w": 5})


def test_a_module_includes_what_it_needs_once() -> None:
    text = text_of("linear_a8", "q4_0")
    assert text.count("struct Nibbles {") == 1
    assert '#include "' not in text


@pytest.mark.parametrize("encoding", LAYOUTS)
def test_shared_memory_is_what_the_kernels_lay_out(encoding: str, tmp_path: Path) -> None:
    """The compiler's sizes of the structures, against the host's formulas."""
    header = Path(__file__).with_name("emulation.h")
    sizes = {
        "tiles_16": "2, 1, 1, 2, 6, 4",
        "tiles_64": "2, 2, 1, 4, 5, 4",
        "tiles_128": "4, 2, 2, 4, 3, 2",
    }
    source = tmp_path / "sizes.cpp"
    text = f'#include "{header}"\n{text_of("linear_a8_tiles", encoding)}\n'
    text += "".join(
        f"extern const int {name} = sizeof(Tiles<{encoding.upper()}, {v}>::Stage);\n"
        for name, v in sizes.items()
    )
    text += "#include <cstdio>\nint main() {" + "".join(f'printf("%d ", {name});' for name in sizes) + "}\n"
    source.write_text(text)
    program = tmp_path / "sizes"
    subprocess.run(
        ["g++", "-std=c++17", "-w", "-fno-strict-aliasing", str(source), "-o", str(program)], check=True
    )
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert [int(n) for n in found] == [stage_bytes(encoding, TILE_SHAPES[name]) for name in sizes]
    assert all(f"Tiles<E, {v}>" in (FOLDER / "linear_a8_tiles.cu").read_text() for v in sizes.values())


def test_a_tile_of_queries_takes_the_shared_memory_that_is_asked_for(tmp_path: Path) -> None:
    header, source, program = Path(__file__).with_name("emulation.h"), tmp_path / "s.cpp", tmp_path / "s"
    text = f'#include "{header}"\n{text_of("attention_tiles")}\n#include <cstdio>\n'
    text += (
        'int main() { printf("%zu %zu", sizeof(TileMemory<HalfChunk>), sizeof(TileMemory<FloatChunk>)); }\n'
    )
    source.write_text(text)
    subprocess.run(
        ["g++", "-std=c++17", "-w", "-fno-strict-aliasing", str(source), "-o", str(program)], check=True
    )
    half, full = map(
        int, subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    )
    assert half <= tile_bytes(2) < half + 16
    assert full <= tile_bytes(4) < full + 16


@pytest.mark.skipif(NVRTC is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)")
@pytest.mark.parametrize("module", MODULES)
def test_nvrtc_takes_every_module(module: str) -> None:
    """For the architecture of an H100, without a GPU."""
    library = ctypes.CDLL(str(NVRTC))
    encoding = "q6_k" if module.startswith("linear") else None
    program, text = ctypes.c_void_p(), text_of(module, encoding).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 3)(b"--gpu-architecture=sm_90", b"--std=c++17", b"--fmad=false")
    status = library.nvrtcCompileProgram(program, 3, options)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()[:3000]


@pytest.mark.skipif(shutil.which("hipcc") is None, reason="hipcc is not installed")
@pytest.mark.parametrize("architecture", ["gfx90a", "gfx1030", "gfx1100"])
@pytest.mark.parametrize("module", MODULES)
def test_hipcc_takes_every_module(module: str, architecture: str, tmp_path: Path) -> None:
    """To machine code; for gfx1100, of which Debian's ROCm has no device library, to assembly."""
    source = tmp_path / "kernels.hip"
    source.write_text(text_of(module, "q6_k" if module.startswith("linear") else None))
    flags = ["-x", "hip", "--cuda-device-only", "-std=c++17", "-ffp-contract=off", "-nogpuinc", "-w", "-O1"]
    if architecture == "gfx1100":
        flags += ["-nogpulib", "-S"]
    given = [f"--offload-arch={architecture}", *flags, "-include", "hip/hip_runtime.h"]
    made = subprocess.run(
        ["hipcc", *given, "-c", str(source), "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True, check=False, env=os.environ | {"HIP_PLATFORM": "amd"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[:3000]
