"""Instructions that one kernel may compute together, found in a Program alone: plans are made for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from refengine.ops.linear_a8 import GROUP
from refengine.program import Instruction, Program, Value
from refengine_cupy.binding import operand
from refengine_cupy.elementwise import MOST_CODED
from refengine_cupy.half_products import can_norm


@dataclass(frozen=True)
class Products:
    """Products of the same activations, and what is computed with them.

    Attributes:
        positions: of up to three products with weights in one encoding.
        parts: the products.
        end: the position after the last of them, views of it left out.
        norm: before them; they alone read it.
        gated: after them; it alone reads the two of them.
        added: the sum after the one product that alone reads it, of something and the product.
        coded: codes of ``gated``, which they alone read, after it.
    """

    positions: tuple[int, ...]
    parts: tuple[Instruction, ...]
    end: int
    norm: Instruction | None = None
    gated: Instruction | None = None
    added: Instruction | None = None
    coded: Instruction | None = None

    @property
    def activations(self) -> Value:
        """What is multiplied."""
        return operand(self.parts[0], 0)

    @property
    def source(self) -> Value:
        """What is rounded, or normalised and rounded."""
        return self.activations if self.norm is None else operand(self.norm, 0)

    @property
    def last(self) -> int:
        """Position of the last instruction before ``coded``."""
        return self.positions[-1] if self.follower is None else self.end

    @property
    def follower(self) -> Instruction | None:
        """What is computed after the products, and before ``coded``."""
        return self.gated or self.added


class Patterns:
    """What there is to fuse in a Program.

    Args:
        program: what is computed.
        encoding: tells in which encoding the device holds the weight that an instruction reads.
    """

    def __init__(self, program: Program, encoding: Callable[[Instruction], str]) -> None:
        self._program, self._encoding = program, encoding
        read = [v.index for i in program for v in i.operands if v is not None]
        self._uses = Counter([*read, program.output.index])
        self._shown = {i.result.index: operand(i, 0) for i in program if i.op.sharing in ("view", "state")}

    def skip_views(self, at: int) -> int:
        """The next position whose instruction computes something."""
        instructions = self._program.instructions
        while at < len(instructions) and instructions[at].op.sharing == "view":
            at += 1
        return at

    def named(self, at: int, name: str) -> Instruction | None:
        """The instruction at a position, if it is of that name."""
        if at >= len(self._program.instructions):
            return None
        instruction = self._program.instructions[at]
        return instruction if instruction.op.name == name else None

    def uses(self, value: Value) -> int:
        """How often a value is read; to be the program's result is one use."""
        return self._uses[value.index]

    def norm_and_codes(self, at: int) -> tuple[Instruction, Instruction] | None:
        """A norm at a position, and the codes that alone are made of it, after it."""
        norm, quantize = self.named(at, "rms_norm"), self.named(at + 1, "quantize_a8")
        if norm is None or len(norm.result.shape) != 2 or self.uses(norm.result) != 1 or quantize is None:
            return None
        fits = quantize.operands[0] is norm.result and int(norm.result.shape[1]) <= MOST_CODED
        return (norm, quantize) if fits and quantize.result is not self._program.output else None

    def half_products(self, at: int) -> Products | None:
        """Products of float16 numbers that begin at a position, with a norm there or without one."""
        norm = self.named(at, "rms_norm")
        found = self._products(at if norm is None else self.skip_views(at + 1), "linear_a16")
        if found is None:
            return None
        if norm is not None:
            alone = self.uses(norm.result) == len(found.parts) and norm.result is found.activations
            if not (alone and can_norm(int(norm.result.shape[1]))):
                return None
            found = replace(found, norm=norm)
        return self._with_follower(found)

    def normed_products(self, at: int) -> Products | None:
        """Products of the codes that are made of a norm at a position, and that nothing else reads."""
        made = self.norm_and_codes(at)
        found = None if made is None else self.coded_products(at + 2)
        if made is None or found is None or found.activations is not made[1].result:
            return None
        return replace(found, norm=made[0]) if self.uses(found.activations) == len(found.parts) else None

    def coded_products(self, at: int) -> Products | None:
        """Products of codes that begin at a position."""
        found = self._products(at, "linear_a8")
        if found is None:
            return None
        found = self._with_follower(found)
        coded = self.named(found.end + 1, "quantize_a8")
        if found.gated is None or coded is None or coded.operands[0] is not found.gated.result:
            return found
        whole = int(found.gated.result.shape[1]) % GROUP == 0 and self.uses(found.gated.result) == 1
        return replace(found, coded=coded) if whole and coded.result is not self._program.output else found

    def root(self, value: Value) -> Value:
        """What a value is a view of in the end, or itself."""
        while value.index in self._shown:
            value = self._shown[value.index]
        return value

    def is_free(self, value: Value, after: int) -> bool:
        """Whether a value lies in the arena, and no instruction after a position reads it or a view of it."""
        root, output = self.root(value), self._program.output
        later = self._program.instructions[after + 1 :]
        read = [v for i in later if i.op.sharing != "view" for v in i.operands if v is not None]
        return root.kind == "result" and not any(self.root(v) is root for v in [*read, output])

    def _products(self, at: int, name: str) -> Products | None:
        """Up to three products of an op that follow each other, of one activation."""
        first = self.named(at, name)
        if first is None:
            return None
        positions, end = [at], self.skip_views(at + 1)
        while len(positions) < 3 and (other := self.named(end, name)) is not None:
            alike = self._encoding(other) == self._encoding(first)
            if other.operands[0] is not first.operands[0] or not alike:
                break
            positions.append(end)
            end = self.skip_views(end + 1)
        parts = tuple(self._program.instructions[position] for position in positions)
        return Products(tuple(positions), parts, end)

    def _with_follower(self, found: Products) -> Products:
        """With what is gated, or a sum, that comes next and alone reads the products."""
        results = tuple(part.result for part in found.parts)
        if not all(self.uses(result) == 1 for result in results):
            return found
        gated, add = self.named(found.end, "gated"), self.named(found.end, "add")
        if gated is not None and gated.operands == results:
            return replace(found, gated=gated)
        if add is not None and len(results) == 1 and add.operands[1] is results[0]:
            return replace(found, added=add)
        return found
