"""Synthetic checkpoints have the shape of the real ones, and weights that a model can run with."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine import load
from refengine.errors import FormatError, RequestError, UnsupportedError
from refengine.loader import read_gguf
from refengine.loader.gguf_writer import gguf_bytes, write_gguf
from refengine.loader.metadata import Metadata, StringArray
from refengine.models import build
from refengine.quantizer import ENCODINGS
from refengine.synth import SHAPES, Shape, shape, synthesize
from refengine.synth.blocks import RandomWeights
from refengine.synth.mixture import FILE_TYPES
from refengine.synth.vocabulary import VOCABULARIES, tokenizer_metadata
from refengine.tokenizer import Tokenizer, build_tokenizer

TINY = {
    "llama": replace(SHAPES["llama-2-7b"], layers=2, hidden_size=256, ffn_size=512, heads=4, kv_heads=2,
                     head_size=64, vocabulary_size=500, context_length=64),
    "llama-3": replace(SHAPES["llama-3-8b"], layers=2, hidden_size=64, ffn_size=96, heads=4, kv_heads=1,
                       head_size=16, vocabulary_size=500, context_length=64),
    "qwen3": replace(SHAPES["qwen3-0.6b"], layers=2, hidden_size=64, ffn_size=96, heads=4, kv_heads=2,
                     head_size=32, vocabulary_size=500, context_length=64),
    "gemma3": replace(SHAPES["gemma3-270m"], layers=7, hidden_size=96, ffn_size=256, heads=2, kv_heads=1,
                      head_size=32, vocabulary_size=500, context_length=64, window=5),
}  # fmt: skip


def written(folder: Path, shape: Shape, encoding: str, **options: int) -> Path:
    path = folder / f"{shape.name}-{encoding}.gguf"
    checkpoint = synthesize(shape, encoding, **options)
    write_gguf(path, checkpoint.metadata, checkpoint.tensors, overwrite=True)
    return path


# ---- shapes ---------------------------------------------------------------------------------------------

PUBLISHED_WEIGHTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "gemma3-270m": 268_098_176,
}
"""What Hugging Face counts in the models' safetensors files (Qwen's less its second copy of the embedding)."""


@pytest.mark.parametrize("name", PUBLISHED_WEIGHTS)
def test_a_shape_has_as_many_weights_as_its_model(name: str) -> None:
    """To the last one."""
    assert synthesize(SHAPES[name], "q4_0").size == PUBLISHED_WEIGHTS[name]


def test_the_shape_without_a_model_has_its_weights() -> None:
    """All shapes are counted; the 1.1 billion of ``llama-1b`` in Q4_0 throughout are 4.5 bits each."""
    assert {*PUBLISHED_WEIGHTS, "llama-1b"} == set(SHAPES)
    checkpoint = synthesize(SHAPES["llama-1b"], "q4_0", uniform=True)
    assert checkpoint.size == 2 * 32000 * 2048 + 16 * (2048 * (2048 + 512 + 512 + 2048 + 3 * 8192 + 2)) + 2048
    matrices = sum(tensor.size for tensor in checkpoint.tensors if len(tensor.shape) == 2)
    assert (
        sum(tensor.nbytes for tensor in checkpoint.tensors if tensor.encoding == "q4_0") * 32 == matrices * 18
    )


PUBLISHED_BYTES = {
    "q3_k": 3_298_004_672,
    "q4_0": 3_825_807_040,
    "q4_k": 4_081_004_224,
    "q5_0": 4_651_691_712,
    "q5_k": 4_783_156_928,
    "q6_k": 5_529_194_176,
    "q8_0": 7_161_089_728,
}
"""Sizes of Llama 2 7B's files as published (TheBloke/Llama-2-7B-GGUF: Q3_K_M, Q4_0, Q4_K_M …)."""


def test_files_are_as_large_as_the_real_ones() -> None:
    """Their tensors take the same bytes in every mixture: only the vocabulary differs, by the same in all."""
    differences = set()
    for encoding, published in PUBLISHED_BYTES.items():
        checkpoint = synthesize(SHAPES["llama-2-7b"], encoding)
        differences.add(gguf_bytes(checkpoint.metadata, checkpoint.tensors) - published)
    assert len(differences) == 1
    assert abs(differences.pop()) < 100_000


