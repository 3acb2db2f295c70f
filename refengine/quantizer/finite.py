"""Whether stored weights are all numbers, in float32 or in float16: told from their bytes where that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.errors import NumericalError
from refengine.quantizer.decode import decode
from refengine.quantizer.encodings import encoding
from refengine.quantizer.tensor import LazyTensor

CHUNK_BYTES = 2**20
"""Stored bytes looked at together, so that little memory is used beside them."""

HALVES: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "q4_0": ((0, 8),),
        "q4_1": ((0, 15), (2, 1)),
        "q5_0": ((0, 16),),
        "q5_1": ((0, 31), (2, 1)),
        "q8_0": ((0, 128),),
        "q4_k": ((0, 63 * 15), (2, 63)),
        "q5_k": ((0, 63 * 31), (2, 63)),
        "q6_k": ((208, 128 * 32),),
        **{f"int{bits}_g{size}": ((0, 255),) for bits in (4, 8) for size in (32, 64, 128)},
    }
)
"""Where in a stored block float16 numbers stand, and the greatest integer that each is multiplied with. All
else in these encodings is an integer, so that a weight is finite where these numbers are."""

EXPONENTS = MappingProxyType({"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)})
"""Weights as unsigned integers, and their exponent's bits: all set in infinity and NaN alone."""

TOO_LARGE = np.float32(65520)
"""From here on numbers round to infinity in float16."""

Bytes = NDArray[np.uint8]


def not_finite(name: str) -> NumericalError:
    """What a tensor of this name is refused with."""
    return NumericalError(
        f"tensor {name} holds NaN or infinity: the file is damaged, "
        "or was quantized from damaged weights; get it again or use another one"
    )


def too_large(name: str) -> NumericalError:
    """What a tensor of this name is refused with where its weights are to be rounded to float16."""
    return NumericalError(
        f"tensor {name} holds a weight that is too large for float16, which the policy mixed16 "
        "rounds weights to: choose the policy float32"
    )


def check_finite(tensor: LazyTensor, rows: Bytes, *, halves: bool = False) -> None:
    """Look at stored rows of a matrix, uint8 [N, row_bytes].

    Args:
        halves: whether they will be rounded to float16.

    Raises:
        NumericalError: a weight is infinite or NaN, or, for ``halves``, would be.
    """
    if not all_finite(tensor.encoding, rows):
        raise not_finite(tensor.name)
    if halves:
        check_float16(tensor, rows)


def check_float16(tensor: LazyTensor, rows: Bytes) -> None:
    """Look at stored rows of finite weights, uint8 [N, row_bytes], that will be rounded to float16.

    Raises:
        NumericalError: one would be infinite.
    """
    if not fit_float16(tensor.encoding, rows):
        raise too_large(tensor.name)


def all_finite(name: str, data: Bytes) -> bool:
    """Whether no weight of stored rows, uint8 [N, row_bytes], is infinite or NaN.

    Finite scales give finite weights: the greatest product of float16 and integers is far below float32's
    end.
    """
    if name not in EXPONENTS and name not in HALVES:
        return all(np.isfinite(decode(name, rows)).all() for rows in _chunks(data))
    exponent = EXPONENTS[name if name in EXPONENTS else "f16"][1]
    return not any(
        ((bits & exponent) == exponent).any() for rows in _chunks(data) for bits in _numbers(name, rows)
    )


def fit_float16(name: str, data: Bytes) -> bool:
    """Whether all weights of stored rows, uint8 [N, row_bytes], finite ones, are finite in float16.

    Rows are decoded only where their greatest scales, times the greatest integers, could overflow.
    """
    return all(_fit_float16(name, rows) for rows in _chunks(data))


def _fit_float16(name: str, rows: Bytes) -> bool:
    if name == "f16":
        return True
    if name in EXPONENTS:
        (bits,) = _numbers(name, rows)
        wide = bits.astype(np.uint32) << np.uint32(32 - 8 * bits.itemsize)
        return not bool(((wide & 0x7FFFFFFF) >= TOO_LARGE.view(np.uint32)).any())
    if name in HALVES and _most(name, rows) < TOO_LARGE:
        return True
    return not bool((np.abs(decode(name, rows)) >= TOO_LARGE).any())


def _most(name: str, rows: Bytes) -> float:
    """What no weight of stored rows is above, in absolute value."""
    halves = [bits & np.uint16(0x7FFF) for bits in _numbers(name, rows)]
    largest = [float(bits.max(initial=0).astype(np.uint16).view(np.float16)) for bits in halves]
    return sum(factor * half for (_, factor), half in zip(HALVES[name], largest, strict=True))


def _chunks(data: Bytes) -> Iterator[Bytes]:
    step = max(1, CHUNK_BYTES // max(1, data.shape[1]))
    for first in range(0, len(data), step):
        yield data[first : first + step]


def _numbers(name: str, rows: Bytes) -> Iterator[NDArray[np.unsignedinteger]]:
    """The bits of all floating-point numbers of stored rows, those at the same place of blocks together."""
    if name in EXPONENTS:
        yield np.ascontiguousarray(rows).view(EXPONENTS[name][0])
        return
    blocks = rows.reshape(len(rows), -1, encoding(name).block_bytes)
    for at, _ in HALVES[name]:
        yield np.ascontiguousarray(blocks[..., at : at + 2]).view("<u2")
