"""``refengine batch``: a file of requests, a file of answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from refengine.cli.batch_progress import BatchProgress
from refengine.cli.figures import amount
from refengine.cli.loading import EngineOptions
from refengine.cli.options import engine_options, json_option, memory_option, model_argument
from refengine.cli.sections import SectionedCommand
from refengine.cli.sizes import size
from refengine.cli.terminal import harmless, say, write_json
from refengine.config import EngineConfig
from refengine.errors import OutputError

if TYPE_CHECKING:
    from refengine.batch import InputFile, OutputFile, Resumption, Row, Tally

WINDOW = 2
"""Rows that are ready for each place in the engine."""

existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
output_file = click.Path(dir_okay=False, path_type=Path)


@click.command(cls=SectionedCommand)
@model_argument
@click.option("-i", "--input", "source", type=existing_file, required=True, metavar="FILE", help="Requests.")
@click.option("-o", "--output", type=output_file, required=True, metavar="FILE", help="Answers.")
@click.option(
    "--errors", type=output_file, metavar="FILE", help="Write errors there.  [default: to the output]"
)
@click.option(
    "--model-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Let rows ask for NAME and get MODEL; repeatable.",
)
@click.option(
    "--retry-failed",
    "retry",
    is_flag=True,
    help="Answer rows anew that ended with an error; mended ones too.",
)
@click.option("--force", is_flag=True, help="Go on with an output of other requests, or of another model.")
@engine_options
@memory_option(
    "--max-sequences",
    default=EngineConfig.max_sequences,
    show_default=True,
    metavar="N",
    help="Compute N answers at once at most.",
)
@memory_option(
    "--no-prefix-cache",
    "prefix_cache",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Compute beginnings that rows share anew for each.",
)
@memory_option(
    "--swap",
    type=size,
    default="0",
    metavar="SIZE",
    help="Keep so much KV cache of pre-empted rows, where that is cheaper than to compute it again."
    "  [default: none]",
)
@click.option(
    "--scheduling",
    default=EngineConfig.scheduling,
    show_default=True,
    metavar="NAME",
    help="Which rows go first: fcfs, sjf, priority, fair. Parameters follow a colon: sjf:ageing=8.",
)
@json_option
def batch(
    model: str,
    source: Path,
    output: Path,
    errors: Path | None,
    names: tuple[str, ...],
    retry: bool,
    force: bool,
    engine: EngineOptions,
    max_sequences: int,
    prefix_cache: bool,
    swap: int,
    scheduling: str,
    as_json: bool,
) -> None:
    """Answer a file of requests, many at once.

    The files are in the format of OpenAI's Batch API. A line of the input is a request to
    /v1/chat/completions or /v1/completions:

    \b
      {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
       "body": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}}

    A line of the output is its answer or its error, under its custom_id; they come in the order in which they
    are complete. What is not supported is an error, and nothing is passed over.

    Stop it as you like, even with SIGKILL: the same command goes on where it was, and no row is lost or there
    twice. With --journal, each run wants a journal of its own; `refengine replay JOURNAL --row ID` finds
    a row in it. A row's answer depends on the row alone: without a seed it gets one of its own. Unlike
    elsewhere in refengine, the temperature is 1 where a row names none, as OpenAI has it.

    \b
    Examples:
      refengine batch smollm2 -i in.jsonl -o out.jsonl
      refengine batch smollm2 -i in.jsonl -o out.jsonl --errors errors.jsonl --model-name gpt-4o-mini
      refengine batch smollm2 -i in.jsonl -o out.jsonl --retry-failed
    """
    from refengine.batch import InputFile, OutputFile, Tally, resume
    from refengine.scheduler import scheduling_policy

    scheduling_policy(scheduling)  # a mistyped name is told of before anything is loaded
    paths = [source, output, *([errors] if errors else [])]
    files_named = [*paths, *([engine.journal.path] if engine.journal else [])]
    if len({path.resolve() for path in files_named}) < len(files_named):
        raise click.UsageError(
            "the input, the output, the file of errors and the journal must be different files"
        )
    requests = InputFile(source)
    tally = Tally()
    with ExitStack() as files:
        outputs = [files.enter_context(OutputFile(path)) for path in paths[1:]]
        found = resume(requests, outputs, force=force, retry=retry)
        engine = engine.adjusted(
            max_sequences=max_sequences, prefix_cache=prefix_cache, swap=swap, scheduling=scheduling
        )
        try:
            times = _answer(model, engine, requests, outputs, found, {model, *names}, tally, force=force)
        except (KeyboardInterrupt, OutputError) as stopped:
            if isinstance(stopped, KeyboardInterrupt):
                say()  # the terminal has put ^C on the progress bar's line
            written, total = found.count + tally.rows, amount(len(requests), "row")
            other = " with another --journal" if engine.journal else ""
            say(f"Stopped: {written:,} of {total} answered. The same command{other} goes on from there.")
            raise
    summary = {
        **{name: str(path) for name, path in zip(("input", "output", "errors"), paths, strict=False)},
        "rows": len(requests),
        "answered_before": found.count - found.failed,
        "failed_before": found.failed,
        "tried_again": found.again,
        "foreign": found.foreign,
        **{name: count for name, count in asdict(tally).items() if name != "sampled"},
        **times,
    }
    if as_json:
        write_json(summary)
    else:
        click.echo(harmless(_in_words(summary)))


def _answer(
    model: str,
    engine: EngineOptions,
    requests: InputFile,
    outputs: Sequence[OutputFile],
    found: Resumption,
    names: Collection[str],
    tally: Tally,
    *,
    force: bool,
) -> dict[str, float | None]:
    """Answer what has no answer yet; tells the times that took."""
    from refengine.batch import BatchRun, ReadAhead, Teller, fingerprint, forget_errors, pending, prepare

    if found.count == len(requests):
        return {"load_s": None, "seconds": None, "tokens_per_second": None}
    llm, load_s = engine.load(model)
    teller = Teller(llm.tokenizer, fingerprint(llm))
    if not force:
        found.check_model(teller.fingerprint)
    if found.again:
        forget_errors(requests, outputs)
    rows = prepare(pending(requests, found), llm, names)
    window = WINDOW * engine.config.max_sequences

    def write(row: Mapping[str, Any], failed: bool) -> None:
        outputs[-1 if failed else 0].append(row)

    def note(number: int, row: Row, place: int) -> None:
        if engine.journal is not None and engine.journal.journal is not None and row.custom_id is not None:
            engine.journal.journal.row(number, row.custom_id, place)

    started = perf_counter()
    with ReadAhead(rows, window) as work, BatchProgress(len(requests), found.count, found.failed) as bar:
        BatchRun(llm.engine, work, teller, write, tally, note=note).run(bar.show)
    seconds = perf_counter() - started
    return {"load_s": load_s, "seconds": seconds, "tokens_per_second": tally.generated_tokens / seconds}


def _in_words(summary: Mapping[str, Any]) -> str:
    before = summary["answered_before"] + summary["failed_before"]
    now = summary["answered"] + summary["failed"]
    failed = summary["failed_before"] + summary["failed"]
    parts = [f"{summary['output']}: {amount(before + now, 'row')}"]
    if failed:
        where = f" in {summary['errors']}" if "errors" in summary else ""
        parts.append(f"{failed:,} of them errors{where}")
    if before:
        parts.append(f"{before:,} from before")
    if summary["tried_again"]:
        parts.append(f"{amount(summary['tried_again'], 'error')} tried again")
    if summary["foreign"]:
        parts.append(f"and {summary['foreign']:,} that answer other requests")
    text = ", ".join(parts)
    if summary["seconds"] is None:
        return f"{text}; nothing was left to do"
    tokens, rate = amount(summary["generated_tokens"], "token"), summary["tokens_per_second"]
    return f"{text}; {tokens} in {summary['seconds']:.1f} s ({rate:.1f} tok/s)"
