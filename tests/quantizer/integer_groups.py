"""Integers in groups, read and written element by element as formats are told: slow, and nothing shared.

Weights are float64, where the products are exact. ``GPTQ`` and ``AWQ`` say where an element's bits lie.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

BLOCKS = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128, "int8_g32": 32, "int8_g64": 64, "int8_g128": 128}
"""Weights of a block."""

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def weight_at(name: str, block: bytes, i: int) -> float:
    """Weight ``i`` of a block."""
    d, z = struct.unpack_from("<eB", block)
    if name.startswith("int8"):
        return d * (block[3 + i] - z)
    run, within = divmod(i, 32)
    byte = block[3 + 16 * run + within % 16]
    return d * ((byte >> 4 if within >= 16 else byte & 15) - z)


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] as integers q [N, K], and z and d [N, G]."""

    q: list[list[int]]
    z: list[list[int]]
    d: list[list[float]]
    group: int

    def integer(self, n: int, k: int) -> int:
        return self.q[n][k] - self.z[n][k // self.group]

    def weights(self) -> np.ndarray:
        """float64 [N, K]."""
        rows, columns = range(len(self.q)), range(len(self.q[0]))
        return np.array([[self.d[n][k // self.group] * self.integer(n, k) for k in columns] for n in rows])


def quantize(weights: np.ndarray, group: int, bits: int) -> Quantized:
    """Round to nearest, between the least and the greatest of a group and zero."""
    top = 2**bits - 1
    q, z, d = [], [], []
    for row in weights.tolist():
        q.append([])
        z.append([])
        d.append([])
        for start in range(0, len(row), group):
            some = row[start : start + group]
            least, greatest = min(*some, 0.0), max(*some, 0.0)
            (step,) = struct.unpack("<e", struct.pack("<e", (greatest - least) / top))
            zero = min(max(round(-least / step), 0), top)
            z[-1].append(zero)
            d[-1].append(step)
            q[-1] += [min(max(round(value / step) + zero, 0), top) for value in some]
    return Quantized(q, z, d, group)


def put(words: np.ndarray, at: tuple[int, int], field: int, bits: int, value: int) -> None:
    """Write a field of a word, the lowest first, bit by bit."""
    word = int(words[at])
    for bit in range(bits):
        if value >> bit & 1:
            word |= 1 << (field * bits + bit)
    words[at] = word


def take(words: np.ndarray, at: tuple[int, int], field: int, bits: int) -> int:
    """Read a field of a word."""
    digits = format(int(words[at]) % 2**32, "032b")
    end = 32 - field * bits
    return int(digits[end - bits : end], 2)


def scales_of(found: Quantized) -> np.ndarray:
    return np.array(found.d).T.astype(np.float16)


def pack_gptq(
    found: Quantized, bits: int, *, less: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """qweight, qzeros (of z less 0 or 1), scales and g_idx."""
    rows, columns, groups = len(found.q), len(found.q[0]), len(found.z[0])
    per_word = 32 // bits
    qweight = np.zeros((columns // per_word, rows), np.uint32)
    qzeros = np.zeros((groups, rows // per_word), np.uint32)
    for n in range(rows):
        for k in range(columns):
            put(qweight, (k // per_word, n), k % per_word, bits, found.q[n][k])
        for g in range(groups):
            put(qzeros, (g, n // per_word), n % per_word, bits, (found.z[n][g] - less) % 2**bits)
    g_idx = np.array([k // found.group for k in range(columns)], np.int32)
    return qweight.view(np.int32), qzeros.view(np.int32), scales_of(found), g_idx


def unpack_gptq(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int, *, less: int
) -> np.ndarray:
    """Weights, float64 [N, K]."""
    per_word = 32 // bits
    weights = np.empty((qweight.shape[1], len(qweight) * per_word))
    for n, k in np.ndindex(*weights.shape):
        g = int(g_idx[k])
        q = take(qweight, (k // per_word, n), k % per_word, bits)
        z = (take(qzeros, (g, n // per_word), n % per_word, bits) + less) % 2**bits
        weights[n, k] = float(scales[g, n]) * (q - z)
    return weights


def pack_awq(found: Quantized) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qweight, qzeros and scales."""
    rows, columns, groups = len(found.q), len(found.q[0]), len(found.z[0])
    qweight, qzeros = np.zeros((columns, rows // 8), np.uint32), np.zeros((groups, rows // 8), np.uint32)
    for word in range(rows // 8):
        for field, column in enumerate(AWQ_COLUMNS):
            n = 8 * word + column
            for k in range(columns):
                put(qweight, (k, word), field, 4, found.q[n][k])
            for g in range(groups):
                put(qzeros, (g, word), field, 4, found.z[n][g])
    return qweight.view(np.int32), qzeros.view(np.int32), scales_of(found)


def unpack_awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Weights, float64 [N, K]."""
    columns, words = qweight.shape
    weights = np.empty((8 * words, columns))
    for word in range(words):
        for field, column in enumerate(AWQ_COLUMNS):
            for k in range(columns):
                g, n = k // (columns // len(qzeros)), 8 * word + column
                difference = take(qweight, (k, word), field, 4) - take(qzeros, (g, word), field, 4)
                weights[n, k] = float(scales[g, n]) * difference
    return weights
