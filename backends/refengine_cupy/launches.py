"""Launches: what emits them, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel, pack
from refengine_cupy.step_shape import Places, StepShape

Emit = Callable[[StepShape, Places], Iterable[Launch]]
"""The launches for one instruction, or several that are fused, in a step of some shape."""


def launch(kernel: Kernel, grid: tuple[int, int, int], **arguments: int | float | None) -> Launch:
    """A kernel over a grid, with the fields of its structure."""
    return Launch(kernel, grid, pack(kernel.arguments, arguments))


def over(items: int, threads: int, kernel: Kernel, /, **arguments: int | float | None) -> Launch:
    """One thread for each of so many items; one block, which finds nothing to do, for none."""
    return launch(kernel, (max(1, -(-items // threads)), 1, 1), **arguments)


def elementwise_kernel(name: str, arguments: str, threads: int = 256) -> Kernel:
    """A kernel of ``elementwise.cu`` with blocks of so many threads."""
    return Kernel("elementwise", name, arguments, threads)