def assert_like_the_real_one(ours: Path, real: Path, *, encodings: bool) -> None:
    synthetic, genuine = read_gguf(ours), read_gguf(real)
    assert {n: t.shape for n, t in synthetic.tensors.items()} == {
        n: t.shape for n, t in genuine.tensors.items()
    }
    if encodings:
        assert {n: t.encoding for n, t in synthetic.tensors.items()} == {
            n: t.encoding for n, t in genuine.tensors.items()
        }
    architecture = genuine.metadata.string("general.architecture")
    hyper = [key for key in genuine.metadata if key.startswith(f"{architecture}.")]
    flags = ["general.architecture", "general.quantization_version", "tokenizer.ggml.model",
             "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"]  # fmt: skip
    for key in [*hyper, *flags]:
        assert synthetic.metadata[key] == genuine.metadata[key], key
    assert build(synthetic).spec == build(genuine).spec


def test_smollm2_is_like_the_real_one(tmp_path: Path, smollm2_path: Path) -> None:
    """Tensors, their encodings and every hyper-parameter are those of the published Q4_1 file."""
    ours = written(tmp_path, SHAPES["smollm2-135m"], "q4_1")
    assert_like_the_real_one(ours, smollm2_path, encodings=True)
    assert read_gguf(ours).metadata["general.file_type"] == 3


def test_gemma3_is_like_the_real_one(tmp_path: Path, gemma3_path: Path) -> None:
    """The published file is Q4_K_M, whose rows of 640 need other encodings: the same here, tensor by tensor."""
    ours = written(tmp_path, SHAPES["gemma3-270m"], "q4_k")
    assert_like_the_real_one(ours, gemma3_path, encodings=True)
    assert read_gguf(ours).metadata["general.file_type"] == 15


def test_an_unknown_shape_is_told_near_ones() -> None:
    """And all that there are."""
    with pytest.raises(RequestError, match=r"'llama2-7b'; did you mean llama-2-7b.*gemma3-270m"):
        shape("llama2-7b")
    assert shape("llama-2-7b") is SHAPES["llama-2-7b"]


@pytest.mark.parametrize("what", ["layers", "context_length", "vocabulary_size"])
def test_sizes_can_be_others(what: str) -> None:
    """One is changed and the rest stays; none below 1, and none beyond reason."""
    whole = SHAPES["llama-2-7b"]
    assert whole.resized(**{what: 400}) == replace(whole, **{what: 400})
    for size in (0, -1, 2**40):
        with pytest.raises(RequestError, match=f"must be between 1 and .*, but is {size:,}"):
            whole.resized(**{what: size})


