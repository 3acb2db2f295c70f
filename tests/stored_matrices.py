"""Stored matrices to test with: any bits, of weights of ordinary size."""

from __future__ import annotations

import numpy as np

from refengine.quantizer import ENCODINGS

HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    **{f"int{bits}_g{size}": [0] for bits in (4, 8) for size in (32, 64, 128)},
}
"""Where in a block float16 numbers stand."""


def stored_matrix(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Stored bytes [rows, row_bytes] of ordinary, finite weights of either sign, about one in size."""
    rng = np.random.default_rng([seed, rows, columns])
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    match name:
        case "f32":
            return weights.view(np.uint8)
        case "f16":
            return weights.astype(np.float16).view(np.uint8)
        case "bf16":
            return np.ascontiguousarray(weights.view(np.uint16)[:, 1::2]).view(np.uint8)
    stored = ENCODINGS[name]
    data = rng.integers(0, 256, (rows, stored.row_bytes(columns)), dtype=np.uint8)
    blocks = data.reshape(rows, -1, stored.block_bytes)
    sizes = {"q4": 0.1, "q5": 0.05, "q8": 0.01, "q6": 0.0005, "in": 0.01}
    size = sizes[name[:2]] / (60 if name in ("q4_k", "q5_k") else 1)
    for at in HALVES[name]:
        halves = (rng.standard_normal(blocks.shape[:2]) * size).astype("<f2")
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return data
