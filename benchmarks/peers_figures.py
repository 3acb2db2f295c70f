"""What was measured, and what follows from it: medians, ratios and their spread, agreement of logits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

READING = "reading memory"
"""The contestant of the figure ``bandwidth``."""

OTHERS = "everything else"
"""The contestant of the figure ``busy``: the share of the cores' time in a round that others took."""

NET = MappingProxyType(
    {
        "net": ("peak", "imports"),
        "device_net": ("device_peak", "device_imports"),
        "device_net_far": ("device_peak_far", "device_imports"),
    }
)
"""Memory without what was there before the file was opened: what is taken from what."""

GAINS = MappingProxyType({"gain": "many", "crowd_gain": "crowd"})
"""Several requests beside one: by the figure of the several."""

QUIET = 0.05
"""Up to this share a machine is quiet. On a busy one, engines whose threads spin until all have come (OpenMP
does so, in llama.cpp and PyTorch) lose many times what was taken, and comparisons mean nothing."""


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        prompt: tokens of the prefill.
        short: tokens of a short prompt, at the start and before the decoding of one request or several.
        steps: decode steps after it.
        context: tokens of the prompt before decoding at a long context, and ``context_steps`` after it.
        requests: at once.
        long_prompt: tokens of another prefill; here and below 0 for none.
        far_context: tokens before decoding at a context that is longer still, and ``far_steps`` after it.
        crowd: many more requests at once.
        times: samples of prefill, decode and requests at once in every round.
        checked: prompt tokens whose logits are compared, and ``continued`` tokens of the continuation.
    """

    prompt: int = 512
    short: int = 16
    steps: int = 64
    context: int = 2048
    context_steps: int = 32
    requests: int = 8
    times: int = 2
    checked: int = 64
    continued: int = 16
    long_prompt: int = 0
    far_context: int = 0
    far_steps: int = 0
    crowd: int = 0


QUICK = Sizes(prompt=64, short=8, steps=4, context=128, context_steps=4, times=1, checked=16, continued=8)
"""To see that everything runs; its figures mean nothing."""

GPU = replace(Sizes(), context_steps=64, long_prompt=2048, far_context=7936, far_steps=64, crowd=64)
"""What a GPU is asked beside what a CPU is."""

GPU_QUICK = replace(QUICK, long_prompt=128, far_context=256, far_steps=4, crowd=16)


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        file: name of the file.
        contestant: name of the engine with its settings.
        round: counted from 0.
        figure: a key of ``peers_table.LABELS``, ``bandwidth``, or one that only the JSON file has.
        value: tokens per second, 10^6 bytes, seconds, or 10^9 bytes per second.
        seconds: of every timed call that it was formed of.
    """

    file: str
    contestant: str
    round: int
    figure: str
    value: float
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """How far an engine computes what another does.

    Attributes:
        reference: the other one.
        divergence: mean Kullback–Leibler divergence from it after each token of a prompt, in nats.
        same_top: share of the tokens after which the likeliest is the same.
        continued: tokens of the greedy continuation that are the same, from the first on, of ``out_of``.
    """

    file: str
    contestant: str
    reference: str
    divergence: float
    same_top: float
    continued: int
    out_of: int


@dataclass(frozen=True)
class Ratio:
    """Median, least and most over the rounds."""

    median: float
    least: float
    most: float


