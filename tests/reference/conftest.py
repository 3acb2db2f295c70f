"""Tiny checkpoints, made once for a module's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from reference.tiny_checkpoints import TinyModel, make_tiny


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices as small as theirs cost more to share out than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """The checkpoint of a variant."""
    directory = tmp_path_factory.mktemp("tiny")
    return cache(lambda variant: make_tiny(variant, directory))
