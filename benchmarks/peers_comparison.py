"""The measurements on one file: who is asked what, and in which order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from peers_bandwidth import Bandwidth
from peers_figures import OTHERS, READING, Agreement, Results, Sample, common_beginning, divergence
from peers_files import Subject
from peers_interference import Interference
from peers_processes import Contestant, EngineFailedError, EngineProcess, rotated

BATCH = {"cpu": 512, "gpu": 2048}
"""Tokens per step at most, in every engine, by device."""

MEASURED = ("prefill", "prefill_long", "decode", "context", "far", "many", "crowd")

WATCHED_STEPS = 4
"""After a prompt, while the driver's memory is looked at."""

SIZES = {"prefill_long": "long_prompt", "far": "far_context", "crowd": "crowd"}
"""Figures that are measured where a size is not 0."""


class Comparison:
    """Compares contestants on a file; who fails is told, and the others go on.

    Args:
        subject: the file.
        contestants: who takes part; each has started once when the constructor is done, so that caches are
            warm, and what they compute has been compared.
        bandwidth: measured in every round; ``None`` where it is not known how.
        results: where samples go.
        figures: which of ``MEASURED``.
    """

    def __init__(
        self,
        subject: Subject,
        contestants: Sequence[Contestant],
        bandwidth: Bandwidth | None,
        results: Results,
        figures: tuple[str, ...] = MEASURED,
        device: str = "cpu",
    ) -> None:
        sizes = results.sizes
        self._subject, self._bandwidth, self._results = subject, bandwidth, results
        self._figures = [name for name in figures if name not in SIZES or getattr(sizes, SIZES[name])]
        self._sizes, self._turn, self._asked = sizes, 0, 0
        self._processes: list[EngineProcess] = []
        self._settings = {
            "path": str(subject.path),
            "threads": results.threads,
            "device": device,
            "batch": BATCH[device],
            "context": 1
            + max(
                sizes.prompt,
                sizes.long_prompt,
                sizes.short + sizes.steps,
                sizes.context + sizes.context_steps,
                sizes.far_context + sizes.far_steps,
            ),
            "requests": max(sizes.requests, sizes.crowd),
            "room": sizes.short + sizes.steps + 1,
            "first": self._prompt(sizes.short),
        }
        results.file_bytes[subject.name] = subject.path.stat().st_size
        results.step_bytes[subject.name] = (
            subject.step_bytes(sizes.short + sizes.steps / 2),
            subject.step_bytes(sizes.context + sizes.context_steps / 2),
        )
        self._contestants = self._check(contestants)

    def run(self, turn: int, rounds: int) -> None:
        """One round: a process for each, everything measured once, the processes ended."""
        self._turn = turn
        self._progress(f"round {turn + 1} of {rounds}")
        interference = Interference()
        if self._bandwidth is not None:
            self._note(READING, "bandwidth", self._bandwidth.measure() / 1e9)
        try:
            self._start()
            self._each(self._warm)
            for figure in ("prefill", "prefill_long", "decode", "context"):
                self._repeat(figure)
            self._each(lambda process: self._device_memory(process, "device_peak", self._sizes.context))
            if "far" in self._figures:
                self._repeat("far")
                self._each(
                    lambda process: self._device_memory(process, "device_peak_far", self._sizes.far_context)
                )
            self._each(lambda process: self._memory(process, "peak"))
            for figure in ("many", "crowd"):
                self._repeat(figure)
            if "many" in self._figures:
                self._each(lambda process: self._memory(process, "peak_many"))
        finally:
            for process in self._processes:
                process.close()
            self._processes.clear()
        if (busy := interference.share()) is not None:
            self._note(OTHERS, "busy", busy)

    def _check(self, contestants: Sequence[Contestant]) -> list[Contestant]:
        """Let everyone start once, and compare what they compute; gives those that could."""
        prompt = list(self._subject.prose[: self._sizes.checked])
        logits: dict[str, NDArray[np.float32]] = {}
        continued: dict[str, list[int]] = {}
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "logits.npy")
            for contestant in contestants:
                try:
                    process = EngineProcess(contestant, self._settings)
                    logits[contestant.name] = np.load(process.ask("logits", tokens=prompt, file=file))
                    continued[contestant.name] = process.ask(
                        "greedy", tokens=prompt, count=self._sizes.continued
                    )
                except EngineFailedError as error:
                    self._progress(f"{contestant.name} is left out: {error}")
                    continue
                process.close()
                self._results.about.setdefault(contestant.name, process.about)
                self._note(contestant.name, "first_start", process.first_token_s)
        present = [contestant for contestant in contestants if contestant.name in continued]
        reference = _reference(present)
        for name in continued if reference else ():
            if name != reference:
                agreement = Agreement(
                    self._subject.name,
                    name,
                    reference,
                    *divergence(logits[reference], logits[name]),
                    common_beginning(continued[reference], continued[name]),
                    self._sizes.continued,
                )
                self._results.agreements.append(agreement)
                self._progress(
                    f"{name}: KL divergence {agreement.divergence:.1e} from {reference}, "
                    f"{agreement.same_top:.0%} same top, {agreement.continued} of {agreement.out_of} alike"
                )
        return present

    def _start(self) -> None:
        """A process for each, one after the other: the others are idle while one starts."""
        present = [c for c in self._contestants if c.rounds is None or self._turn < c.rounds]
        for contestant in rotated(present, self._turn):
            try:
                process = EngineProcess(contestant, self._settings)
            except EngineFailedError as error:
                self._leave_out(contestant, error)
                continue
            self._processes.append(process)
            self._note(contestant.name, "first_token", process.first_token_s)
            self._note(contestant.name, "imports", process.baseline)
            if process.device_baseline is not None:
                self._note(contestant.name, "device_imports", process.device_baseline)

    def _each(self, action: Callable[[EngineProcess], None]) -> None:
        """Ask everyone in turn; another one begins each time."""
        self._asked += 1
        for process in rotated(self._processes, self._asked):
            try:
                action(process)
            except EngineFailedError as error:
                self._processes.remove(process)
                self._leave_out(process.contestant, error)

    def _repeat(self, figure: str) -> None:
        if figure not in self._figures:
            return
        sizes = self._sizes
        measure: Callable[[EngineProcess], None] = {
            "prefill": lambda process: self._prefill(process, figure, sizes.prompt),
            "prefill_long": lambda process: self._prefill(process, figure, sizes.long_prompt),
            "decode": lambda process: self._decode(process, figure, sizes.short, sizes.steps),
            "context": lambda process: self._decode(process, figure, sizes.context, sizes.context_steps),
            "far": lambda process: self._decode(process, figure, sizes.far_context, sizes.far_steps),
            "many": lambda process: self._decode_many(process, figure, sizes.requests),
            "crowd": lambda process: self._decode_many(process, figure, sizes.crowd),
        }[figure]
        if figure in ("far", "crowd"):  # shapes that nothing before has warmed
            context, requests = (sizes.far_context, 1) if figure == "far" else (sizes.short, sizes.crowd)
            prompts = [self._prompt(context, first=number) for number in range(requests)]
            self._each(lambda process: process.ask("decode", prompts=prompts, steps=WATCHED_STEPS))
        for _ in range(1 if figure in ("context", "far") else sizes.times):
            self._each(measure)

    def _warm(self, process: EngineProcess) -> None:
        process.ask("prefill", tokens=self._prompt(self._sizes.prompt))
        process.ask("decode", prompts=[self._prompt(self._sizes.short)], steps=2)
        if process.device_baseline is not None:
            process.ask("prefill", tokens=self._prompt(self._sizes.long_prompt or self._sizes.prompt))
            process.ask("decode", prompts=[self._prompt(self._sizes.context)], steps=WATCHED_STEPS)

    def _prefill(self, process: EngineProcess, figure: str, count: int) -> None:
        seconds = process.ask("prefill", tokens=self._prompt(count))
        self._rate(process, figure, count, seconds)

    def _decode(self, process: EngineProcess, figure: str, context: int, steps: int) -> None:
        seconds = process.ask("decode", prompts=[self._prompt(context)], steps=steps)
        self._rate(process, figure, steps, seconds)

    def _decode_many(self, process: EngineProcess, figure: str, requests: int) -> None:
        steps = self._sizes.steps
        prompts = [self._prompt(self._sizes.short, first=number) for number in range(requests)]
        seconds = process.ask("decode", prompts=prompts, steps=steps)
        self._rate(process, figure, steps * requests, seconds)

    def _device_memory(self, process: EngineProcess, figure: str, context: int) -> None:
        """The most that a request takes, once more and untimed: prompt and a few steps."""
        if process.device_baseline is None:
            return
        asked = {"what": "decode", "prompts": [self._prompt(context)], "steps": WATCHED_STEPS}
        self._note(process.contestant.name, figure, process.ask("device_peak", asked=asked))

    def _memory(self, process: EngineProcess, figure: str) -> None:
        held = process.ask("memory")
        self._note(process.contestant.name, figure, held["VmHWM"])
        self._note(process.contestant.name, f"{figure}_own", held["RssAnon"])
        self._note(process.contestant.name, f"{figure}_files", held["RssFile"])

    def _prompt(self, count: int, first: int = 0) -> list[int]:
        """Made-up tokens of the vocabulary."""
        start = min(1000, self._subject.vocabulary // 2)
        return [start + 7 * (first + i) % (self._subject.vocabulary - start) for i in range(count)]

    def _rate(self, process: EngineProcess, figure: str, tokens: int, seconds: list[float]) -> None:
        self._note(process.contestant.name, figure, tokens / sum(seconds), seconds)

    def _note(self, contestant: str, figure: str, value: float, seconds: Sequence[float] = ()) -> None:
        sample = Sample(self._subject.name, contestant, self._turn, figure, value, tuple(seconds))
        self._results.samples.append(sample)
        self._progress(f"{contestant}: {figure} {value:,.2f}")

    def _leave_out(self, contestant: Contestant, error: EngineFailedError) -> None:
        self._progress(f"{contestant.name} is left out from here on: {error}")
        self._contestants.remove(contestant)

    def _progress(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self._subject.name}: {text}", flush=True)


def _reference(contestants: Sequence[Contestant]) -> str:
    """With whom the others are compared; empty where there is nobody."""
    for engine in ("transformers", "llama.cpp"):
        for contestant in contestants:
            if contestant.engine == engine:
                return contestant.name
    return ""