@dataclass
class Results:
    """Everything that one run found.

    Attributes:
        sizes: what was computed.
        threads: of each engine.
        machine: what it ran on, by name.
        engines: contestant -> the engine that it is (``refengine``, ``llama.cpp``, ``transformers``).
        about: contestant -> version and settings.
        step_bytes: file -> bytes that a decode step reads, at a short context and at the long one.
        file_bytes: file -> its size.
        samples, agreements: in the order of measurement.
    """

    sizes: Sizes = field(default_factory=Sizes)
    threads: int = 1
    machine: dict[str, str] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    step_bytes: dict[str, tuple[float, float]] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Files of which there are samples, in order."""
        return list(
            dict.fromkeys(sample.file for sample in self.samples if sample.contestant in self.engines)
        )

    def contestants(self, file: str) -> list[str]:
        """Those that there are samples of, in the order of ``engines``."""
        found = {sample.contestant for sample in self.samples if sample.file == file}
        return [name for name in self.engines if name in found]

    def by_round(self, file: str, contestant: str, figure: str) -> dict[int, float]:
        """Round -> median of its samples. ``share``s and ``net`` memory are formed within a round."""
        if figure in ("share", "context_share"):
            rates = self.by_round(file, contestant, "decode" if figure == "share" else "context")
            read = self.by_round(file, READING, "bandwidth")
            nbytes = self.step_bytes[file][figure == "context_share"]
            return {r: rate * nbytes / 1e9 / read[r] for r, rate in rates.items() if r in read}
        if figure in NET:
            peaks, before = (self.by_round(file, contestant, name) for name in NET[figure])
            return {r: peak - before[r] for r, peak in peaks.items() if r in before}
        if figure in GAINS:
            one = self.by_round(file, contestant, "decode")
            many = self.by_round(file, contestant, GAINS[figure])
            return {r: rate / one[r] for r, rate in many.items() if r in one}
        rounds: dict[int, list[float]] = {}
        for sample in self.samples:
            if (sample.file, sample.contestant, sample.figure) == (file, contestant, figure):
                rounds.setdefault(sample.round, []).append(sample.value)
        return {r: statistics.median(values) for r, values in rounds.items()}

    def median(self, file: str, contestant: str, figure: str) -> float | None:
        """Median over the rounds; ``None`` where nothing was measured."""
        values = self.by_round(file, contestant, figure).values()
        return statistics.median(values) if values else None

    def ratio(self, file: str, contestant: str, other: str, figure: str) -> Ratio | None:
        """``contestant`` ÷ ``other``, formed in every round that both took part in."""
        ours, theirs = (self.by_round(file, name, figure) for name in (contestant, other))
        quotients = [value / theirs[r] for r, value in ours.items() if theirs.get(r)]
        if not quotients:
            return None
        return Ratio(statistics.median(quotients), min(quotients), max(quotients))

    def best(self, file: str, engine: str, figure: str, *, less: bool) -> str | None:
        """The contestant of an engine with the best median; ``None`` where none was measured."""
        medians = {
            name: value
            for name in self.contestants(file)
            if self.engines[name] == engine and (value := self.median(file, name, figure)) is not None
        }
        if not medians:
            return None
        return (min if less else max)(medians, key=medians.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """As written to a file."""
        return asdict(self)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> Results:
        """As read from one."""
        lists = {
            "sizes": Sizes(**stored["sizes"]),
            "step_bytes": {file: (short, long) for file, (short, long) in stored["step_bytes"].items()},
            "samples": [
                Sample(**(sample | {"seconds": tuple(sample["seconds"])})) for sample in stored["samples"]
            ],
            "agreements": [Agreement(**agreement) for agreement in stored["agreements"]],
        }
        return Results(**(stored | lists))


def divergence(expected: NDArray[np.floating], found: NDArray[np.floating]) -> tuple[float, float]:
    """Mean Kullback–Leibler divergence of ``found`` from ``expected`` in nats, and the share of equal maxima.

    Args:
        expected, found: logits ``[tokens, vocabulary]``; compared row by row in float64.
    """
    divergences = [
        _divergence(e.astype(np.float64), f.astype(np.float64)) for e, f in zip(expected, found, strict=True)
    ]
    return float(np.mean(divergences)), float(np.mean(expected.argmax(-1) == found.argmax(-1)))


def _divergence(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    p, q = _log_softmax(expected), _log_softmax(found)
    return float(np.sum(np.exp(p) * (p - q)))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    below: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return below


def common_beginning(first: Sequence[int], second: Iterable[int]) -> int:
    """How many tokens are the same from the first on."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
