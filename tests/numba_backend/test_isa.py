"""The instruction set is chosen at run time, can be forced, and is refused where the processor lacks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refengine.errors import UnsupportedError
from refengine_numba import isa


def test_the_best_available_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the table; the portable path is always there."""
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert isa.available(frozenset()) == ("portable",)
    assert isa.available(frozenset({"avx2", "fma"})) == ("avx2", "portable")
    assert isa.available(frozenset({"avx2", "fma", "avxvnni"}))[0] == "avx-vnni"
    assert isa.choose() == isa.available(isa.processor_features())[0]


def test_the_environment_and_the_argument_force_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument goes before the variable."""
    monkeypatch.setenv(isa.VARIABLE, "portable")
    assert isa.choose() == "portable"
    best = isa.available(isa.processor_features())[0]
    assert isa.choose(best) == best


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name, and a right one on the wrong machine; both say what there is."""
    with pytest.raises(UnsupportedError, match=r"unknown instruction set 'sse9'; there are avx512-vnni"):
        isa.choose("sse9")
    monkeypatch.setattr(isa, "processor_features", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(UnsupportedError, match=r"no avx512-vnni \(it lacks avx512bw.*avx2, portable"):
        isa.choose("avx512-vnni")


CODE = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
from numba_backend.conftest import run, stored_matrix
from refengine_numba import entries, isa
from refengine_numba.matrix import TiledMatrix, quantization
from refengine_numba.records import record_bytes
from refengine_numba.repack import pack
results = []
for name in ("q4_1", "q6_k", "int4_g64", "int8_g128"):
    matrix = TiledMatrix(name, 33, 256, pack(name, stored_matrix(name, 33, 256)))
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    records, y = np.zeros(record_bytes(3, 256), np.uint8), np.zeros((3, 33), np.float32)
    run(entries.entry("activations.quantize"), quantization(x, records))
    run(entries.entry("products.mixed8", name, isa.choose()), matrix.product(records, y))
    results.append(y.tobytes().hex())
    run(entries.entry("products.float32", name), matrix.product(x, y))
    results.append(y.tobytes().hex())
print(isa.choose(), *results)
"""


@pytest.mark.skipif("x86" not in os.uname().machine, reason="names processors of the x86 family")
@pytest.mark.parametrize(
    ("processor", "features", "chosen"),
    [("haswell", "+avx2,+fma,+avx,+sse4.2,+f16c", "avx2"), ("x86-64", "", "portable")],
)
def test_older_processors_give_the_same_bits(processor: str, features: str, chosen: str) -> None:
    """Code compiled for a processor without AVX-512, or without any AVX, chooses its path and agrees bit for bit."""
    if chosen not in isa.available(isa.processor_features()):
        pytest.skip(f"this processor has no {chosen}")
    code = CODE.format(folder=str(Path(__file__).parents[1]))

    def outcome(**variables: str) -> list[str]:
        environment = os.environ | variables
        environment.pop(isa.VARIABLE, None)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    old = outcome(NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)
    new = outcome()
    assert old[0] == chosen
    assert old[1:] == new[1:]
    assert np.isfinite(np.frombuffer(bytes.fromhex(new[1]), np.float32)).all()
