"""``refengine synth``: a model file of real size with random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import click

from refengine.cli.encodings import totals_by_encoding
from refengine.cli.figures import bytes_figure, count_figure
from refengine.cli.options import json_option
from refengine.cli.progress import TransferProgress
from refengine.cli.terminal import harmless, write_json


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--shape", "shape_name", required=True, metavar="NAME", help="Of the model: see above.")
@click.option(
    "--encoding",
    default="q4_0",
    show_default=True,
    metavar="NAME",
    help="Of its matrices: see above.",
)
@click.option("--uniform", is_flag=True, help="Give every matrix this encoding, the output as well.")
@click.option("--layers", type=int, metavar="N", help="Make N layers instead of the model's.")
@click.option("--context", type=int, metavar="N", help="Say that the model was made for N positions.")
@click.option("--vocabulary", type=int, metavar="N", help="Make N tokens instead of the model's.")
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="The same seed gives the same file."
)
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@json_option
def synth(
    file: Path,
    shape_name: str,
    encoding: str,
    uniform: bool,
    layers: int | None,
    context: int | None,
    vocabulary: int | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Write a GGUF file with the shape of a real model and random weights.

    It loads, runs and takes memory like the real one, and needs no download; what it says means nothing.
    Matrices have mean 0 and the standard deviation 1 / sqrt(row length), norms are 1, tokens are made up.
    As in the files of llama-quantize, some matrices get more bits than the encoding has, such as the output;
    --uniform leaves that out.

    \b
    Shapes:
      llama-2-7b  llama-2-13b  llama-3-8b  llama-1b  tinyllama-1.1b
      mistral-7b  smollm2-135m  qwen3-0.6b  gemma3-270m

    \b
    Encodings:
      f32  f16  bf16  q8_0  q6_k  q5_k  q5_0  q5_1  q4_k  q4_0  q4_1
      iq4_nl  iq4_xs  mxfp4  q3_k  q2_k

    \b
    Examples:
      refengine synth --shape llama-2-7b --encoding q4_0 llama-2-7b.gguf
      refengine synth --shape llama-2-7b --context 8192 long.gguf
      refengine synth --shape gemma3-270m --encoding q4_k --layers 6 --vocabulary 4096 small.gguf
    """
    from refengine.loader import read_gguf
    from refengine.loader.gguf_writer import write_gguf
    from refengine.synth import shape, synthesize

    chosen = shape(shape_name).resized(layers=layers, context_length=context, vocabulary_size=vocabulary)
    checkpoint = synthesize(chosen, encoding, seed=seed, uniform=uniform)
    started = perf_counter()
    n_bytes = write_gguf(
        file, checkpoint.metadata, checkpoint.tensors, overwrite=force, progress=TransferProgress()
    )
    seconds = perf_counter() - started
    if as_json:
        totals = totals_by_encoding(read_gguf(file).tensors.values())
        write_json(
            {
                "file": str(file),
                "shape": chosen.name,
                "encoding": encoding,
                "seed": seed,
                "bytes": n_bytes,
                "weights": checkpoint.size,
                "encodings": {name: asdict(total) for name, total in totals.items()},
                "seconds": seconds,
                "bytes_per_second": n_bytes / seconds,
            }
        )
    else:
        click.echo(
            f"{harmless(str(file))}: {bytes_figure(n_bytes)}, {count_figure(checkpoint.size)} weights, "
            f"{seconds:.1f} s ({bytes_figure(n_bytes / seconds)}/s)"
        )
