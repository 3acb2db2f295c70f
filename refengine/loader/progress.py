"""Who watches a transfer."""

from __future__ import annotations

import logging
from typing import Protocol


class Progress(Protocol):
    """What a download tells whoever watches it, all from one thread: ``notice* start advance* finish``."""

    def notice(self, text: str) -> None:
        """Show a text that the user should read: a licence, a choice made for them."""

    def start(self, label: str, total_bytes: int) -> None:
        """Begin a transfer of ``total_bytes``, named ``label``."""

    def advance(self, n_bytes: int) -> None:
        """Count ``n_bytes`` more; negative when the server made the transfer start again."""

    def finish(self) -> None:
        """End the transfer, complete or not; called exactly once after each ``start``."""


class QuietProgress:
    """Draws nothing. Notices become warnings of the ``refengine`` logger, because a licence must be seen."""

    def notice(self, text: str) -> None:
        """Log ``text`` as a warning."""
        logging.getLogger("refengine").warning("%s", text)

    def start(self, label: str, total_bytes: int) -> None:
        """Do nothing."""

    def advance(self, n_bytes: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
