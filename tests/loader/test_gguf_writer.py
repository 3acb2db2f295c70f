"""What refengine writes is what gguf-py writes and reads, and nothing is left of what could not be written."""

from __future__ import annotations

import os
import resource
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.errors import FormatError, OutputError, UnsupportedError
from refengine.loader.gguf import TENSOR_TYPES, read_gguf
from refengine.loader.gguf_writer import OutgoingTensor, WritableValue, gguf_bytes, write_gguf
from refengine.quantizer.encodings import ENCODINGS

TYPES = {
    GGUFValueType.UINT8: np.uint8,
    GGUFValueType.INT8: np.int8,
    GGUFValueType.UINT16: np.uint16,
    GGUFValueType.INT16: np.int16,
    GGUFValueType.UINT32: np.uint32,
    GGUFValueType.INT32: np.int32,
    GGUFValueType.FLOAT32: np.float32,
    GGUFValueType.BOOL: np.bool_,
    GGUFValueType.UINT64: np.uint64,
    GGUFValueType.INT64: np.int64,
    GGUFValueType.FLOAT64: np.float64,
}
assert set(TYPES) | {GGUFValueType.STRING, GGUFValueType.ARRAY} == set(GGUFValueType)


def f32(name: str = "weight", count: int = 3) -> OutgoingTensor:
    return OutgoingTensor(name, (count,), "f32", [np.arange(count, dtype="<f4")])


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is written ------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=15)
keys = names.filter(lambda key: not key.startswith(("GGUF.", "general.", "split.")))
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@st.composite
def values(draw: st.DrawFn) -> tuple[WritableValue, tuple[Any, GGUFValueType, GGUFValueType | None]]:
    """A value, and what gguf-py is to be given for it: value, type, type of elements."""
    kind = draw(st.sampled_from(list(GGUFValueType)))
    if kind == GGUFValueType.STRING:
        string = draw(text)
        return string, (string, kind, None)
    if kind == GGUFValueType.ARRAY:
        strings = draw(st.lists(text, min_size=1, max_size=9))
        return draw(st.sampled_from([strings, tuple(strings)])), (strings, kind, GGUFValueType.STRING)
    dtype = np.dtype(TYPES[kind])
    raw = draw(st.binary(min_size=dtype.itemsize, max_size=9 * dtype.itemsize))
    array = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], np.uint8)
    array = (array & 1).astype(bool) if dtype == np.bool_ else array.view(dtype)
    if dtype.kind == "f":
        array = np.nan_to_num(array)  # packing a NaN may change its payload
    if draw(st.booleans()):
        swapped = array.astype(array.dtype.newbyteorder(draw(st.sampled_from("<>"))))
        return swapped, (array.tolist(), GGUFValueType.ARRAY, kind)
    scalar = array[0].item() if dtype == np.bool_ and draw(st.booleans()) else array[0]
    return scalar, (array[0].item(), kind, None)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray[Any, Any], list[Any]]:
    """An encoding, random bytes with one to four dimensions, and the same bytes in chunks."""
    encoding = draw(st.sampled_from([name for name in ENCODINGS if name in TENSOR_TYPES]))
    shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(0, 3))]
    shape[-1] *= ENCODINGS[encoding].block_bytes
    data = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, shape, np.uint8)
    cuts = sorted(draw(st.lists(st.integers(0, data.size), max_size=4)))
    chunks: list[Any] = np.split(data.reshape(-1), cuts)
    as_bytes = draw(st.booleans())
    return encoding, data, [chunk.tobytes() for chunk in chunks] if as_bytes else [*chunks]


@settings(deadline=None)
@given(
    metadata=st.dictionaries(keys, values(), max_size=8),
    stored=st.dictionaries(names, tensors(), max_size=5),
    alignment=st.none() | st.sampled_from([2**exponent for exponent in range(3, 13)]),
)
def test_files_are_those_of_gguf_py(metadata: Any, stored: Any, alignment: int | None) -> None:
    """Values and arrays of every type and tensors in every encoding: byte by byte what gguf-py writes."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        writer = gguf.GGUFWriter(theirs, "test")
        own: dict[str, WritableValue] = {"general.architecture": "test"}
        if alignment is not None:
            writer.add_custom_alignment(alignment)
            own["general.alignment"] = np.uint32(alignment)
        for key, (value, (plain, value_type, element_type)) in metadata.items():
            writer.add_key_value(key, plain, value_type, element_type)
            own[key] = value
        outgoing = []
        for name, (encoding, data, chunks) in stored.items():
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[encoding.upper()])
            shape = (*data.shape[:-1], ENCODINGS[encoding].row_weights(data.shape[-1]))
            outgoing.append(OutgoingTensor(name, shape, encoding, chunks))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        size = write_gguf(ours, own, outgoing)
        assert ours.read_bytes() == theirs.read_bytes()
        assert size == gguf_bytes(own, outgoing) == ours.stat().st_size
        assert list(read_gguf(ours).tensors) == list(stored)
        assert contents(Path(folder)) == ["ours.gguf", "theirs.gguf"]


@pytest.mark.parametrize("alignment", [1, 2, 2**21])
def test_the_ends_of_what_aligns(tmp_path: Path, alignment: int) -> None:
    """From 1 to a huge page, each tensor is where gguf-py's reader finds it."""
    path = tmp_path / "x.gguf"
    write_gguf(path, {"general.alignment": np.uint32(alignment)}, [f32("a", 5), f32("b", 2)])
    read = {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(path).tensors}
    assert read == {"a": [0, 1, 2, 3, 4], "b": [0, 1]}
    assert {name: tensor.decode().tolist() for name, tensor in read_gguf(path).tensors.items()} == read


