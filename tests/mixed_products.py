"""Golden products of stored weights under the mixed policies, for tests that compare with them."""

from __future__ import annotations

import numpy as np

from refengine import ops
from refengine.backend.weights import StoredMatrix
from refengine.quantizer import LazyTensor, encoding


def stored_matrix(name: str, data: np.ndarray) -> StoredMatrix:
    """Rows of an encoding, uint8 [N, row_bytes], as products read them."""
    columns = encoding(name).row_weights(data.shape[1])
    tensor = LazyTensor("w", (len(data), columns), name, data)
    return StoredMatrix(tensor, np.dtype(np.float32), streamed=False)


def mixed8_product(name: str, data: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """y [T, N] of stored rows and float32 activations [T, K]."""
    return ops.linear_a8(ops.quantize_a8(x), stored_matrix(name, data), bias)
