"""Stored matrices to test with."""

from __future__ import annotations

import numpy as np

from refengine.quantizer import encoding

HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}
"""Where in a block float16 numbers stand."""


def stored_matrix(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Stored bytes [rows, row_bytes] of any bits, with scales of ordinary size."""
    rng = np.random.default_rng([seed, rows, columns])
    form = encoding(name)
    blocks = rng.integers(0, 256, (rows, columns // form.block_size, form.block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        scales = (rng.standard_normal(blocks.shape[:2]) * 0.02).astype("<f2")
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)
