"""What is told of weights from their bytes is what their decoded values say."""

from __future__ import annotations

import numpy as np
import pytest

from refengine.quantizer import ENCODINGS, decode
from refengine.quantizer.finite import HALVES, all_finite, fit_float16


@pytest.mark.parametrize("name", ENCODINGS)
def test_any_bytes_are_judged_as_they_decode(name: str) -> None:
    """Rows of any bits, one or two blocks long: many hold scales that are infinite, NaN or very large."""
    rng, stored, seen = np.random.default_rng(0), ENCODINGS[name], set()
    for _ in range(400):
        data = rng.integers(0, 256, (1, stored.block_bytes * rng.integers(1, 3)), dtype=np.uint8)
        for at, _ in HALVES.get(name, ()):
            data[0, at + 1] &= rng.choice([0x3F, 0x7B, 0xFF])  # small, finite, any
        numbers = decode(name, data)
        assert all_finite(name, data) == np.isfinite(numbers).all()
        if np.isfinite(numbers).all():
            with np.errstate(over="ignore"):
                fits = bool(np.isfinite(numbers.astype(np.float16)).all())
            assert fit_float16(name, data) == fits
            seen.add(fits)
    assert True in seen


def test_the_middle_between_the_largest_float16_and_the_next_does_not_fit() -> None:
    """It is rounded to infinity, which is the even one; the number below it is not."""
    for number, fits in ((65520.0, False), (float(np.nextafter(np.float32(65520), 0)), True)):
        for sign in (1, -1):
            assert fit_float16("f32", np.array([[sign * number]], "<f4").view(np.uint8)) == fits
