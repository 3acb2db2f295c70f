"""From a Program to launches: which kernels compute it, in which order, over which addresses.

Instructions that follow each other are fused where one kernel does the work of several with the same bits:

- ``rms_norm`` and the ``quantize_a8`` that alone reads it
- ``linear_a8`` of the same codes, up to three (q, k and v; gate and up with ``gated`` and, of one token, the
  ``quantize_a8`` of that), and one with the ``add`` after it
- ``linear_a16`` likewise, with the ``rms_norm`` before them, where they alone read it
- ``rope`` of q and of k, and ``kv_write``; where each sequence of a step has one token, with ``attention``

A kernel that stands for several instructions runs where the last of them stands, when what the first has read
may have been given to another value: so none is fused whose result lies over what it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, Value
from refengine_cupy import attention, elementwise, half_products, products, sealed
from refengine_cupy.binding import Binding, operand
from refengine_cupy.launches import Emit
from refengine_cupy.runtime import Work
from refengine_cupy.step_shape import Places, StepShape
from refengine_cupy.streaming import Stretch, with_fetches
from refengine_cupy.turning import TurningAttention

EMITTERS: Mapping[str, Callable[[Binding, int, Instruction], Emit]] = MappingProxyType(
    {
        "embedding": elementwise.embedding,
        "take_rows": elementwise.take_rows,
        "add": elementwise.add,
        "gated": elementwise.gated,
        "scale": elementwise.scale,
        "softcap": elementwise.softcap,
        "rms_norm": elementwise.rms_norm,
        "quantize_a8": elementwise.quantize_a8,
        "rope_table": elementwise.rope_table,
        "rope": elementwise.rope,
        "linear": products.linear,
        "linear_a16": half_products.linear_a16,
        "kv_write": attention.kv_write,
        "attention": attention.attention,
        "kv_seal": sealed.kv_seal,
        "sealed_attention": sealed.sealed_attention,
    }
)
"""By op: what computes an instruction by itself, given its position."""

COMPUTED = frozenset({*EMITTERS, "linear_a8", "split_heads", "merge_heads"})
"""Ops that a Program may have; those of heads show other values, and take no kernels."""


class Lowering:
    """A Program's launches for steps of any shape.

    Args:
        binding: the program, and where everything of it is.

    Raises:
        UnsupportedError: a head is larger than attention's kernels can do.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding, self._program = binding, binding.program
        read = [v.index for i in self._program for v in i.operands if v is not None]
        self._uses = Counter([*read, self._program.output.index])
        self._emits: list[tuple[Emit, tuple[Stretch, ...]]] = []
        self._turning: list[TurningAttention] = []
        at = 0
        while (at := self._skip_views(at)) < len(self._program.instructions):
            emit, end = self._lower(at)
            instructions = self._program.instructions[at:end]
            passing = () if binding.passing is None else binding.passing.read_by(instructions)
            self._emits.append((emit, passing))
            at = end
        if binding.root(self._program.output) is not self._program.output:
            self._emits.append((partial(elementwise.copy_out, binding), ()))

    @property
    def rope_tables(self) -> Mapping[int, tuple[float, ...]]:
        """Frequencies of every ``rope_table``, by the position of its instruction."""
        return {
            at: tuple(i.attributes["frequencies"])  # type: ignore[arg-type]
            for at, i in enumerate(self._program)
            if i.op.name == "rope_table"
        }

    def launches(self, shape: StepShape, places: Places) -> list[Work]:
        """The launches of a step, and the copies of the weights that are streamed for them."""
        moved = dict(filter(None, (turning.moved(shape) for turning in self._turning)))
        places = replace(places, moved=moved)
        return with_fetches([(list(emit(shape, places)), passing) for emit, passing in self._emits])

    def _lower(self, at: int) -> tuple[Emit, int]:
        """What computes the instruction at a position, and perhaps those after it; and where it goes on."""
        products = (self._gated_products, self._products, self._half_products)
        for fuse in (self._norm_and_codes, *products, self._rope_and_write):
            if (fused := fuse(at)) is not None:
                return fused
        instruction = self._program.instructions[at]
        return EMITTERS[instruction.op.name](self._binding, at, instruction), at + 1

    def _skip_views(self, at: int) -> int:
        """The next position whose instruction computes something."""
        instructions = self._program.instructions
        while at < len(instructions) and instructions[at].op.sharing == "view":
            at += 1
        return at

    def _named(self, at: int, name: str) -> Instruction | None:
        if at >= len(self._program.instructions):
            return None
        instruction = self._program.instructions[at]
        return instruction if instruction.op.name == name else None

    def _only_use(self, value: Value) -> bool:
        return self._uses[value.index] == 1

    def _norm_and_codes(self, at: int) -> tuple[Emit, int] | None:
        norm = self._named(at, "rms_norm")
        if norm is None or len(norm.result.shape) != 2 or not self._only_use(norm.result):
            return None
        quantize = self._named(at + 1, "quantize_a8")
        if quantize is None or quantize.operands[0] is not norm.result:
            return None
        x, codes = operand(norm, 0), quantize.result
        if int(norm.result.shape[1]) > elementwise.MOST_CODED:
            return None
        if codes is self._program.output or not self._binding.apart(codes, x):
            return None
        return elementwise.norm(self._binding, norm, codes=codes), at + 2

    def _products(self, at: int) -> tuple[Emit, int] | None:
        first = self._named(at, "linear_a8")
        if first is None:
            return None
        positions, end = self._same_operand(at)
        parts = [self._program.instructions[position] for position in positions]
        if len(parts) == 1 and (add := self._named(end, "add")) is not None:
            x = self._residual(add, first)
            if x is not None and self._binding.apart(add.result, operand(first, 0)):
                return products.product(self._binding, parts, results=[add.result], residual=x), end + 1
        return products.product(self._binding, parts), end

    def _residual(self, add: Instruction, product: Instruction) -> Value | None:
        """What a sum adds to a product that it alone reads, where a result over it can be written at once."""
        x, y = add.operands
        if x is None or x is y or y is not product.result or not self._only_use(y):
            return None
        exact = self._binding.same_place(add.result, x)
        return x if exact or self._binding.apart(add.result, x) else None

    def _same_operand(self, at: int) -> tuple[list[int], int]:
        """Positions of up to three products that follow each other, of one activation and weights in one
        encoding; and where it goes on.
        """
        first = self._program.instructions[at]
        positions, end = [at], self._skip_views(at + 1)
        while len(positions) < 3 and (other := self._named(end, first.op.name)) is not None:
            alike = self._binding.weight(other).encoding == self._binding.weight(first).encoding
            if other.operands[0] is not first.operands[0] or not alike:
                break
            positions.append(end)
            end = self._skip_views(end + 1)
        return positions, end

    def _half_products(self, at: int) -> tuple[Emit, int] | None:
        """The last product's workspace takes the activations: all results, and what they are made of, are
        alive then, so that it lies apart from them.
        """
        norm = self._named(at, "rms_norm")
        start = at if norm is None else self._skip_views(at + 1)
        first = self._named(start, "linear_a16")
        if first is None:
            return None
        positions, end = self._same_operand(start)
        parts = [self._program.instructions[position] for position in positions]
        binding, workspace = self._binding, positions[-1]
        if norm is not None:
            fits = (
                norm.result is first.operands[0]
                and self._uses[norm.result.index] == len(parts)
                and half_products.can_norm(int(norm.result.shape[1]))
                and binding.clear(workspace, operand(norm, 0))
            )
            if not fits:
                return None
        if not binding.clear(workspace, *(part.result for part in parts)):
            return None if norm is not None else (half_products.linear_a16(binding, at, first), at + 1)
        emit = partial(half_products.HalfProduct, binding, workspace, parts, normed=norm)
        after = end if end < len(self._program.instructions) else None
        follower = None if after is None else self._program.instructions[after]
        if follower is None or not binding.clear(workspace, follower.result):
            return emit(), end
        gates = follower.operands == tuple(part.result for part in parts)
        if follower.op.name == "gated" and gates and all(self._only_use(part.result) for part in parts):
            return emit(gated=follower), end + 1
        if follower.op.name == "add" and len(parts) == 1 and (x := self._residual(follower, first)):
            return emit(results=[follower.result], residual=x), end + 1
        return emit(), end

    def _gated_products(self, at: int) -> tuple[Emit, int] | None:
        gate = self._named(at, "linear_a8")
        up_at = self._skip_views(at + 1)
        up = self._named(up_at, "linear_a8")
        gated = self._named(up_at + 1, "gated")
        if gate is None or up is None or gated is None:
            return None
        codes = operand(gate, 0)
        fits = (
            up.operands[0] is codes
            and self._binding.weight(gate).encoding == self._binding.weight(up).encoding
            and gated.operands == (gate.result, up.result)
            and self._only_use(gate.result)
            and self._only_use(up.result)
            and self._binding.apart(gated.result, codes)
        )
        if not fits:
            return None
        quantize = self._named(up_at + 2, "quantize_a8")
        if (
            quantize is not None
            and quantize.operands[0] is gated.result
            and self._only_use(gated.result)
            and int(gated.result.shape[1]) % GROUP == 0
            and quantize.result is not self._program.output
            and self._binding.apart(quantize.result, codes)
            and self._binding.apart(quantize.result, gated.result)
        ):
            return products.product(self._binding, [gate, up], gated=gated, quantize=quantize), up_at + 3
        return products.product(self._binding, [gate, up], gated=gated), up_at + 2

    def _rope_and_write(self, at: int) -> tuple[Emit, int] | None:
        q, k = self._named(at, "rope"), self._named(at + 1, "rope")
        write = self._named(at + 2, "kv_write")
        if q is None or k is None or write is None:
            return None
        size = q.result.shape[2]
        fits = (
            write.operands[1] is k.result
            and self._only_use(k.result)
            and q.operands[1] is k.operands[1]
            and q.attributes == k.attributes
            and int(size) % 2 == 0
        )
        if not fits:
            return None
        source, v, table = operand(q, 0), operand(write, 2), operand(q, 1)
        same = self._binding.same_place(q.result, self._binding.root(source))
        if not (same or self._binding.apart(q.result, source)):
            return None
        if not self._binding.apart(q.result, operand(k, 0), v, table):
            return None
        after = self._skip_views(at + 3)
        reader = self._named(after, "attention")
        if (
            reader is not None
            and reader.operands[0] is q.result
            and reader.operands[1] is write.result
            and self._only_use(q.result)
        ):
            turning = TurningAttention(self._binding, after, q, k, write, reader)
            self._turning.append(turning)
            return turning, after + 1
        return attention.rope_write(self._binding, q, k, write), at + 3
