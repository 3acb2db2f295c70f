"""SentencePiece's BPE: the neighbours whose union has the highest score are joined first.

Source: ``src/bpe_model.cc`` of SentencePiece; llama.cpp (``llm_tokenizer_spm``) does the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from refengine.errors import RequestError
from refengine.tokenizer.data import TokenizerData, TokenType

SPACE = "▁"  # U+2581, which stands for a space in tokens


class SentencePiece:
    """Text without special tokens <-> tokens of a ``llama`` vocabulary.

    Only normal and user-defined tokens come of text, as in SentencePiece; llama.cpp would also form a control
    token whose parts happen to be tokens.
    """

    def __init__(self, data: TokenizerData) -> None:
        self._ids = data.text_ids
        self._scores = data.scores
        bytes_ = data.ids_of_type(TokenType.BYTE)
        self._byte_ids = [bytes_.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._boundary = _boundary(self._ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; one that has no token becomes the bytes of its UTF-8.

        Raises:
            RequestError: a character has no token, nor have its bytes.
        """
        ids = list[int]()
        for chunk in self._boundary.split(text.replace(" ", SPACE)):
            for symbol in merge(chunk, self._ids, self._scores):
                id = self._ids.get(symbol)
                ids += self._bytes(symbol) if id is None else [id]
        return ids

    def _bytes(self, character: str) -> list[int]:
        ids = [id for byte in character.encode() if (id := self._byte_ids[byte]) is not None]
        if len(ids) < len(character.encode()):
            raise RequestError(f"the model's vocabulary has no tokens for the character {character!r}")
        return ids

    @staticmethod
    def decode(token: str) -> bytes:
        """The UTF-8 that a normal token stands for."""
        return token.replace(SPACE, " ").encode()


def merge(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Joins the characters of ``text`` until no two neighbours form a token; O(n log n).

    Of all neighbours whose union is a token, those with the highest score are joined first; of equal scores,
    the leftmost.

    Args:
        text: what to join.
        ids: text -> id of each token.
        scores: [n tokens], by id.

    Returns:
        Tokens, and single characters that are none; together they are ``text``.
    """
    symbols = list(text)  # a joined symbol moves to its left half's place, and leaves "" at its right half's
    n = len(symbols)
    left_of, right_of = list(range(-1, n - 1)), list(range(1, n + 1))
    queue = list[tuple[float, int, int, int]]()  # -score, left, right, length of the union
    for left in range(n - 1):
        id = ids.get(symbols[left] + symbols[left + 1])
        if id is not None:
            queue.append((-scores[id], left, left + 1, 2))
    heapify(queue)
    while queue:
        _, left, right, length = heappop(queue)
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
            continue  # one of the two has been joined with another since
        symbols[left] += symbols[right]
        symbols[right] = ""
        right_of[left] = right_of[right]
        if right_of[left] < n:
            left_of[right_of[left]] = left
        for first, second in ((left_of[left], left), (left, right_of[left])):
            if first >= 0 and second < n:
                union = symbols[first] + symbols[second]
                id = ids.get(union)
                if id is not None:
                    heappush(queue, (-scores[id], first, second, len(union)))
    return [symbol for symbol in symbols if symbol]


def _boundary(ids: Mapping[str, int]) -> re.Pattern[str]:
    """Matches where no token can reach across: before a space whose predecessor no token has before a space.

    Merging between these places gives the same tokens as merging the whole, and is several times faster.
    """
    # The zero bytes between tokens can only count too many predecessors, which is safe.
    codes = np.frombuffer("\0".join(ids).encode("utf-32-le"), "<u4")
    reaching = "".join(map(chr, np.unique(codes[:-1][codes[1:] == ord(SPACE)])))
    return re.compile(f"(?<![{re.escape(reaching)}])(?={SPACE})" if reaching else f"(?={SPACE})")
