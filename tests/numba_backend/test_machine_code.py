"""Compiled code is kept, found again, dropped when any module changes, and checked where asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from refengine_numba import machine_code
from refengine_numba.compiler import Compiler
from refengine_numba.layout import LAYOUTS

START = """
import sys
from refengine_numba.entries import entry
kernel = entry("activations.quantize")
print("numba" in sys.modules, kernel.address != 0)
"""


GIVEN_BACK = """
import numpy as np
from refengine_numba import machine_code, row_arguments
from refengine_numba.entries import entry
from refengine_numba.team import Team

def resident():
    lines = open("/proc/self/smaps").read().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith("libllvmlite.so") and " r-xp " in line]
    return sum(int(next(x for x in lines[i:] if x.startswith("Rss:")).split()[1]) for i in starts)

x, y = np.ones((3, 40), np.float32), np.zeros((3, 40), np.float32)
for name in ("add", "silu"):
    kernel = entry("elementwise.elementwise", name)
    touched = resident()
    machine_code.give_back()
    print(resident() < touched)
    Team(1).run(kernel, row_arguments.elementwise(name, x, x, y).words)
    print(round(float(y[2, 39]), 3))
"""


RUN = """
import sys
from refengine_conformance.tiny_model import tiny_model
from refengine import Engine, EngineConfig, Request
from refengine.backend import load
engine = Engine(tiny_model("llama"), load("numba"), EngineConfig())
engine.submit(Request((1, 2, 3), 8))
while engine.has_work:
    print([output.sampled for output in engine.step()])
print("|", "numba" in sys.modules)
"""


EVERY = """
import sys
from refengine_numba import isa
from refengine_numba.__main__ import kernels
from refengine_numba.entries import entry
for kernel in kernels(isa.choose()):
    entry(*kernel)
