"""A requantized file is the old one but for its matrices, and those hold what ``gguf`` makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from requantize import WIDER, requantize, stored_metadata

from refengine import loader
from refengine.errors import OutputError
from refengine.loader.gguf_writer import write_gguf
from refengine.synth import SHAPES, synthesize

TINY = replace(
    SHAPES["smollm2-135m"], layers=2, hidden_size=64, ffn_size=96, heads=4, kv_heads=2, head_size=16,
    vocabulary_size=500, context_length=64,
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> loader.Checkpoint:
    made = synthesize(TINY, "f32", uniform=True)
    write_gguf(tmp_path / "source.gguf", made.metadata, made.tensors)
    return loader.read_gguf(tmp_path / "source.gguf")


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("everything", [False, True], ids=["embedding kept", "everything"])
def test_matrices_are_what_gguf_makes_of_them(
    source: loader.Checkpoint, tmp_path: Path, name: str, everything: bool
) -> None:
    target = tmp_path / "target.gguf"
    n_bytes = requantize(source, target, name, everything=everything)
    found = loader.read_gguf(target)
    assert n_bytes == target.stat().st_size
    assert list(found.tensors) == list(source.tensors)
    for key, tensor in found.tensors.items():
        old = source.tensors[key]
        if len(old.shape) == 1 or (key in WIDER and not everything):
            assert (tensor.encoding, tensor.data.tobytes()) == (old.encoding, old.data.tobytes())
        else:
            assert tensor.encoding == name
            kind = gguf.GGMLQuantizationType[name.upper()]
            assert tensor.data.tobytes() == gguf.quants.quantize(old.decode(), kind).tobytes()


def test_metadata_keep_their_types(source: loader.Checkpoint, tmp_path: Path) -> None:
    """As an outside reader sees them; only the type of the file is another."""
    requantize(source, tmp_path / "target.gguf", "q8_0")
    old, new = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("source", "target"))
    ours = [key for key in new if not key.startswith("GGUF.")]
    assert set(ours) - {"general.file_type"} == set(stored_metadata(source)) - {"general.file_type"}
    for key in ours:
        if key == "general.file_type":
            assert new[key].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
        else:
            assert new[key].types == old[key].types
            assert np.array_equal(new[key].contents(), old[key].contents())


def test_a_file_is_replaced_only_on_request(source: loader.Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "target.gguf"
    requantize(source, target, "q4_0")
    with pytest.raises(OutputError, match="exists already"):
        requantize(source, target, "q8_0")
    requantize(source, target, "q8_0", overwrite=True)
