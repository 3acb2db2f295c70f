"""``refengine conform``: hold a backend against the specification."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refengine.cli.errors import FINDINGS
from refengine.cli.suite import require_suite
from refengine.cli.terminal import say, write_json
from refengine.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from refengine_conformance.conformance import Conformance
    from refengine_conformance.outcome import Profile
    from refengine_conformance.registry import Property


def _writable(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuse a file in a folder that isn't there now, not when everything has been computed."""
    if value and not Path(value).absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(value).parent}")
    return value


@click.command()
@click.option(
    "--backend", default="numpy", show_default=True, metavar="NAME", help="See `refengine backends`."
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="Precision: float32, float64, mixed8, mixed16; repeatable.  [default: all that the backend claims]",
)
@click.option(
    "--profile",
    default="quick",
    show_default=True,
    type=click.Choice(["quick", "thorough"]),
    help="25 or 400 examples per property.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="The same seed draws the same examples.",
)
@click.option(
    "--clause",
    "chosen",
    multiple=True,
    metavar="ID",
    help="Only this clause (ATT-3), or this chapter (ATT); repeatable.",
)
@click.option("--fallback", is_flag=True, help="Let golden ops stand in for what the backend lacks.")
@click.option(
    "--json", "json_file", callback=_writable, metavar="FILE", help="Write the report as JSON; - for stdout."
)
@click.option(
    "--html", "html_file", callback=_writable, metavar="FILE", help="Write the report as an HTML page."
)
@click.option("--self-test", is_flag=True, help="Look for the faults that are seeded in the suite instead.")
def conform(
    backend: str,
    policies: tuple[str, ...],
    profile: str,
    seed: int,
    chosen: tuple[str, ...],
    fallback: bool,
    json_file: str | None,
    html_file: str | None,
    self_test: bool,
) -> None:
    """Hold a backend against the specification.

    Prints what it finds and the levels reached: L1 values, L2 deterministic, L3 schedule-invariant, M memory.
    What the backend declares not to support is no finding, but levels that take it are not reached.

    Exits with 12 where a clause is broken, or with --self-test, where a seeded fault is not caught.

    \b
    Examples:
      refengine conform --backend numpy --html report.html
      refengine conform --backend mine --fallback --clause OPS-2
    """
    require_suite()
    from refengine_conformance.outcome import PROFILES

    if self_test:
        found = not _test_itself(PROFILES[profile], seed, chosen)
    else:
        run = _hold(backend, policies, PROFILES[profile], seed, chosen, fallback)
        _write(run, json_file, html_file)
        found = bool(run.findings)
        if not any(result.outcome.kind == "passed" for result in run.results) and not found:
            raise UnsupportedError(
                f"backend {backend!r} lacks something that every check takes: nothing was tested\n"
                "Let golden ops stand in for it: --fallback"
            )
    if found:
        raise click.exceptions.Exit(FINDINGS)


def _hold(
    backend: str,
    policies: tuple[str, ...],
    profile: Profile,
    seed: int,
    chosen: tuple[str, ...],
    fallback: bool,
) -> Conformance:
    from refengine_conformance.conform import claimed_policies, conform
    from refengine_conformance.registry import all_properties

    selected = tuple(p for p in all_properties() if _is_chosen(p.clause, chosen))
    _check_choice(chosen, selected)
    policies = policies or claimed_policies(backend, selected)
    with _Progress(sum(policy in p.policies for p in selected for policy in policies)) as progress:
        return conform(
            backend,
            selected,
            policies=policies,
            profile=profile,
            seed=seed,
            fallback=fallback,
            partial=bool(chosen),
            on_result=lambda result: progress.advance(result.property.id),
        )


def _test_itself(profile: Profile, seed: int, chosen: tuple[str, ...]) -> bool:
    """Print the kill table; returns whether every fault is caught under its clause."""
    from refengine_conformance.report import print_faults
    from refengine_conformance.self_test import faults, self_test

    selected = tuple(fault for fault in faults() if _is_chosen(fault.clause, chosen))
    verdicts = []
    with _Progress(len(selected)) as progress:
        for verdict in self_test(profile, selected, seed=seed):
            progress.advance(verdict.clause)
            verdicts.append(verdict)
    print_faults(verdicts, sys.stdout)
    return all(verdict.killed for verdict in verdicts)


def _write(run: Conformance, json_file: str | None, html_file: str | None) -> None:
    from refengine_conformance.report import print_report, report_html, report_json

    if json_file == "-":
        write_json(report_json(run))
    else:
        print_report(run, sys.stdout)
    if json_file and json_file != "-":
        text = json.dumps(report_json(run), ensure_ascii=False, allow_nan=False, indent=2)
        Path(json_file).write_text(f"{text}\n", encoding="utf-8")
    if html_file:
        Path(html_file).write_text(report_html(run), encoding="utf-8")
        say(f"The report is in {html_file}")


def _is_chosen(clause: str, chosen: tuple[str, ...]) -> bool:
    """Whether a clause, or its chapter, is among those chosen; all are where none is named."""
    return not chosen or clause in chosen or clause.partition("-")[0] in chosen


def _check_choice(chosen: tuple[str, ...], selected: tuple[Property, ...]) -> None:
    """Refuse names that choose nothing.

    Raises:
        RequestError: one does.
    """
    for name in chosen:
        if not any(_is_chosen(p.clause, (name,)) for p in selected):
            raise RequestError(f"no property is of clause {name!r}; `refengine spec coverage` lists them")


class _Progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: str) -> None:
        """One more, and which it was."""
        self._progress.update(self._task, advance=1, description=done)
