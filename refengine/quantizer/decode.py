"""From stored bytes to float32 weights: one entry for every encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.quantizer import affine, classic, encodings, iq4, k_quants, mxfp4, plain
from refengine.quantizer.encodings import Encoding

CHUNK_WEIGHTS = 65_536
"""Weights decoded at a time: 256 KiB of output, so that a chunk stays in cache through all of its passes."""

Decoder = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]
"""Reads blocks [n, block_bytes] and fills weights [n, block_size]; both C-contiguous."""

DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "f32": plain.f32,
        "f16": plain.f16,
        "bf16": plain.bf16,
        "q4_0": classic.q4_0,
        "q4_1": classic.q4_1,
        "q5_0": classic.q5_0,
        "q5_1": classic.q5_1,
        "q8_0": classic.q8_0,
        "q2_k": k_quants.q2_k,
        "q3_k": k_quants.q3_k,
        "q4_k": k_quants.q4_k,
        "q5_k": k_quants.q5_k,
        "q6_k": k_quants.q6_k,
        "iq4_nl": iq4.iq4_nl,
        "iq4_xs": iq4.iq4_xs,
        "mxfp4": mxfp4.mxfp4,
        "int4_g32": affine.int4,
        "int4_g64": affine.int4,
        "int4_g128": affine.int4,
        "int8_g32": affine.int8,
        "int8_g64": affine.int8,
        "int8_g128": affine.int8,
    }
)
"""The golden decoder of every encoding in :data:`refengine.quantizer.ENCODINGS`; immutable."""


def decode(
    encoding: str, data: NDArray[np.uint8], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The weights stored in ``data``: uint8 [..., row_bytes] -> float32 [..., row_weights].

    The bits are those the encoding's module specifies; scales that are not finite give weights that are not,
    without a warning. Memory used beside ``out`` stays under 1 MiB, however large ``data`` is.

    Args:
        encoding: a name in :data:`refengine.quantizer.ENCODINGS`.
        data: stored bytes; the last axis holds whole blocks. Need not be contiguous.
        out: where to write, C-contiguous; a new array if ``None``. It must not overlap ``data``.

    Returns:
        ``out``, or the new array; never a view of ``data``.

    Raises:
        UnsupportedError: no encoding has this name.
        ValueError: ``data`` is not uint8 or not whole blocks; or ``out`` is not float32, of the decoded
            shape, C-contiguous and writeable.

    Clauses: ENC-1, CNV-10.
    """
    stored = encodings.encoding(encoding)
    if data.dtype != np.uint8 or data.ndim == 0:
        raise ValueError(f"{encoding}: data must be uint8 [..., bytes], not {data.dtype} {list(data.shape)}")
    shape = (*data.shape[:-1], stored.row_weights(data.shape[-1]))
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.dtype != np.float32 or out.shape != shape:
        raise ValueError(f"{encoding}: out must be float32 {list(shape)}, not {out.dtype} {list(out.shape)}")
    elif not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"{encoding}: out must be C-contiguous and writeable")
    with np.errstate(all="ignore"):
        _decode_into(stored, data, out)
    return out


def _decode_into(stored: Encoding, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decode whole chunks of blocks; where ``data`` has gaps, slice by slice of its first axis."""
    if data.ndim > 1 and not data.flags.c_contiguous:
        for data_slice, out_slice in zip(data, out, strict=True):
            _decode_into(stored, data_slice, out_slice)
        return
    blocks = data.reshape(-1, stored.block_bytes)
    weights = out.reshape(-1, stored.block_size)
    step = CHUNK_WEIGHTS // stored.block_size
    for start in range(0, len(blocks), step):
        chunk = np.ascontiguousarray(blocks[start : start + step])
        DECODERS[stored.name](chunk, weights[start : start + step])