def test_an_empty_array_of_strings(tmp_path: Path) -> None:
    """An array without elements has a type all the same."""
    path = tmp_path / "x.gguf"
    write_gguf(path, {"strings": [], "numbers": np.zeros(0, np.int16)}, [])
    metadata = read_gguf(path).metadata
    assert metadata.strings("strings").tolist() == []
    assert metadata.array("numbers").dtype == np.int16


def test_memory_is_one_chunk(tmp_path: Path) -> None:
    """A tensor of 64 MiB passes through in chunks of 1 MiB."""
    chunk = np.zeros(2**18, "<f4")
    tensor = OutgoingTensor("weight", (64, 2**18), "f32", (chunk + i for i in range(64)))
    tracemalloc.start()
    write_gguf(tmp_path / "x.gguf", {}, [tensor])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert read_gguf(tmp_path / "x.gguf").tensors["weight"].decode()[:, 7].tolist() == list(range(64))


def test_progress_counts_every_byte(tmp_path: Path, progress: Any) -> None:
    """The total is told first, the pieces add up to it, and the end is told once, also after a failure."""
    size = write_gguf(tmp_path / "x.gguf", {"a": "b"}, [f32()], progress=progress)
    assert (progress.total_bytes, sum(progress.advances)) == (size, size)
    assert (progress.calls[0], progress.calls[-1], progress.calls.count("finish")) == ("start", "finish", 1)
    progress.calls.clear()
    with pytest.raises(FormatError):
        write_gguf(tmp_path / "y.gguf", {}, [OutgoingTensor("a", (3,), "f32", [])], progress=progress)
    assert (progress.calls[0], progress.calls[-1], progress.calls.count("finish")) == ("start", "finish", 1)


# ---- what is refused ------------------------------------------------------------------------------------

REFUSED_METADATA: dict[str, tuple[dict[Any, Any], str]] = {
    "an int": ({"key": 7}, "does not tell its type.*np.uint32"),
    "a float": ({"key": 0.5}, "does not tell its type"),
    "None": ({"key": None}, "does not tell its type"),
    "bytes": ({"key": b"text"}, "does not tell its type"),
    "a list of numbers": ({"key": [1, 2]}, "does not tell its type"),
    "float16": ({"key": np.float16(1)}, "float16, which GGUF does not have"),
    "complex": ({"key": np.zeros(2, complex)}, "complex128, which GGUF does not have"),
    "a matrix": ({"key": np.zeros((2, 2))}, r"shape \[2, 2\]"),
    "a lone surrogate": ({"key": "\ud800"}, "lone surrogate"),
    "one in an array": ({"key": ["a", "\udc00"]}, "lone surrogate"),
    "an empty key": ({"": "x"}, "1 to 65535 bytes"),
    "a zero byte": ({"a\0b": "x"}, "no zero byte"),
    "a long key": ({"ä" * 32768: "x"}, "1 to 65535 bytes"),
    "an alignment of 24": ({"general.alignment": np.uint32(24)}, "power of two"),
    "an alignment of 0": ({"general.alignment": np.uint32(0)}, "power of two"),
    "a huge alignment": ({"general.alignment": np.uint32(2**22)}, "power of two"),
    "an alignment of another type": ({"general.alignment": np.uint64(32)}, "np.uint32"),
}


@pytest.mark.parametrize("case", REFUSED_METADATA)
def test_metadata_that_gguf_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    """By key, before a byte is written."""
    metadata, told = REFUSED_METADATA[case]
    with pytest.raises(FormatError, match=told):
        write_gguf(tmp_path / "x.gguf", metadata, [])
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "shape", "encoding", "told"),
    [
        ("", (1,), "f32", "1 to 63 bytes"),
        ("a\0", (1,), "f32", "no zero byte"),
        ("ä" * 32, (1,), "f32", "1 to 63 bytes"),
        ("a", (), "f32", "1 to 4 sizes"),
        ("a", (1,) * 5, "f32", "1 to 4 sizes"),
        ("a", (-1,), "f32", "1 to 4 sizes"),
        ("a", (0, 2**30, 2**30), "f32", "impossible"),
        ("a", (2, 33), "q4_0", "33 weights, not whole blocks of 32"),
        ("a", (1,), "q9_9", "unknown encoding 'q9_9'"),
    ],
)
def test_tensors_that_gguf_cannot_hold_are_refused(
    name: str, shape: tuple[int, ...], encoding: str, told: str
) -> None:
    """When they are described."""
    with pytest.raises(FormatError, match=told):
        OutgoingTensor(name, shape, encoding, [])


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name not in TENSOR_TYPES])
def test_encodings_that_gguf_does_not_have_are_refused(encoding: str) -> None:
    """Those of integer groups, when a tensor is described; with those that it has."""
    with pytest.raises(
        UnsupportedError, match=rf"'a' is stored as {encoding}.* no type; .* f32, f16, .*, mxfp4$"
    ):
        OutgoingTensor("a", (1, 128), encoding, [])


