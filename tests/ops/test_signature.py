"""Signatures say what an op takes and gives, and infer the one from the other."""

from __future__ import annotations

import pytest

from refengine.ops import OPS, ShapeError
from refengine.ops.signature import parse_signature


@pytest.mark.parametrize(
    ("text", "shapes", "attributes", "expected"),
    [
        ("x[T, K], w[N, K] -> [T, N]", [("T", 8), (3, 8)], {}, ("T", 3)),
        ("x[T, K], w[N, K], b[N]? -> [T, N]", [("T", 8), (3, 8), None], {}, ("T", 3)),
        ("x[..., N], w[N] -> [..., N]", [("T", 4, 16), (16,)], {}, ("T", 4, 16)),
        ("x[T, N] -> [T, heads, N/heads]", [("T", 12)], {"heads": 3}, ("T", 3, 4)),
        ("x[T, H, D] -> [T, H*D]", [("T", 3, 4)], {}, ("T", 12)),
        ("p[T] -> [T, 2]", [("T",)], {}, ("T", 2)),
        ("x[T, K] -> [T, K/32, 48]", [("T", 64)], {}, ("T", 2, 48)),
        ("c[T, K/32, 48], w[N, K] -> [T, N]", [("T", 2, 48), (5, 64)], {}, ("T", 5)),
    ],
)
def test_infers_the_result(text: str, shapes: list, attributes: dict, expected: tuple) -> None:
    """Each word is one size throughout; products, quotients and attributes resolve."""
    assert parse_signature(text).infer("op", shapes, attributes) == expected


@pytest.mark.parametrize(
    ("text", "shapes", "attributes"),
    [
        ("x[T, K], w[N, K] -> [T, N]", [("T", 8), (3, 9)], {}),
        ("x[T, K], w[N, K] -> [T, N]", [("T", 8)], {}),
        ("x[T, K] -> [T]", [("T", 8), ("T", 8)], {}),
        ("x[T, K] -> [T]", [("T",)], {}),
        ("x[..., N], y[..., N] -> [..., N]", [("T", 4), ("R", 4)], {}),
        ("x[T, N] -> [T, heads, N/heads]", [("T", 13)], {"heads": 3}),
        ("x[T, N] -> [T, heads, N/heads]", [("T", 12)], {"heads": 0}),
        ("x[T, 2] -> [T]", [("T", 3)], {}),
        ("c[T, K/32, 48], w[N, K] -> [T, N]", [("T", 3, 48), (5, 64)], {}),
        ("c[T, K/32, 48], w[N, K] -> [T, N]", [("T", 2, 48), (5, 65)], {}),
        ("x[T, K] -> [T, K/32, 48]", [("T", 65)], {}),
    ],
)
def test_refuses_what_does_not_fit(text: str, shapes: list, attributes: dict) -> None:
    """Sizes that disagree, operands too many or too few, and quotients that leave a rest are errors."""
    with pytest.raises(ShapeError, match="op"):
        parse_signature(text).infer("op", shapes, attributes)


@pytest.mark.parametrize("text", ["x[T]", "x[T] -> T", "x[T] y[T] -> [T]", "x -> [T]"])
def test_refuses_a_malformed_declaration(text: str) -> None:
    """A declaration that does not parse is an error at once."""
    with pytest.raises(ValueError, match="malformed"):
        parse_signature(text)


def test_every_op_names_its_operands_as_its_function_does() -> None:
    """The signature's operands are the golden function's first parameters, in order."""
    for op in OPS.values():
        code = op.golden.__code__
        names = code.co_varnames[: code.co_argcount]
        assert names == tuple(operand.name for operand in op.signature.operands), op.name
