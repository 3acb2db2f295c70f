"""Stop strings in a stream: found wherever they fall, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text through until one of several strings appears.

    Text that may be the beginning of a stop string is held back until it is clear.

    Clauses: SMP-14.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; gives what may be shown, and whether a stop string has ended it."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown, False

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins a stop string."""
        longest = min(len(self._held), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
