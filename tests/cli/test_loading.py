"""While a model is loaded, nobody looks for reference cycles; afterwards it is as it was."""

from __future__ import annotations

import gc

import pytest

from refengine.cli.loading import collector_at_rest


def test_objects_made_at_rest_count_as_old() -> None:
    """The collector is off inside the block; what was made there is in the oldest generation then."""
    with collector_at_rest():
        assert not gc.isenabled()
        made = [object()]
    assert gc.isenabled()
    assert any(each is made for each in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_cycles_made_at_rest_are_found_later() -> None:
    """Nothing is kept from the collector."""

    class Node:
        """Something that can refer to itself."""

    with collector_at_rest():
        node = Node()
        node.self = node  # type: ignore[attr-defined]
        del node
    assert any(type(each) is Node for each in gc.get_objects())  # other objects lie about their class
    gc.collect()
    assert not any(type(each) is Node for each in gc.get_objects())


def test_an_error_wakes_the_collector() -> None:
    """However the block ends, the collector is back."""
    with pytest.raises(KeyError), collector_at_rest():
        raise KeyError
    assert gc.isenabled()


def test_who_collects_nothing_is_left_alone() -> None:
    """Where the collector was off before, it stays off."""
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