# ---- weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [768, 4096, 13824])
@pytest.mark.parametrize("encoding", FILE_TYPES)
def test_weights_have_the_stated_deviation(encoding: str, columns: int) -> None:
    """As gguf-py decodes them: finite, mean 0, the deviation asked for, and no two rows equal.

    A mean of squares over the n blocks of a pool, whose squared scales have a relative deviation below 1, is
    off by less than 5 / sqrt(n) but once in a million times, and its root by half of that; so is the mean.
    """
    stored, deviation = ENCODINGS[encoding], 1 / math.sqrt(columns)
    source = RandomWeights(encoding, deviation, seed=0)
    rows = 2_000_000 // columns
    data = np.concatenate(list(source.chunks(rows * stored.row_bytes(columns), source.place("a", 0))))
    decoded = gguf.quants.dequantize(data.reshape(rows, -1), GGMLQuantizationType[encoding.upper()])
    weights = decoded.astype(np.float64)
    assert weights.shape == (rows, columns)
    assert np.isfinite(weights).all()
    tolerance = 5 / math.sqrt(2**20 // max(stored.block_bytes, 32))
    assert weights.std() == pytest.approx(deviation, rel=tolerance / 2)
    assert abs(weights.mean()) < deviation * tolerance
    assert np.abs(weights).max() < 6 * deviation
    assert len(np.unique(data.reshape(rows, -1), axis=0)) == rows


def test_rows_are_independent() -> None:
    """Rows correlate no more than random ones; those at the pools' lengths share signs of scales at most.

    The mean product of 4,096 independent pairs has a deviation of 1/64, and exceeds 7 of these once in 10^11
    times. Integers of Q4_0 have the mean -1/2 and the mean square 21.5, which a shared sign shows.
    """
    source, length = RandomWeights("q4_0", 1.0, seed=0), 128 * 18
    pool = 2**20 // 18

    def largest(data: np.ndarray) -> float:
        weights = gguf.quants.dequantize(data, GGMLQuantizationType.Q4_0)
        return float(np.abs(np.corrcoef(weights) - np.eye(len(weights))).max())

    data = np.concatenate(list(source.chunks(2000 * length, start=12345)))
    assert largest(data.reshape(2000, -1)) < 7 / 64
    for distance in (pool, pool - 1):
        starts = [5 + distance * i for i in range(200)]
        data = np.stack([np.concatenate(list(source.chunks(length, start))) for start in starts])
        assert largest(data) < 7 / 64 + 0.25 / 21.5


def test_q8_0_has_no_integer_that_no_quantizer_writes() -> None:
    """-128 has no counterpart above zero, and kernels that negate cannot hold it."""
    source = RandomWeights("q8_0", 0.02, seed=0)
    blocks = np.concatenate(list(source.chunks(34 * 100_000, 0))).reshape(-1, 34)
    integers = blocks[:, 2:].view(np.int8)
    assert (integers.min(), integers.max()) == (-64, 63)


@pytest.mark.parametrize("encoding", FILE_TYPES)
def test_pieces_join(encoding: str) -> None:
    """Where a tensor begins in a stream is where the stream goes on, across the ends of both pools."""
    source, block = RandomWeights(encoding, 0.02, seed=3), ENCODINGS[encoding].block_bytes
    whole = np.concatenate(list(source.chunks(block * 200_000, start=7)))
    assert whole.size == block * 200_000
    for start in (1, 61_679, 61_680, 123_456):
        part = np.concatenate(list(source.chunks(block * 50_000, start=7 + start)))
        assert np.array_equal(part, whole[block * start :][: block * 50_000])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_seed_is_a_file(tmp_path: Path) -> None:
    """The same seed gives the same bytes, here and everywhere; another seed others, all of another."""
    first = digest(written(tmp_path, TINY["llama"], "q4_k"))
    assert first == "9ab3f40bdf3ced574cea836f1611dde1822abcc5d44434e4ddb407f90f605051"
    assert digest(written(tmp_path, TINY["llama"], "q4_k", seed=0)) == first
    others = {digest(written(tmp_path, TINY["llama"], "q4_k", seed=seed)) for seed in (1, 2, 2**64 - 1)}
    assert len(others | {first}) == 4


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed: int) -> None:
    """Others are refused."""
    with pytest.raises(RequestError, match="the seed must be between 0 and"):
        synthesize(TINY["llama"], "q4_0", seed=seed)


def test_tensors_differ_and_norms_are_one(tmp_path: Path) -> None:
    """No two matrices begin alike; every vector is ones in f32."""
    tensors = read_gguf(written(tmp_path, TINY["gemma3"], "q8_0")).tensors.values()
    assert len({tensor.data.tobytes()[:68] for tensor in tensors if len(tensor.shape) == 2}) == 1 + 7 * 7
    norms = [tensor for tensor in tensors if len(tensor.shape) == 1]
    assert {tensor.encoding for tensor in norms} == {"f32"}
    assert all((tensor.decode() == 1).all() for tensor in norms)
    assert len(norms) == 1 + 7 * 6


# ---- mixtures -------------------------------------------------------------------------------------------


def test_files_have_every_encoding_of_gguf() -> None:
    """All that is decoded, but for what GGUF has no type for: that is refused, with what can be chosen."""
    assert set(FILE_TYPES) == {name for name in ENCODINGS if name.upper() in GGMLQuantizationType.__members__}
    for encoding in ENCODINGS.keys() - FILE_TYPES.keys():
        with pytest.raises(UnsupportedError, match=f"no type for {encoding}; choose one of f32, .*mxfp4"):
            synthesize(TINY["llama"], encoding)
    with pytest.raises(UnsupportedError, match=r"'int4_g12' \(there are"):
        synthesize(TINY["llama"], "int4_g12")


@pytest.mark.parametrize("encoding", FILE_TYPES)
def test_every_encoding_makes_a_file(tmp_path: Path, encoding: str) -> None:
    """With the encoding in it, or throughout where that is asked for, read alike by gguf-py."""
    for uniform in (False, True):
        path = written(tmp_path, TINY["llama"], encoding, uniform=uniform)
        tensors = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
        matrices = {name: kind for name, kind in tensors.items() if "norm" not in name}
        assert matrices["blk.0.attn_q.weight"] == encoding
        if uniform or encoding in ("f32", "f16", "bf16", "q8_0"):
            assert set(matrices.values()) == {encoding}
        else:
            assert matrices["output.weight"] == ("q8_0" if encoding == "mxfp4" else "q6_k")
        assert gguf.GGUFReader(path).fields["general.file_type"].contents() == (
            gguf.LlamaFileType[
                {"f32": "ALL_F32", "q3_k": "MOSTLY_Q3_K_M", "q4_k": "MOSTLY_Q4_K_M", "q5_k": "MOSTLY_Q5_K_M",
                 "mxfp4": "MOSTLY_MXFP4_MOE"}.get(encoding, f"MOSTLY_{encoding.upper()}")
            ]
        )  # fmt: skip


