"""What gguf-py writes and reads is what refengine reads."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import FormatError, UnsupportedError
from refengine.loader.checkpoint import Checkpoint
from refengine.loader.gguf import TENSOR_TYPES, read_gguf
from refengine.loader.metadata import StringArray
from refengine.quantizer.encodings import ENCODINGS

STORED = {t.name.lower(): t for t in GGMLQuantizationType if t.name.lower() in ENCODINGS}


def write(
    path: Path,
    *,
    metadata: Mapping[str, tuple[Any, GGUFValueType, GGUFValueType | None]] | None = None,
    tensors: Mapping[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType]] | None = None,
    alignment: int | None = None,
    **options: Any,
) -> Path:
    """Lets gguf-py write a file of metadata (value, type, type of elements) and tensors (bytes, encoding)."""
    writer = gguf.GGUFWriter(path, "test", **options)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value, value_type, element_type) in (metadata or {}).items():
        writer.add_key_value(key, value, value_type, element_type)
    for name, (data, encoding) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model.gguf"


def assert_agrees(checkpoint: Checkpoint, reader: gguf.GGUFReader) -> None:
    """Key by key and tensor by tensor, ``checkpoint`` is what gguf-py's reader finds in the same file."""
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(checkpoint.metadata) == list(fields)
    for key, field in fields.items():
        ours = checkpoint.metadata[key]
        if isinstance(ours, np.ndarray):
            assert ours.dtype == reader.gguf_scalar_to_np[field.types[-1]]
            assert not ours.flags.writeable
        if isinstance(ours, np.ndarray | StringArray):
            assert field.types[0] == GGUFValueType.ARRAY
            ours = ours.tolist()
        assert repr(ours) == repr(field.contents()), key  # as text, in which NaN equals NaN and 1 is not True

    assert list(checkpoint.tensors) == [tensor.name for tensor in reader.tensors]
    for ours, theirs in zip(checkpoint.tensors.values(), reader.tensors, strict=True):
        assert ours.name == theirs.name
        assert ours.encoding == theirs.tensor_type.name.lower()
        assert ours.shape == (tuple(reversed(theirs.shape.tolist())) or (1,))
        assert ours.nbytes == theirs.n_bytes
        assert not ours.data.flags.writeable
        assert not ours.data.flags.owndata
        assert np.array_equal(ours.data.reshape(-1), theirs.data.reshape(-1).view(np.uint8))


# ---- generated files ------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=15)
keys = names.filter(lambda key: not key.startswith(("GGUF.", "general.", "split.")))
scalars: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    GGUFValueType.UINT8: st.integers(0, 2**8 - 1),
    GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: st.integers(0, 2**16 - 1),
    GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(max_size=20),
    GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    GGUFValueType.FLOAT64: st.floats(),
}
assert set(scalars) | {GGUFValueType.ARRAY} == set(GGUFValueType)

values = st.sampled_from(list(scalars)).flatmap(
    lambda value_type: st.one_of(
        st.tuples(scalars[value_type], st.just(value_type), st.none()),
        st.tuples(
            st.lists(scalars[value_type], min_size=1, max_size=9),
            st.just(GGUFValueType.ARRAY),
            st.just(value_type),
        ),
    )
)


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], GGMLQuantizationType]:
    """Random bytes in a random encoding, with one to four dimensions, any of them possibly zero."""
    encoding = draw(st.sampled_from(list(STORED.values())))
    _, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
    shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(0, 3)) * block_bytes]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.integers(0, 256, shape, np.uint8), encoding


@settings(deadline=None)
@given(
    metadata=st.dictionaries(keys, values, max_size=8),
    tensors=st.dictionaries(names, stored_tensors(), max_size=5),
    alignment=st.none() | st.sampled_from([2**exponent for exponent in range(3, 13)]),
)
def test_files_of_gguf_py_read_as_gguf_py_reads_them(
    metadata: dict[str, Any], tensors: dict[str, Any], alignment: int | None
) -> None:
    """Values and arrays of every type, and tensors in every encoding, read as written, at every alignment."""
    with scratch() as path:
        write(path, metadata=metadata, tensors=tensors, alignment=alignment)
        checkpoint = read_gguf(path)
        assert checkpoint.path == path
        assert checkpoint.format == "gguf"
        assert checkpoint.file_bytes == path.stat().st_size
        assert_agrees(checkpoint, gguf.GGUFReader(path))


