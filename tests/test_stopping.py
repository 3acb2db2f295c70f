"""Stop strings end a stream wherever they fall, and no part of one is ever shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from refengine.stopping import StopScanner

PIECES = st.lists(st.text("ab<|>", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_what_is_shown_is_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut into pieces: everything before the earliest stop string, and nothing after."""
    scanner, shown = StopScanner(stops), ""
    for count, piece in enumerate(pieces, 1):
        text, stopped = scanner.push(piece)
        shown += text
        so_far = "".join(pieces[:count])
        found = [at for at in map(so_far.find, stops) if at >= 0]
        assert stopped == bool(found)
        if stopped:
            assert shown == so_far[: min(found)]
            return
        assert so_far.startswith(shown)
    assert shown + scanner.finish() == "".join(pieces)


@given(PIECES)
def test_without_stop_strings_nothing_is_held_back(pieces: list[str]) -> None:
    """Text passes at once."""
    scanner = StopScanner([])
    assert [scanner.push(piece) for piece in pieces] == [(piece, False) for piece in pieces]
