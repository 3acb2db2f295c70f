"""Compiled code is kept, found again, dropped when any module changes, and checked where asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refengine_numba import compilation
from refengine_numba.layout import LAYOUTS

START = """
import time
from refengine_numba import entry
start = time.perf_counter()
kernel = entry.quantize_entry()
print(sum(kernel.cache_hits.values()) if hasattr(kernel.cache_hits, "values") else kernel.cache_hits)
print(time.perf_counter() - start)
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """It loads what the first one left."""
    first, second = (python(START, **{compilation.VARIABLE: str(tmp_path)}) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.split()[0] == "0"
    assert second.stdout.split()[0] == "1"
    assert not Path(tmp_path, "__pycache__").exists()


def test_an_empty_name_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``REFENGINE_NUMBA_CACHE=`` compiles anew in every process."""
    compilation.cache_folder.cache_clear()
    monkeypatch.setenv(compilation.VARIABLE, "")
    assert compilation.cache_folder() is None
    compilation.cache_folder.cache_clear()


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only home is no error, and code does not land anywhere else."""
    (tmp_path / "file").touch()
    compilation.cache_folder.cache_clear()
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "file" / "folder"))
    assert compilation.cache_folder() is None
    compilation.cache_folder.cache_clear()


def test_the_folder_is_named_by_the_modules_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in any module, inlined ones included, is another folder."""
    names = set()
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "compilation.py").write_text(text)
        monkeypatch.setattr(compilation, "__file__", str(tmp_path / "compilation.py"))
        monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "kept"))
        compilation.cache_folder.cache_clear()
        names.add(compilation.cache_folder())
    compilation.cache_folder.cache_clear()
    assert len(names) == 2


CHECKED = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
from conftest import run, stored_matrix
from refengine_numba import activations, entry, isa
from refengine_numba.layout import LAYOUTS
from refengine_numba.matrix import TiledMatrix, quantization
from refengine_numba.repack import pack
lie = sys.argv[1:] == ["lie"]
for name in ["q4_0"] if lie else LAYOUTS:
    rows, columns = 17, 256 if LAYOUTS[name].bits else 37
    matrix = TiledMatrix(name, rows, columns, pack(name, stored_matrix(name, rows, columns)))
    x = np.ones((5, columns), np.float32)
    y = np.zeros((5, rows), np.float32)
    arguments = matrix.product(x, y)
    if lie:
        arguments.words[1] -= 1  # one byte fewer than the kernel reads
    run(entry.float32_entry(name), arguments, 2)
    ids = np.array([16, 3], np.int32)
    run(entry.rows_entry(name), matrix.look_up(ids, np.zeros((2, columns), np.float32)), 2)
    if LAYOUTS[name].bits and not lie:
        records = np.zeros(activations.record_bytes(5, columns), np.uint8)
        run(entry.quantize_entry(), quantization(x, records), 2)
        for path in isa.available(isa.processor_features())[:: 1 if name in ("q8_0", "q6_k") else 9]:
            run(entry.mixed8_entry(name, path), matrix.product(records, y), 2)
print("done")
"""


def test_no_kernel_leaves_its_arrays() -> None:
    """Compiled with bounds checking, every encoding's kernels find every access inside."""
    code = CHECKED.format(folder=str(Path(__file__).parent))
    done = python(code, NUMBA_BOUNDSCHECK="1")
    assert (done.returncode, done.stdout, "Error" in done.stderr) == (0, "done\n", False), done.stderr
    assert len(LAYOUTS) == 11


def test_bounds_checking_would_tell() -> None:
    """Told of one byte fewer than there are, a kernel stops and says so."""
    code = CHECKED.format(folder=str(Path(__file__).parent)).replace('sys.argv[1:] == ["lie"]', "True")
    done = python(code, NUMBA_BOUNDSCHECK="1")
    assert "IndexError: a vector reaches outside of its array" in done.stderr
