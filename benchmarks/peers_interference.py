"""How much of the cores' time others took meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

STATISTICS = Path("/proc/stat")


class Interference:
    """Counts from its construction on."""

    def __init__(self) -> None:
        self._start = clocks() if STATISTICS.exists() else None

    def share(self) -> float | None:
        """What neither this process nor its ended children took, of all cores' time; ``None`` off Linux."""
        if self._start is None:
            return None
        elapsed, busy, own = (now - then for now, then in zip(clocks(), self._start, strict=True))
        return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))


def clocks() -> tuple[float, float, float]:
    """Seconds: of the clock, of all cores at work (or taken by a hypervisor), of our own work."""
    user, nice, system, _, _, irq, softirq, steal = map(int, STATISTICS.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
