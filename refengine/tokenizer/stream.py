"""Token ids to text as they come, in whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Decodes one sequence of token ids, step by step.

    The texts returned, joined, are the decoding of the whole sequence. A character whose bytes are spread
    over tokens comes with the last of them. Bytes that are not UTF-8 become U+FFFD once that is certain, just
    as in ``bytes.decode("utf-8", errors="replace")``.

    Args:
        token_bytes: the bytes a token id stands for, empty where it is to be left out.
        drop_space: leave out one space at the very start.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, drop_space: bool) -> None:
        self._token_bytes, self._drop_space = token_bytes, drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that ``id`` completes.

        Raises:
            TokenIdError: the id lies outside the vocabulary.
        """
        data = self._token_bytes(id)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end of the sequence: U+FFFD where a character is not complete, or nothing."""
        return self._utf8.decode(b"", final=True)
