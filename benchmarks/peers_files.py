"""The files that engines are compared on: real ones, the same in other encodings, and synthetic ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from requantize import requantize

from refengine import loader
from refengine.models import build
from refengine.models.spec import ModelSpec
from refengine.tokenizer import build_tokenizer

PROSE = Path(__file__).with_name("prose.txt")


@dataclass(frozen=True)
class Subject:
    """A file, and what of it the results are computed from.

    Attributes:
        name: as asked for; of a path the file's, without its suffix.
        path: the file.
        vocabulary: number of tokens.
        weight_bytes: bytes of weights that a decode step reads: every tensor but an embedding that is not the
            output matrix too.
        kv_layers: for each layer the bytes of a position's float16 key and value, and the window or ``None``.
        prose: token ids of English text, for the comparison of logits.
    """

    name: str
    path: Path
    vocabulary: int
    weight_bytes: int
    kv_layers: tuple[tuple[int, int | None], ...]
    prose: tuple[int, ...]

    def step_bytes(self, context: float) -> float:
        """Bytes that a decode step of one request reads at so many positions: weights, keys and values."""
        kv = sum(
            nbytes * (context if window is None else min(context, window))
            for nbytes, window in self.kv_layers
        )
        return self.weight_bytes + kv


def subject(name: str, folder: Path) -> Subject:
    """A default file, made where it is not there yet, or any other name or path.

    Args:
        name: one of ``DEFAULTS``, a name in the catalogue, or a path.
        folder: where files are made.

    Raises:
        RefengineError: there is no such file, or it cannot be made or read.
        ImportError: what makes it is not installed.
    """
    path = made(name, folder) if name in MADE else loader.resolve(name)
    checkpoint = loader.read_gguf(path)
    spec = build(checkpoint).spec
    ids = build_tokenizer(checkpoint.metadata).encode(PROSE.read_text())
    label = path.stem if name.endswith(".gguf") else name
    return Subject(label, path, spec.vocabulary_size, weight_bytes(checkpoint), kv_layers(spec), tuple(ids))


def weight_bytes(checkpoint: loader.Checkpoint) -> int:
    """Bytes of weights that every step reads."""
    looked_up = {"token_embd.weight"} if "output.weight" in checkpoint.tensors else set()
    return sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name not in looked_up)


def kv_layers(spec: ModelSpec) -> tuple[tuple[int, int | None], ...]:
    """For each layer the bytes of a position in float16, and the window."""
    return tuple((2 * 2 * layer.kv_heads * layer.head_size, layer.window) for layer in spec.layers)


def made(name: str, folder: Path) -> Path:
    """The path of a file that is made here; made only once."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {path}", flush=True)
        MADE[name](path)
    return path


def _requantized(source: str, encoding: str, path: Path) -> None:
    requantize(loader.open(source), path, encoding)


def _synthetic(shape_name: str, encoding: str, path: Path, context: int | None = None) -> None:
    from refengine.loader.gguf_writer import write_gguf
    from refengine.synth import shape, synthesize

    checkpoint = synthesize(shape(shape_name).resized(context_length=context), encoding, uniform=True)
    write_gguf(path, checkpoint.metadata, checkpoint.tensors)


MADE: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "smollm2-q4_0": partial(_requantized, "smollm2", "q4_0"),
        "smollm2-q8_0": partial(_requantized, "smollm2", "q8_0"),
        "llama-1b-q4_0": partial(_synthetic, "llama-1b", "q4_0"),
        "llama-1b-q4_k": partial(_synthetic, "llama-1b", "q4_k"),
        "llama-2-7b-q4_0": partial(_synthetic, "llama-2-7b", "q4_0", context=8192),
    }
)
"""What makes each file that is nowhere to be had; in synthetic ones all matrices have the encoding."""

GPU_DEFAULTS = ("llama-2-7b-q4_0",)

DEFAULTS = ("smollm2", "gemma3-270m", *(name for name in MADE if name not in GPU_DEFAULTS))
"""On a CPU, where a model of 7 billion parameters takes long."""