print("numba" in sys.modules)
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """It loads what the first one had compiled. Neither imports Numba: that took a process of its own."""
    first, second = (python(START, **{machine_code.VARIABLE: str(tmp_path)}) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout == "False True\n"
    assert first.stderr.count("compiling kernels") == 1
    assert second.stderr == ""


def test_without_a_folder_a_process_compiles_for_itself() -> None:
    """As it does where the other process cannot: what fails then fails where it is asked for."""
    alone = python(START, **{machine_code.VARIABLE: ""})
    assert (alone.returncode, alone.stdout) == (0, "True True\n"), alone.stderr
    assert "names no folder" in alone.stderr


def test_a_kernel_that_there_is_not(tmp_path: Path) -> None:
    """An unknown option is the same error, wherever a kernel is compiled."""
    code = START.replace('"activations.quantize"', '"products.float32", "iq4_nl"')
    done = python(code, **{machine_code.VARIABLE: str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'iq4_nl'")


def test_the_compiler_may_end_between_two_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts again: nobody asked it for long, or somebody ended it."""
    monkeypatch.setenv(machine_code.VARIABLE, str(tmp_path))
    machine_code.folder.cache_clear()
    asked = Compiler()
    assert asked.compile("copy.take_rows")
    assert asked._process is not None
    asked._process.kill()
    asked._process.wait()
    assert asked.compile("elementwise.elementwise", "add")
    assert {file.name for file in tmp_path.glob("*/*")} == {
        "copy.take_rows.o",
        "elementwise.elementwise-add.o",
    }
    asked._end()
    machine_code.folder.cache_clear()


DAMAGES = {
    "empty": lambda whole: b"",
    "header": lambda whole: machine_code.HEADER,
    "another": lambda whole: b"\x7fELF" + whole,
    "cut": lambda whole: whole[:-1],
    "bit": lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_the_linker_leaves_the_process_and_comes_back() -> None:
    """Its code is read again from its file, and links the next kernel."""
    done = python(GIVEN_BACK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == ["True", "2.0", "True", "0.731"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_compiled_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Cut short, changed in one bit, or something else altogether: code that was not kept does not run."""
    kept = {machine_code.VARIABLE: str(tmp_path)}
    python(START, **kept)
    (file,) = tmp_path.glob("*/activations.quantize.o")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again, third = python(START, **kept), python(START, **kept)
    assert (again.returncode, again.stdout) == (0, "False True\n"), again.stderr
    assert "compiling kernels" in again.stderr
    assert (third.stdout, third.stderr) == ("False True\n", "")


def test_a_whole_run_does_without_numba(tmp_path: Path) -> None:
    """Tokens of a second process are those of the first, and neither compiled anything itself."""
    first, second = (python(RUN, **{machine_code.VARIABLE: str(tmp_path)}) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert first.stdout.endswith("| False\n")


def test_an_empty_name_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``REFENGINE_NUMBA_CACHE=`` compiles anew in every process."""
    machine_code.folder.cache_clear()
    monkeypatch.setenv(machine_code.VARIABLE, "")
    assert machine_code.folder() is None
    machine_code.folder.cache_clear()


def test_a_folder_that_is_read_only_serves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image that was filled by another user."""
    python(START, **{machine_code.VARIABLE: str(tmp_path)})
    machine_code.folder.cache_clear()
    monkeypatch.setenv(machine_code.VARIABLE, str(tmp_path))
    monkeypatch.setattr(machine_code.os, "access", lambda path, mode: False)
    assert not machine_code.can_keep()
    for _ in range(2):
        assert machine_code.load("activations.quantize") is not None
    assert machine_code.load("copy.take_rows") is None
    machine_code.folder.cache_clear()


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only home is no error, and code does not land anywhere else."""
    (tmp_path / "file").touch()
    machine_code.folder.cache_clear()
    monkeypatch.setenv(machine_code.VARIABLE, str(tmp_path / "file" / "folder"))
    assert machine_code.folder() is None
    machine_code.folder.cache_clear()


def test_the_folder_is_named_by_the_modules_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in any module, inlined ones included, is another folder."""
    names = set()
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "machine_code.py").write_text(text)
        monkeypatch.setattr(machine_code, "__file__", str(tmp_path / "machine_code.py"))
        monkeypatch.setenv(machine_code.VARIABLE, str(tmp_path / "kept"))
        machine_code.folder.cache_clear()
        names.add(machine_code.folder())
    machine_code.folder.cache_clear()
    assert len(names) == 2


CHECKED = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
from numba_backend.conftest import run, stored_matrix
from refengine_numba import entries, isa
from refengine_numba.layout import LAYOUTS
from refengine_numba.matrix import TiledMatrix, quantization
from refengine_numba.records import record_bytes
from refengine_numba.repack import pack
EACH = ("q8_0", "q6_k", "int4_g64", "int8_g128")  # of these, every instruction set's kernels
lie = sys.argv[1:] == ["lie"]
for name in ["q4_0"] if lie else LAYOUTS:
    rows, columns = 17, 256 if LAYOUTS[name].bits else 37
    matrix = TiledMatrix(name, rows, columns, pack(name, stored_matrix(name, rows, columns)))
    x = np.ones((5, columns), np.float32)
    y = np.zeros((5, rows), np.float32)
    arguments = matrix.product(x, y)
    if lie:
        arguments.words[1] -= 1  # one byte fewer than the kernel reads
    run(entries.entry("products.float32", name), arguments, 2)
    ids = np.array([16, 3], np.int32)
    run(entries.entry("rows.look_up", name), matrix.look_up(ids, np.zeros((2, columns), np.float32)), 2)
    if LAYOUTS[name].bits and not lie:
        records = np.zeros(record_bytes(5, columns), np.uint8)
        run(entries.entry("activations.quantize"), quantization(x, records), 2)
        for path in isa.available(isa.processor_features())[:: 1 if name in EACH else 9]:
            run(entries.entry("products.mixed8", name, path), matrix.product(records, y), 2)
print("done")
"""


def test_no_kernel_leaves_its_arrays() -> None:
    """Compiled with bounds checking, every encoding's kernels find every access inside."""
    code = CHECKED.format(folder=str(Path(__file__).parents[1]))
    done = python(code, NUMBA_BOUNDSCHECK="1")
    assert (done.returncode, done.stdout, "Error" in done.stderr) == (0, "done\n", False), done.stderr
    assert len(LAYOUTS) == 17


def test_bounds_checking_would_tell() -> None:
    """Told of one byte fewer than there are, a kernel stops and says so."""
    code = CHECKED.format(folder=str(Path(__file__).parents[1])).replace('sys.argv[1:] == ["lie"]', "True")
    done = python(code, NUMBA_BOUNDSCHECK="1")
    assert "IndexError: a vector reaches outside of its array" in done.stderr


def test_every_kernel_runs_without_numba() -> None:
    """None of them can raise an exception, which only Numba could make."""
    compile_all = [sys.executable, "-m", "refengine_numba"]
    assert subprocess.run(compile_all, check=False, capture_output=True).returncode == 0
    done = python(EVERY)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
