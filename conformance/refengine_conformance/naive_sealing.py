"""Sealed blocks, straight from the clauses: exact rational arithmetic, one number at a time.

Nothing here is shared with the engine but the names of the formats.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine_conformance.subject import KVPart

Numbers = NDArray[np.floating]
Index = tuple[Any, ...]

NAN_STEP = 255


@dataclass(frozen=True)
class Group:
    """Numbers that share a step.

    Attributes:
        step, centre, codes: as stored.
        opened: the numbers that are read.
        slack: how far its numbers must move, as a fraction of the largest, to change a byte.
    """

    step: int
    centre: int
    codes: tuple[int, ...]
    opened: tuple[float, ...]
    slack: float


def open_block(part: KVPart, name: str, x: Numbers) -> NDArray[np.float64]:
    """What is read of a block ``[P, G, D]``, once it is sealed."""
    if name.startswith("float"):
        with np.errstate(over="ignore"):
            rounded = x.astype(np.float32).astype(name).astype(np.float64)
        return np.where(np.isinf(rounded), np.nan, rounded)
    opened = np.empty(x.shape)
    for index in _groups(part, x.shape):
        opened[index] = np.reshape(seal_group(x[index], _bits(name)).opened, x[index].shape)
    return opened


def block_bytes(part: KVPart, name: str, x: Numbers) -> bytes:
    """The bytes of a sealed block ``[P, G, D]``, NaN of the float formats in any form."""
    if name.startswith("float"):
        return open_block(part, name, x).astype(f"<f{np.dtype(name).itemsize}").tobytes()
    (positions, heads, size), bits = x.shape, _bits(name)
    codes: NDArray[np.int64] = np.empty(x.shape, np.int64)
    groups = []
    for index in _groups(part, x.shape):
        group = seal_group(x[index], bits)
        groups.append(group)
        codes[index] = np.reshape(group.codes, x[index].shape)
    data = [group.step for group in groups] + [group.centre % 256 for group in groups]
    row = -(-size * bits // 8)
    for position, head in itertools.product(range(positions), range(heads)):
        stored = [int(code) for code in codes[position, head]]
        if bits == 8:
            data += [code % 256 for code in stored]
        else:
            nibbles = [code + 8 for code in stored] + [0] * (2 * row - size)
            data += [low + 16 * high for low, high in zip(nibbles[:row], nibbles[row:], strict=True)]
    return bytes(data)


def seal_group(x: Numbers, bits: int) -> Group:
    """The step, the centre and the codes of numbers that share them."""
    numbers = [float(number) for number in x.astype(np.float32).ravel()]
    half, unit = 2 ** (bits - 1), 2 ** (bits - 4)
    step = NAN_STEP
    if all(map(math.isfinite, numbers)):
        low, high = min(numbers), max(numbers)
        with np.errstate(over="ignore"):
            spread = float(np.float32(high) - np.float32(low))
        size = max(abs(low), abs(high))
        levels, reach = 2 * half - unit, 127 * unit + half - 1
        if math.isfinite(spread):
            step = max(_least(Fraction(spread) / levels), _least(Fraction(size) / reach))
    if step == NAN_STEP:
        return Group(step, -128, (-half,) * len(numbers), (math.nan,) * len(numbers), math.inf)
    d = _steps()[step]
    quotients = [Fraction(number) / d for number in numbers]
    centre = _cut((round(Fraction(low) / d) + half) // unit, -128, 127)
    stored = tuple(_cut(round(y) - unit * centre, -half, half - 1) for y in quotients)
    opened = tuple(float(d * (code + unit * centre)) for code in stored)
    moves = [abs(y - math.floor(y) - Fraction(1, 2)) * d for y in quotients]
    for edge in (d, _steps()[max(step - 1, 0)]):
        moves += [abs(Fraction(spread) - edge * levels) / 2, abs(Fraction(size) - edge * reach)]
    return Group(step, centre, stored, opened, float(min(moves) / Fraction(size)) if size else math.inf)


def in_doubt(part: KVPart, name: str, x: Numbers, error: Numbers) -> bool:
    """Whether an error of this size in the numbers of a block may change one of its bytes."""
    if name.startswith("float"):
        return False
    return any(
        seal_group(x[index], _bits(name)).slack * np.abs(x[index]).max() <= np.abs(error[index]).max()
        for index in _groups(part, x.shape)
    )


def _bits(name: str) -> int:
    return int(name.removeprefix("int"))


def _groups(part: KVPart, shape: tuple[int, ...]) -> Iterator[Index]:
    """The numbers of a block ``[P, G, D]`` that share a step, in the order of the steps."""
    positions, heads, size = shape
    if part == "keys":
        yield from ((slice(None), g, d) for g in range(heads) for d in range(size))
    else:
        yield from (
            (p, g, slice(start, start + 32))
            for p in range(positions)
            for g in range(heads)
            for start in range(0, size, 32)
        )


@cache
def _steps() -> tuple[Fraction, ...]:
    return tuple((8 + s % 8) * Fraction(2) ** (s // 8 - 23) for s in range(NAN_STEP))


def _least(needed: Fraction) -> int:
    """The first step that is large enough, ``NAN_STEP`` where none is."""
    return bisect_left(_steps(), needed)


def _cut(x: int, least: int, most: int) -> int:
    return max(least, min(most, x))
