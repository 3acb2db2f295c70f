"""Tokens that stand in text as a whole, found before anything else is tokenized."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping


class SpecialTokens:
    """Finds special tokens in text: at each place the longest one, and the leftmost first.

    So do SentencePiece and Hugging Face's tokenizers; llama.cpp takes the longest of the whole text first,
    which differs where two overlap.

    Args:
        ids: text -> token id; no empty text.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._first = re.compile(f"[{re.escape(''.join({text[0] for text in ids}))}]" if ids else "(?!)")
        lengths = defaultdict[str, set[int]](set)
        for text in ids:
            lengths[text[:2]].add(len(text))
        # By two characters, since a vocabulary with a token for two spaces would try all for each space.
        self._lengths = {head: sorted(lengths[head], reverse=True) for head in lengths}

    def split(self, text: str) -> Iterator[str | int]:
        """The pieces of ``text`` in order: token ids, and the texts between them, which are not empty."""
        start = at = 0
        while match := self._first.search(text, at):
            at = match.start()
            length = self._match(text, at)
            if not length:
                at += 1
                continue
            if start < at:
                yield text[start:at]
            yield self._ids[text[at : at + length]]
            start = at = at + length
        if start < len(text):
            yield text[start:]

    def _match(self, text: str, at: int) -> int:
        """Length of the longest special token that begins at ``at``; 0 if there is none."""
        for head in (text[at : at + 2], text[at]):
            for length in self._lengths.get(head, ()):
                if text[at : at + length] in self._ids:
                    return length
        return 0