@pytest.mark.parametrize("encoding", STORED)
def test_every_encoding_loads(tmp_path: Path, encoding: str) -> None:
    """Each implemented encoding loads, with the block sizes of gguf-py."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[STORED[encoding]]
    data = np.random.default_rng(0).integers(0, 256, (2, 3, 4 * block_bytes), np.uint8)
    path = write(tmp_path / "x.gguf", tensors={"weight": (data, STORED[encoding])})
    assert_agrees(read_gguf(path), gguf.GGUFReader(path))


@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 64, 4096, 2**21])
def test_every_power_of_two_aligns(tmp_path: Path, alignment: int) -> None:
    """Alignments load from 1, which gguf-py writes too, to a huge page."""
    f32 = GGMLQuantizationType.F32
    tensors = {"a": (np.arange(12, dtype=np.uint8), f32), "b": (np.arange(8, dtype=np.uint8), f32)}
    path = write(tmp_path / "x.gguf", tensors=tensors, alignment=alignment)
    assert_agrees(read_gguf(path), gguf.GGUFReader(path))


def test_tensor_types_are_numbered_as_in_ggml() -> None:
    """Every type that gguf-py knows has its number here."""
    for tensor_type in GGMLQuantizationType:
        assert TENSOR_TYPES[tensor_type] == tensor_type.name.lower()


@pytest.mark.parametrize("tensor_type", [t for t in GGMLQuantizationType if t.name.lower() not in ENCODINGS])
def test_encodings_not_implemented_are_named(tmp_path: Path, tensor_type: GGMLQuantizationType) -> None:
    """A known encoding that refengine does not decode is unsupported, not malformed."""
    data = np.zeros((1, gguf.GGML_QUANT_SIZES[tensor_type][1]), np.uint8)
    path = write(tmp_path / "x.gguf", tensors={"blk.0.weight": (data, tensor_type)})
    with pytest.raises(UnsupportedError, match=f"'blk.0.weight' .* {tensor_type.name.lower()},") as raised:
        read_gguf(path)
    assert str(raised.value).endswith(
        f"implemented are {', '.join(name for name in ENCODINGS if name in STORED)}"
    )


# ---- variants of the container --------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of one value and one tensor of 12 bytes, which padding follows."""
    return write(
        tmp_path / "small.gguf",
        metadata={"answer": (42, GGUFValueType.UINT8, None)},
        tensors={"weight": (np.arange(12, dtype=np.uint8), GGMLQuantizationType.F32)},
    )


@pytest.mark.parametrize("missing", range(0, 21, 4))
def test_final_padding_may_be_absent(small: Path, missing: int) -> None:
    """The file may end anywhere between the last byte of the last tensor and the alignment behind it."""
    small.write_bytes(small.read_bytes()[: small.stat().st_size - missing])
    assert read_gguf(small).tensors["weight"].data.tobytes() == bytes(range(12))


def test_version_2_reads_as_version_3(small: Path) -> None:
    """Versions 2 and 3 differ in nothing but the number, for little-endian files."""
    small.write_bytes(b"GGUF" + struct.pack("<I", 2) + small.read_bytes()[8:])
    assert_agrees(read_gguf(small), gguf.GGUFReader(small))


@pytest.mark.parametrize("padded", [False, True])
def test_vocabulary_files_have_no_tensors(tmp_path: Path, padded: bool) -> None:
    """A file of metadata alone loads, whether or not it ends on the alignment."""
    path = tmp_path / "vocab.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if padded:
        writer.write_tensors_to_file()
    writer.close()
    checkpoint = read_gguf(path)
    assert checkpoint.metadata.string("general.architecture") == "test"
    assert not checkpoint.tensors