def test_a_tensor_name_occurs_once(tmp_path: Path) -> None:
    """The second of a name is refused."""
    with pytest.raises(FormatError, match="'weight' occurs twice"):
        write_gguf(tmp_path / "x.gguf", {}, [f32(), f32()])


@pytest.mark.parametrize(
    ("sizes", "told"), [([], "0 of its 12"), ([8], "8 of its 12"), ([8, 8], "more than its 12")]
)
def test_a_tensor_brings_its_bytes(tmp_path: Path, sizes: list[int], told: str) -> None:
    """Too few or too many are an error, and there is no file."""
    tensor = OutgoingTensor("weight", (3,), "f32", [bytes(size) for size in sizes])
    with pytest.raises(FormatError, match=f"'weight' brought {told} bytes"):
        write_gguf(tmp_path / "x.gguf", {}, [tensor])
    assert contents(tmp_path) == []


# ---- what cannot be written -----------------------------------------------------------------------------


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    """Without it the old file stays as it is; with it the new one takes its place."""
    path = tmp_path / "x.gguf"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        write_gguf(path, {}, [f32()])
    assert path.read_text() == "precious"
    write_gguf(path, {}, [f32()], overwrite=True)
    assert list(read_gguf(path).tensors) == ["weight"]
    assert contents(tmp_path) == ["x.gguf"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """What another process wrote under the name is kept."""
    path = tmp_path / "x.gguf"

    def chunks() -> Iterator[bytes]:
        path.write_text("precious")
        yield bytes(12)

    with pytest.raises(OutputError, match="exists already"):
        write_gguf(path, {}, [OutgoingTensor("weight", (3,), "f32", chunks())])
    assert path.read_text() == "precious"
    assert contents(tmp_path) == ["x.gguf"]


def test_only_files_are_replaced(tmp_path: Path) -> None:
    """Folders and pipes are not, not even on request; nor is a dangling link without one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name, told in {".": "is a folder", "pipe": "not a regular file"}.items():
        with pytest.raises(OutputError, match=told):
            write_gguf(tmp_path / name, {}, [f32()], overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        write_gguf(tmp_path / "link", {}, [f32()])
    assert contents(tmp_path) == ["link", "pipe"]


@pytest.mark.parametrize(
    ("name", "told"), [("no/such/x.gguf", "no folder"), ("a\0b", "written"), ("a" * 256, "too long")]
)
def test_a_name_that_cannot_be(tmp_path: Path, name: str, told: str) -> None:
    """A missing folder, a zero byte, a name too long for the disk: told, and nothing is made."""
    with pytest.raises(OutputError, match=told):
        write_gguf(tmp_path / name, {}, [f32()])
    assert contents(tmp_path) == []


def test_room_is_asked_for_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with too little room is told with what is needed and what is there; an old file stays."""
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a": "b"}, [f32()])
    before, size = path.read_bytes(), gguf_bytes({}, [f32(count=5000)])
    free = shutil_usage(free=size - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(OutputError, match=rf"takes {size:,} bytes.* {size - 1:,} free; free 1 more"):
        write_gguf(path, {}, [f32(count=5000)], overwrite=True)
    assert (path.read_bytes(), contents(tmp_path)) == (before, ["x.gguf"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil_usage(free=size))
    assert write_gguf(path, {}, [f32(count=5000)], overwrite=True) == size


def shutil_usage(*, free: int) -> Any:
    return type("Usage", (), {"free": free})()


@pytest.fixture
def little_room() -> Iterator[int]:
    """The system refuses files over 100,000 bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("little_room")
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path) -> None:
    """What the system refuses in the middle becomes an OutputError; an old file is as it was."""
    path = tmp_path / "x.gguf"
    write_gguf(path, {"old": True}, [f32()])
    before = path.read_bytes()
    for target in (path, tmp_path / "y.gguf"):
        with pytest.raises(OutputError, match=r"cannot be written: .*; nothing was left behind"):
            write_gguf(target, {}, [f32(), f32("large", 50_000)], overwrite=True)
    assert (path.read_bytes(), contents(tmp_path)) == (before, ["x.gguf"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
def test_what_breaks_off_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """An interrupt, or a tensor that cannot be read, passes through; an old file is as it was."""
    path = tmp_path / "x.gguf"
    path.write_text("precious")

    def chunks() -> Iterator[bytes]:
        yield bytes(8)
        assert len(contents(tmp_path)) == 2  # the hidden file is there
        raise error

    with pytest.raises(error):
        write_gguf(path, {}, [OutgoingTensor("weight", (3,), "f32", chunks())], overwrite=True)
    assert (path.read_text(), contents(tmp_path)) == ("precious", ["x.gguf"])
