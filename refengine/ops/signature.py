"""Shapes as part of an op's declaration: ``"x[T, K], weight[N, K], bias[N]? -> [T, N]"``.

One line says what the golden op takes and gives, what the tracer infers and what the tests check.

Grammar: operands ``name[dim, …]`` separated by commas, ``?`` after one that may be ``None``; a dim is a
letter or word (the same word is the same size throughout), a number, or a leading ``...`` (any number of
axes). A dim may also be the product ``A*B`` or the exact quotient ``A/B`` of two words or numbers; a word
that names an attribute of the call stands for that attribute's value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Dim = int | str
"""A size: a number, or the name of a symbolic one (``"T"`` tokens, ``"S"`` sequences, ``"R"`` logit rows)."""

Shape = tuple[Dim, ...]


class ShapeError(ValueError):
    """Operands do not fit an op's signature."""


@dataclass(frozen=True)
class Operand:
    """One named input of an op and the dims it must have."""

    name: str
    dims: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """The parsed declaration of an op."""

    text: str
    operands: tuple[Operand, ...]
    result: tuple[str, ...]

    def infer(self, op: str, shapes: Sequence[Shape | None], attributes: Mapping[str, object]) -> Shape:
        """The result's shape.

        Args:
            op: the op's name, for the error's text.
            shapes: one per operand, ``None`` for an optional one left out; trailing ones may be missing.
            attributes: the call's attributes.

        Raises:
            ShapeError: too few or too many operands, or sizes that disagree.

        Clauses: PRG-2, PRG-3, OPS-1.
        """
        sizes: dict[str, Dim] = {k: v for k, v in attributes.items() if isinstance(v, int)}
        leading: Shape | None = None
        compound: list[tuple[Operand, Shape, str, Dim]] = []
        given = [*shapes, *[None] * (len(self.operands) - len(shapes))]
        if len(given) > len(self.operands):
            raise ShapeError(f"{op} takes {len(self.operands)} operands, not {len(given)}: {self.text}")
        for operand, shape in zip(self.operands, given, strict=True):
            if shape is None:
                if not operand.optional:
                    raise ShapeError(f"{op} needs {operand.name}: {self.text}")
                continue
            dims, any_lead = operand.dims, operand.dims[:1] == ("...",)
            if any_lead:
                dims = dims[1:]
                split = len(shape) - len(dims)
                if split < 0 or (leading is not None and leading != shape[:split]):
                    raise self._mismatch(op, operand, shape, leading)
                leading, shape = shape[:split], shape[split:]
            if len(shape) != len(dims):
                raise self._mismatch(op, operand, shape, leading)
            for dim, size in zip(dims, shape, strict=True):
                if "*" in dim or "/" in dim:  # its words may be in operands still to come
                    compound.append((operand, shape, dim, size))
                    continue
                expected = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
                if expected != size:
                    raise self._mismatch(op, operand, shape, f"{dim} = {expected}")
        for operand, shape, dim, size in compound:
            if (expected := self._resolve(op, dim, sizes)) != size:
                raise self._mismatch(op, operand, shape, f"{dim} = {expected}")
        return tuple(
            size
            for dim in self.result
            for size in ((leading or ()) if dim == "..." else (self._resolve(op, dim, sizes),))
        )

    def _resolve(self, op: str, dim: str, sizes: Mapping[str, Dim]) -> Dim:
        if "*" not in dim and "/" not in dim:
            return int(dim) if dim.isdigit() else sizes[dim]
        left, right = (self._resolve(op, word, sizes) for word in re.split(r"[*/]", dim))
        if not (isinstance(left, int) and isinstance(right, int)):
            raise ShapeError(f"{op}: {dim} needs numbers, not {left} and {right}: {self.text}")
        if "/" in dim and (right == 0 or left % right):
            raise ShapeError(f"{op}: {left} does not divide into {right} parts: {self.text}")
        return left * right if "*" in dim else left // right

    def _mismatch(self, op: str, operand: Operand, shape: Shape, expected: object) -> ShapeError:
        return ShapeError(f"{op}: {operand.name} has shape {list(shape)}, expected {expected}: {self.text}")


def parse_signature(text: str) -> Signature:
    """Parse a declaration; a malformed one is a ``ValueError`` at import time."""
    head, arrow, tail = text.partition("->")
    pattern = r"\s*(\w+)\[([^\]]*)\](\?)?\s*(?:,|$)"
    operands = tuple(
        Operand(name, _dims(dims), bool(optional)) for name, dims, optional in re.findall(pattern, head)
    )
    if not arrow or re.sub(pattern, "", head).strip() or not re.fullmatch(r"\s*\[.*\]\s*", tail):
        raise ValueError(f"malformed op signature: {text!r}")
    return Signature(text, operands, _dims(tail.strip()[1:-1]))


def _dims(text: str) -> tuple[str, ...]:
    return tuple(dim.strip() for dim in text.split(",") if dim.strip())