def test_scalar_tensor_is_one_weight(tmp_path: Path) -> None:
    """A tensor without dimensions has the shape (1,), as in ggml."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("scale", np.float32(1.5).reshape(()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_agrees(read_gguf(path), gguf.GGUFReader(path))
    assert read_gguf(path).tensors["scale"].decode().tolist() == [1.5]


def test_big_endian_files_are_unsupported(tmp_path: Path) -> None:
    """A big-endian file is recognised by its version."""
    path = write(tmp_path / "x.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedError, match="big-endian"):
        read_gguf(path)


def test_split_files_are_unsupported(tmp_path: Path) -> None:
    """Every part of a split model is refused with the command that merges the parts."""
    tensors = {name: (np.zeros(4, np.uint8), GGMLQuantizationType.F32) for name in "ab"}
    write(tmp_path / "x.gguf", tensors=tensors, split_max_tensors=1)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 2
    for part in parts:
        with pytest.raises(UnsupportedError, match=r"one of 2 parts .* llama-gguf-split --merge"):
            read_gguf(part)


def test_open_file_is_immutable(small: Path) -> None:
    """Neither the tensors of a checkpoint nor their bytes can be changed."""
    checkpoint = read_gguf(small)
    with pytest.raises(TypeError):
        checkpoint.tensors["other"] = checkpoint.tensors["weight"]  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.tensors["weight"].data[0] = 1


def test_tensors_are_mapped_not_read(small: Path) -> None:
    """A tensor of 4 GiB opens in a few kilobytes, and its last byte is found."""
    data = small.read_bytes()
    declared = data.replace(struct.pack("<IQ", 1, 3), struct.pack("<IQ", 1, 2**30))
    small.write_bytes(declared[: len(data) - 32])
    with small.open("r+b") as file:  # a hole, which takes no disk
        file.truncate(len(data) - 32 + 2**32)
        file.seek(-1, 2)
        file.write(b"\x7f")
    tracemalloc.start()
    try:
        tensor = read_gguf(small).tensors["weight"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**10
    assert tensor.shape == (2**30,)
    assert tensor.data[-1] == 0x7F


# ---- what is no file at all -----------------------------------------------------------------------------


def test_missing_file_is_a_format_error(tmp_path: Path) -> None:
    """A path to nothing is an error of the same class as a broken file, and names the path."""
    with pytest.raises(FormatError, match="No such file") as caught:
        read_gguf(tmp_path / "absent.gguf")
    assert caught.value.path == tmp_path / "absent.gguf"


def test_directory_is_a_format_error(tmp_path: Path) -> None:
    """A folder is refused before it is opened."""
    with pytest.raises(FormatError, match="not a regular file"):
        read_gguf(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe, whose opening would block, is refused."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        read_gguf(tmp_path / "pipe")


def test_unreadable_file_is_a_format_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system refuses to open is reported, not raised raw."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FormatError, match="Permission denied"):
        read_gguf(small)


def test_path_with_zero_byte_is_a_format_error() -> None:
    """A path that no file can have is reported like one that is missing."""
    with pytest.raises(FormatError, match="cannot be read"):
        read_gguf("a\0b")


def test_empty_file_is_a_format_error(tmp_path: Path) -> None:
    """A file without a byte, which cannot be mapped, is refused."""
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="empty") as caught:
        read_gguf(tmp_path / "empty.gguf")
    assert caught.value.offset == 0


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (struct.pack("<Q", 60) + b'{"weight":{"dtype":"F32"', "a safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
        (b"PK\x03\x04\x00\x00", "a zip archive"),
        (b"\x80\x02\x8a\x0a", "a Python pickle"),
        (b"\x80\x04\x95\x00", "a Python pickle"),
        (struct.pack("<I", 0x67676D6C) + bytes(16), "a GGML file"),
        (struct.pack("<II", 0x67676D66, 1) + bytes(16), "a GGMF file"),
        (struct.pack("<II", 0x67676A74, 3) + bytes(16), "a GGJT file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x7fELF", r"unknown \(b'\\x7fELF'\)"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    """A file in another format is told what it is."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"this is {kind}.*, not GGUF") as caught:
        read_gguf(path)
    assert caught.value.offset == 0


# ---- real files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_published_models_read_as_gguf_py_reads_them(request: pytest.FixtureRequest, model: str) -> None:
    """Two published models, one with 262,144 tokens, read as gguf-py reads them."""
    path: Path = request.getfixturevalue(model)
    assert_agrees(read_gguf(path), gguf.GGUFReader(path))
