"""Faults of laying GPTQ's and AWQ's tensors out: these are changed before, or what is made of them after."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.numpy_backend import NumpyBackend
from refengine.errors import UnsupportedError
from refengine.quantizer import StoredRows, encoding, from_awq, from_gptq
from refengine_conformance.faults.fault import Fault
from refengine_conformance.subject import Subject

Words = NDArray[np.int32]


def _gptq(relay: Callable[..., StoredRows]) -> Callable[[], Subject]:
    return partial(Subject, NumpyBackend, from_gptq=relay)


def _awq(relay: Callable[..., StoredRows]) -> Callable[[], Subject]:
    return partial(Subject, NumpyBackend, from_awq=relay)


def _fields(words: Words, bits: int) -> NDArray[np.uint32]:
    """[rows, words] -> [rows, words, fields]."""
    shifts, mask = np.arange(0, 32, bits, dtype=np.uint32), np.uint32(2**bits - 1)
    fields: NDArray[np.uint32] = words.view(np.uint32)[..., None] >> shifts & mask
    return fields


def _words(fields: NDArray[np.uint32], bits: int) -> Words:
    shifted = fields << np.arange(0, 32, bits, dtype=np.uint32)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(shifted, axis=-1)
    return words.view(np.int32)


def _reordered(words: Words, order: tuple[int, ...]) -> Words:
    return _words(_fields(words, 4)[..., list(order)], 4)


def _one_is_never_added(*tensors: Any, bits: int, zero_points: str) -> StoredRows:
    return from_gptq(*tensors, bits=bits, zero_points="stored")


def _one_is_always_added(*tensors: Any, bits: int, zero_points: str) -> StoredRows:
    return from_gptq(*tensors, bits=bits, zero_points="stored_minus_one")


def _one_is_added_without_a_wrap(
    qweight: Words, qzeros: Words, *others: Any, bits: int, zero_points: Any
) -> StoredRows:
    rows = from_gptq(qweight, qzeros, *others, bits=bits, zero_points=zero_points)
    if bits == 4 and zero_points == "stored_minus_one":
        zeros = _zeros_of(rows, qzeros, bits)
        zeros[zeros == 0] = 16
    return rows


def _zeros_of(rows: StoredRows, qzeros: Words, bits: int) -> NDArray[np.uint8]:
    """The zero points of blocks, a view: [N, blocks]."""
    count = qzeros.shape[1] * (32 // bits)
    return rows.data.reshape(count, -1, encoding(rows.encoding).block_bytes)[..., 2]


def _zero_points_down_the_groups(
    qweight: Words, qzeros: Words, *others: Any, bits: int, zero_points: Any
) -> StoredRows:
    if qzeros.size:
        fields = _fields(qzeros, bits).reshape(len(qzeros), -1)
        turned = fields.T.reshape(*qzeros.shape, 32 // bits)
        qzeros = _words(turned, bits)
    return from_gptq(qweight, qzeros, *others, bits=bits, zero_points=zero_points)


def _gptq_in_the_order_of_awq(
    qweight: Words, qzeros: Words, *others: Any, bits: int, zero_points: Any
) -> StoredRows:
    if bits == 4 and qweight.dtype == np.int32:
        qweight = _reordered(qweight, (0, 2, 4, 6, 1, 3, 5, 7))
    return from_gptq(qweight, qzeros, *others, bits=bits, zero_points=zero_points)


def _blocks_of_32(
    qweight: Words, qzeros: Words, scales: NDArray[np.float16], g_idx: Any, *, bits: int, zero_points: Any
) -> StoredRows:
    rows = from_gptq(qweight, qzeros, scales, g_idx, bits=bits, zero_points=zero_points)
    size, group = encoding(rows.encoding).block_size, len(qweight) * (32 // bits) // len(scales)
    if size == group:
        return rows
    # the scales of consecutive groups, block by block, as if each were one block long
    blocks = rows.data.reshape(len(rows.data), -1, encoding(rows.encoding).block_bytes)
    by_group = blocks[:, :: group // size, :2].copy()
    blocks[..., :2] = np.tile(by_group, (1, group // size, 1))
    return rows


def _g_idx_unread(
    qweight: Words, qzeros: Words, scales: Any, g_idx: Any, *, bits: int, zero_points: Any
) -> StoredRows:
    return from_gptq(qweight, qzeros, scales, None, bits=bits, zero_points=zero_points)


def _shapes_trusted(
    qweight: Words, qzeros: Words, scales: Any, g_idx: Any, *, bits: int, zero_points: Any
) -> StoredRows:
    try:
        return from_gptq(qweight, qzeros, scales, g_idx, bits=bits, zero_points=zero_points)
    except UnsupportedError:
        raise
    except Exception:
        return StoredRows(f"int{bits}_g32", np.zeros((qweight.shape[-1], 19), np.uint8))


def _awq_in_the_order_of_gptq(qweight: Words, qzeros: Words, scales: Any, *, bits: int = 4) -> StoredRows:
    if qweight.dtype == qzeros.dtype == np.int32:
        inverse = (0, 4, 1, 5, 2, 6, 3, 7)
        qweight, qzeros = _reordered(qweight, inverse), _reordered(qzeros, inverse)
    return from_awq(qweight, qzeros, scales, bits=bits)


def _awq_order_inverted(qweight: Words, qzeros: Words, scales: Any, *, bits: int = 4) -> StoredRows:
    if qweight.dtype == qzeros.dtype == np.int32:
        twice = (0, 1, 4, 5, 2, 3, 6, 7)
        qweight, qzeros = _reordered(qweight, twice), _reordered(qzeros, twice)
    return from_awq(qweight, qzeros, scales, bits=bits)


def _awq_zero_points_in_order(qweight: Words, qzeros: Words, scales: Any, *, bits: int = 4) -> StoredRows:
    if qzeros.dtype == np.int32:
        qzeros = _reordered(qzeros, (0, 4, 1, 5, 2, 6, 3, 7))
    return from_awq(qweight, qzeros, scales, bits=bits)


def _awq_one_added(qweight: Words, qzeros: Words, scales: Any, *, bits: int = 4) -> StoredRows:
    if qzeros.dtype == np.int32:
        qzeros = _words(_fields(qzeros, 4) + np.uint32(1) & np.uint32(15), 4)
    return from_awq(qweight, qzeros, scales, bits=bits)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "GPTQ zero points never one more",
        "ENC-16",
        "Both formats read as the second, in which z is stored as it is.",
        _gptq(_one_is_never_added),
    ),
    Fault(
        "GPTQ zero points always one more",
        "ENC-16",
        "Both formats read as the first: kernels have confused z and z - 1 (vllm#38966).",
        _gptq(_one_is_always_added),
    ),
    Fault(
        "GPTQ zero points of sixteen",
        "ENC-16",
        "The one that is missing added in wider integers, after the field was taken out of its word.",
        _gptq(_one_is_added_without_a_wrap),
    ),
    Fault(
        "GPTQ zero points packed down the groups",
        "ENC-16",
        "Words of zero points read along the same axis as those of weights.",
        _gptq(_zero_points_down_the_groups),
    ),
    Fault(
        "GPTQ weights in the order of AWQ",
        "ENC-16",
        "One unpacker for two formats.",
        _gptq(_gptq_in_the_order_of_awq),
    ),
    Fault(
        "scales of consecutive groups in one group's blocks",
        "ENC-16",
        "A block's place taken for its group's, where a group is several blocks.",
        _gptq(_blocks_of_32),
    ),
    Fault(
        "act-order goes unseen",
        "ENC-16",
        "A loader that never opens g_idx: every shape fits, and the weights are noise.",
        _gptq(_g_idx_unread),
    ),
    Fault(
        "malformed GPTQ tensors give zeros",
        "ENC-16",
        "An error caught, and a matrix of zeros in its place.",
        _gptq(_shapes_trusted),
    ),
    Fault(
        "AWQ columns one after the other",
        "ENC-17",
        "Fields in the order of their bits, as GPTQ has them.",
        _awq(_awq_in_the_order_of_gptq),
    ),
    Fault(
        "AWQ order taken for its inverse",
        "ENC-17",
        "Where a column lies, and which column lies there: two lists that begin and end alike.",
        _awq(_awq_order_inverted),
    ),
    Fault(
        "AWQ zero points one after the other",
        "ENC-17",
        "The order undone for weights, and forgotten for zero points.",
        _awq(_awq_zero_points_in_order),
    ),
    Fault(
        "AWQ zero points one more",
        "ENC-17",
        "A kernel of GPTQ, which adds one, fed with AWQ's zero points.",
        _awq(_awq_one_added),
    ),
)
