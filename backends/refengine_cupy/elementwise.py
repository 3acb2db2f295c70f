"""Launches of ops that go number by number or row by row: kernels of ``elementwise.cu``."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, prod

from refengine.errors import UnsupportedError
from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, Value, concrete
from refengine_cupy.binding import Binding, operand, plane_addresses
from refengine_cupy.launches import Emit, elementwise_kernel, launch, over
from refengine_cupy.packing import LAYOUTS
from refengine_cupy.runtime import Launch
from refengine_cupy.source import Kernel
from refengine_cupy.step_shape import Places, StepShape

NORMS = {
    Kernel("elementwise", "norm_512", "Norm", 32): 512,
    Kernel("elementwise", "norm_8192", "Norm", 256): 8192,
    Kernel("elementwise", "norm_32768", "Norm", 1024): 32768,
    Kernel("elementwise", "norm_any", "Norm", 32): inf,
}
"""Kernels of ``rms_norm``, with the most columns that each takes; all but the last take whole groups."""

NORMS_OF_HALVES = {
    Kernel("elementwise", "norm_halves_8192", "Norm", 256): 8192,
    Kernel("elementwise", "norm_halves_32768", "Norm", 1024): 32768,
}
"""Likewise, of those that give rows of float16."""

TOKEN_NORM = range(512 + GROUP, 8192 + GROUP, GROUP)
"""Columns of the norm whose bits products of one token give themselves: of ``norm_8192``."""

MOST_CODED = 32768
"""Columns up to which a norm can give codes."""


def embedding(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Rows of a table, decoded."""
    rows, table = operand(instruction, 0), binding.weight(instruction)
    kernel = Kernel("elementwise", f"embedding_{table.encoding}", "LookUp", 128)
    columns = table.shape[1]
    each = columns // GROUP if table.encoding in LAYOUTS else columns

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        count = concrete(instruction.result.shape, shape.sizes)[0]
        yield over(
            count * each, 128, kernel, rows=binding.address(rows, places),
            y=binding.address(instruction.result, places), count=count, columns=columns,
            **plane_addresses(table),
        )  # fmt: skip

    return emit


