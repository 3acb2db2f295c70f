"""The heavy half, imported when the backend is chosen."""

from types import MappingProxyType

import numpy as np

from refengine.backend.interpreter import InterpretedBackend


def rms_norm(x, weight, *, eps, out=None):
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis of `x[..., N]`, written into `out`."""
    if out is None:
        out = np.empty_like(x)
    squares = np.einsum("...n,...n->...", x, x)[..., None]
    np.divide(x, np.sqrt(squares / x.shape[-1] + eps), out=out)
    np.multiply(out, weight, out=out)
    return out


class OneOpBackend(InterpretedBackend):
    """Everything but `rms_norm` is left to the golden ops, where the user allows that."""

    name = "one-op"
    native = MappingProxyType({"rms_norm": rms_norm})