@pytest.mark.parametrize("encoding", ["q4_0", "iq4_nl", "mxfp4", "q8_0", "q6_k"])
def test_rows_that_are_not_whole_blocks_are_refused(encoding: str) -> None:
    """With the weight and what can hold it, which then does."""
    narrow = replace(TINY["llama"], hidden_size=40, head_size=10)
    with pytest.raises(UnsupportedError, match=r"rows of 40 weights, not whole blocks of 32.*f16"):
        synthesize(narrow, encoding)
    assert synthesize(narrow, "f16").size > 0


def test_an_unknown_encoding_is_told_near_ones() -> None:
    """As everywhere."""
    with pytest.raises(UnsupportedError, match="did you mean q4_0"):
        synthesize(TINY["llama"], "Q4_0")


def test_a_shape_that_contradicts_itself_is_refused() -> None:
    """Seven query heads do not share two heads of keys and values."""
    with pytest.raises(FormatError, match="does not divide"):
        synthesize(replace(TINY["llama"], heads=7), "f16")


# ---- vocabularies ---------------------------------------------------------------------------------------


def tokenizer(name: str, size: int) -> Tokenizer:
    def stored(value: object) -> object:
        if isinstance(value, list):
            data = [text.encode() for text in value]
            lengths = np.cumsum([0, *(8 + len(text) for text in data)])
            joined = b"".join(len(text).to_bytes(8, "little") + text for text in data)
            return StringArray(joined, lengths, name="strings")
        return value.item() if isinstance(value, np.generic) else value

    return build_tokenizer(Metadata({key: stored(v) for key, v in tokenizer_metadata(name, size).items()}))  # type: ignore[misc]


@pytest.mark.parametrize("size", [400, 32000])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_text_has_tokens(name: str, size: int) -> None:
    """Any text becomes tokens and comes back, whatever the vocabulary's size."""
    made = tokenizer(name, size)
    assert made.vocabulary_size == size

    @settings(deadline=None, max_examples=50)
    @given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁")))
    def comes_back(text: str) -> None:
        ids = made.encode(text)
        assert all(0 <= id < size for id in ids)
        assert made.decode(ids, skip_special=True) == text

    comes_back()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_text_takes_as_many_tokens_as_in_real_vocabularies(name: str) -> None:
    """English words become tokens of two to five letters."""
    text = "The quick brown fox jumps over the lazy dog and thinks about memory. " * 5
    assert 2 < len(text) / len(tokenizer(name, 32000).encode(text)) < 5


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_covers_every_byte(name: str) -> None:
    """One too small for that is refused with the least size, which then does."""
    with pytest.raises(RequestError, match=r"the least is \d+") as caught:
        tokenizer_metadata(name, 100)
    least = int(str(caught.value).rpartition(" ")[2])
    assert tokenizer(name, least).vocabulary_size == least
    with pytest.raises(RequestError):
        tokenizer_metadata(name, least - 1)


# ---- whole models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "encoding"),
    [*(("llama", encoding) for encoding in FILE_TYPES), *((f, "q8_0") for f in TINY if f != "llama")],
)
def test_a_model_runs(tmp_path: Path, family: str, encoding: str) -> None:
    """Logits are finite and about 1 in size: neither all alike nor saturated; and there is an answer."""
    llm = load(str(written(tmp_path, TINY[family], encoding)))
    logits = llm.logits("any text will do: 1, 2, 3")
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 2
    assert len(llm.generate("any text", max_tokens=4).tokens) in range(1, 5)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    """Its name and description tell that weights are random, and of which seed."""
    metadata = read_gguf(written(tmp_path, TINY["qwen3"], "q4_0", seed=11)).metadata
    assert metadata.string("general.name") == "Random weights in the shape of Qwen3 0.6B"
    assert "random" in metadata.string("general.description")
    assert (metadata["refengine.synth.seed"], metadata["refengine.synth.shape"]) == (11, "qwen3-0.6b")