def take_rows(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Rows of activations."""
    x, rows = operand(instruction, 0), operand(instruction, 1)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        count, columns = concrete(instruction.result.shape, shape.sizes)
        yield over(
            count * columns, 256, elementwise_kernel("take_rows", "TakeRows"), x=binding.address(x, places),
            rows=binding.address(rows, places), y=binding.address(instruction.result, places),
            count=count, columns=columns,
        )  # fmt: skip

    return emit


def add(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """A sum."""
    return _binary(binding, "add", instruction)


def gated(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """One half of a gated network's activations, through the activation, times the other."""
    return _binary(binding, f"gated_{instruction.attributes['activation']}", instruction)


def _binary(binding: Binding, kernel: str, instruction: Instruction) -> Emit:
    x, y = operand(instruction, 0), operand(instruction, 1)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        count = prod(concrete(instruction.result.shape, shape.sizes))
        yield over(
            count, 256, elementwise_kernel(kernel, "Binary"), x=binding.address(x, places),
            y=binding.address(y, places), z=binding.address(instruction.result, places), count=count,
        )  # fmt: skip

    return emit


def scale(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """A product with a number."""
    return _unary(binding, "scale", instruction, _number(instruction, "factor"))


def softcap(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Capped smoothly."""
    return _unary(binding, "softcap", instruction, _number(instruction, "cap"))


def _unary(binding: Binding, kernel: str, instruction: Instruction, parameter: float) -> Emit:
    x = operand(instruction, 0)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        count = prod(concrete(instruction.result.shape, shape.sizes))
        yield over(
            count, 256, elementwise_kernel(kernel, "Unary"), x=binding.address(x, places),
            y=binding.address(instruction.result, places), count=count, parameter=parameter,
        )  # fmt: skip

    return emit


def rms_norm(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """A norm."""
    return norm(binding, instruction, y=instruction.result)


def norm(
    binding: Binding,
    instruction: Instruction,
    *,
    y: Value | None = None,
    codes: Value | None = None,
    halves: tuple[int, int, bool] | None = None,
) -> Emit:
    """A norm, into floats, codes, or rows of float16: addresses of these and of their powers are given, and
    whether they go into panels.
    """
    x, weight = operand(instruction, 0), binding.weight(instruction)
    columns = weight.shape[0]
    kernels = NORMS if halves is None else NORMS_OF_HALVES
    kernel = next(
        k for k, most in kernels.items() if columns <= most and (columns % GROUP == 0 or most == inf)
    )
    rounded, powers, panels = (None, None, False) if halves is None else halves

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        rows = prod(concrete(instruction.result.shape, shape.sizes)) // columns
        code, scalars = (None, None) if codes is None else binding.codes(codes, shape, places)
        if rows:
            yield launch(
                kernel, (rows, 1, 1), x=binding.address(x, places), weight=weight.address,
                y=None if y is None else binding.address(y, places), codes=code, scalars=scalars,
                halves=rounded, powers=powers, columns=columns, panels=int(panels),
                epsilon=_number(instruction, "eps"),
            )  # fmt: skip

    return emit


def quantize_a8(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Codes of activations: in planes, or as records where they are the program's result."""
    x = operand(instruction, 0)
    records = instruction.result is binding.program.output
    kernel = Kernel("elementwise", "quantize_a8_records" if records else "quantize_a8", "Quantize", 256)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        rows, groups, _ = concrete(instruction.result.shape, shape.sizes)
        codes, scalars = binding.codes(instruction.result, shape, places)
        yield over(
            rows * groups * 8, 256, kernel, x=binding.address(x, places), codes=codes, scalars=scalars,
            groups=rows * groups,
        )  # fmt: skip

    return emit


def rope_table(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Cosines and sines of a step's positions."""
    positions, pairs = operand(instruction, 0), int(instruction.result.shape[1]) // 2
    kernel = Kernel("elementwise", "rope_table", "RopeTable", 128)

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        count = shape.tokens
        yield over(
            count * pairs, 128, kernel, positions=binding.address(positions, places),
            frequencies=places.frequencies[at], table=binding.address(instruction.result, places),
            magnitude=float(instruction.attributes.get("magnitude", 1.0)),  # type: ignore[arg-type]
            count=count, pairs=pairs,
        )  # fmt: skip

    return emit


def rope(binding: Binding, at: int, instruction: Instruction) -> Emit:
    """Heads, turned."""
    x, table = operand(instruction, 0), operand(instruction, 1)
    _, heads, size = instruction.result.shape
    if int(size) > 1024:
        raise UnsupportedError(f"backend 'cupy' rotates heads of at most 1024 elements, not {size}")

    def emit(shape: StepShape, places: Places) -> Iterable[Launch]:
        yield launch(
            Kernel("elementwise", "rope", "Turn", 256),
            (shape.tokens, 1, 1),
            x=binding.address(x, places),
            table=binding.address(table, places),
            y=binding.address(instruction.result, places),
            heads=int(heads),
            size=int(size),
            dims=int(table.shape[1]),
            halves=int(instruction.attributes["pairing"] == "halves"),
        )

    return emit


def copy_out(binding: Binding, shape: StepShape, places: Places) -> Iterable[Launch]:
    """The program's result, where that is a view of something that lies elsewhere."""
    output = binding.program.output
    count = prod(concrete(output.shape, shape.sizes))
    source = binding.address(output, places)
    yield over(
        count, 256, elementwise_kernel("copy", "Unary"), x=source, y=places.output, count=count, parameter=0.0
    )


def _number(instruction: Instruction, name: str) -> float:
    return float(instruction.attributes[name])  # type: ignore[arg-type]
