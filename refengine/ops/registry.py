"""What makes a function a golden op: its name, its signature, and whose memory its result may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from refengine.ops.signature import Signature, parse_signature

Sharing = Literal["fresh", "in_place", "view", "state"]
"""How a result relates to the first operand's memory.

``fresh``: new memory. ``in_place``: may overwrite the first operand, where nobody needs that any more.
``view``: the same memory under another shape. ``state``: the first operand itself, changed (the KV cache).
"""

Workspace = Callable[[Sequence[tuple[int, ...] | None], Mapping[str, Any], int], int]
"""``workspace(shapes, attributes, itemsize)``: bytes of working memory that a golden op takes at most from
its ``Scratch``, for operands of these shapes or smaller ones and elements of ``itemsize`` bytes."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """One operation of the instruction set.

    Attributes:
        name: what the decoder calls it.
        golden: the NumPy function that defines it, ``golden(*operands, **attributes, out=None)``.
        signature: operands and result with their shapes.
        sharing: how the result relates to the first operand's memory.
        workspace: the working memory of the golden function; ``None`` where it needs none. One that needs
            some takes a ``scratch``.
        dtype: of the result, where that is not the activations'.

    Clauses: PRG-4.
    """

    name: str
    golden: Callable[..., Any]
    signature: Signature
    sharing: Sharing
    workspace: Workspace | None = None
    dtype: np.dtype[Any] | None = None


def op(
    signature: str,
    *,
    sharing: Sharing = "fresh",
    workspace: Workspace | None = None,
    dtype: DTypeLike | None = None,
) -> Callable[[F], F]:
    """Declare a golden op; the function stays an ordinary function."""
    parsed, kind = parse_signature(signature), None if dtype is None else np.dtype(dtype)

    def declare(function: F) -> F:
        function.__dict__["op"] = Op(function.__name__, function, parsed, sharing, workspace, kind)
        return function

    return declare


def declared(*functions: Callable[..., Any]) -> dict[str, Op]:
    """The ops that these functions declare, by name, in this order."""
    return {function.__name__: function.__dict__["op"] for function in functions}
