"""The kernels' source: structures as the host packs them, and text that the vendors' compilers take."""

from __future__ import annotations

import ctypes
import glob
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from refengine_cupy.attention import tile_bytes
from refengine_cupy.packing import LAYOUTS
from refengine_cupy.products import TILE_SHAPES, stage_bytes
from refengine_cupy.source import FOLDER, SEALED_MODULES, formats_name, pack, structures, text_of

MODULES = sorted(path.stem for path in FOLDER.glob("*.cu"))


def versions(module: str) -> tuple[str | None, ...]:
    """Encodings of weights, or formats of sealed keys and values, that a module is compiled for here."""
    if module in SEALED_MODULES:
        pairs = [("int8", "int8"), ("int4", "int4"), ("float16", "int8")]
        even = [formats_name(keys, values, "float16", even=True) for keys, values in pairs]
        tiles = module == "attention_sealed_tiles"  # which take no others
        return (*even, *([] if tiles else [formats_name("int8", "int4", "float32", even=False)]))
    return ("q6_k", "int4_g64", "bf16") if module.startswith("linear") else (None,)


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
    for name in ("Product", "Attention", "Seal"):
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
    text += 'int main() { printf("%zu", sizeof(TileMemory<FloatChunk>)); }\n'
    source.write_text(text)
    subprocess.run(
        ["g++", "-std=c++17", "-w", "-fno-strict-aliasing", str(source), "-o", str(program)], check=True
    )
    needed = int(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)
    assert needed <= tile_bytes() < needed + 16


@pytest.mark.skipif(NVRTC is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)")
@pytest.mark.parametrize(
    ("module", "encoding"),
    [(module, encoding) for module in MODULES for encoding in versions(module)],
)
def test_nvrtc_takes_every_module(module: str, encoding: str | None) -> None:
    """For the architecture of an H100, without a GPU."""
    library = ctypes.CDLL(str(NVRTC))
    program, text = ctypes.c_void_p(), text_of(module, encoding).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 3)(b"--gpu-architecture=sm_90", b"--std=c++17", b"--fmad=false")
    status = library.nvrtcCompileProgram(program, 3, options)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()[:3000]
