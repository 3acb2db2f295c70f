"""From a Program to launches: which kernels compute it, in which order, over which addresses.

Instructions that follow each other are fused where one kernel does the work of several with the same bits:

- ``rms_norm`` and the ``quantize_a8`` that alone reads it; of one token, with the ``linear_a8`` after it that
  alone read that
- ``linear_a8`` of the same codes, up to three (q, k and v; gate and up with ``gated`` and, of one token, the
  ``quantize_a8`` of that), and one with the ``add`` after it
- ``linear_a16`` likewise, with the ``rms_norm`` before them, where they alone read it
- ``rope`` of q and of k, and ``kv_write``; where each sequence of a step has one token, with ``attention``

A kernel that stands for several instructions runs where the last of them stands, when what the first has read
may have been given to another value: so none is fused whose result lies over what it reads. A plan that knows
of fusions (``fusions.py``) lays nothing so, and has no places for what these do not write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from refengine.program import Instruction
from refengine_cupy import attention, elementwise, half_products, products, sealed
from refengine_cupy.binding import Binding, operand
from refengine_cupy.launches import Emit
from refengine_cupy.patterns import Patterns
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
        self._patterns = Patterns(binding.program, lambda instruction: binding.weight(instruction).encoding)
        self._planned = {fusion.first for fusion in binding.plan.fusions}
        self._emits: list[tuple[Emit, tuple[Stretch, ...]]] = []
        self._turning: list[TurningAttention] = []
        at = 0
        while (at := self._patterns.skip_views(at)) < len(self._program.instructions):
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
        products = (self._half_products, self._coded_products)
        for fuse in (*products, self._norm_and_codes, self._rope_and_write):
            if (fused := fuse(at)) is not None:
                return fused
        instruction = self._program.instructions[at]
        return EMITTERS[instruction.op.name](self._binding, at, instruction), at + 1

    def _norm_and_codes(self, at: int) -> tuple[Emit, int] | None:
        found = self._patterns.norm_and_codes(at)
        if found is None or not self._binding.apart(found[1].result, operand(found[0], 0)):
            return None
        return elementwise.norm(self._binding, found[0], codes=found[1].result), at + 2

    def _coded_products(self, at: int) -> tuple[Emit, int] | None:
        found = self._patterns.normed_products(at) or self._patterns.coded_products(at)
        if found is None:
            return None
        codes, parts, apart = found.activations, found.parts, self._binding.apart
        if found.norm is not None and not apart(codes, found.source):
            return None
        emit = partial(products.product, self._binding, parts, normed=found.norm)
        if (gated := found.gated) is not None and apart(gated.result, codes):
            coded, placed = found.coded, self._binding.has_place(parts[0].result)
            workspace = None if placed else self._binding.plan.workspaces.get(at)
            emit = partial(emit, gated=gated, workspace=workspace)
            if coded is not None and apart(coded.result, codes, gated.result):
                return emit(quantize=coded), found.end + 2
            return emit(), found.end + 1
        if (added := found.added) is not None and self._takes_sum(added) and apart(added.result, codes):
            return emit(results=[added.result], residual=operand(added, 0)), found.end + 1
        return emit(), found.end

    def _half_products(self, at: int) -> tuple[Emit, int] | None:
        """Where no places are planned for what is fused, the last product's workspace takes the activations:
        all results, and what they are made of, are alive then, so that it lies apart from them.
        """
        found = self._patterns.half_products(at)
        if found is None:
            return None
        binding, parts, norm = self._binding, found.parts, found.norm
        workspace = at if at in self._planned else found.positions[-1]
        if norm is not None and not binding.clear(workspace, found.source):
            return None
        if not binding.clear(workspace, *(p.result for p in parts)):
            return None if norm is not None else (half_products.linear_a16(binding, at, parts[0]), at + 1)
        emit = partial(half_products.HalfProduct, binding, workspace, parts, normed=norm)
        if found.follower is None or not binding.clear(workspace, found.follower.result):
            return emit(), found.end
        if found.gated is not None:
            return emit(gated=found.gated), found.end + 1
        if found.added is not None and self._takes_sum(found.added):
            return emit(results=[found.added.result], residual=operand(found.added, 0)), found.end + 1
        return emit(), found.end

    def _takes_sum(self, add: Instruction) -> bool:
        """Whether a sum of something and a product can be written where the product is computed."""
        x = operand(add, 0)
        return self._binding.same_place(add.result, x) or self._binding.apart(add.result, x)

    def _rope_and_write(self, at: int) -> tuple[Emit, int] | None:
        named, uses = self._patterns.named, self._patterns.uses
        q, k, write = named(at, "rope"), named(at + 1, "rope"), named(at + 2, "kv_write")
        if q is None or k is None or write is None:
            return None
        size = q.result.shape[2]
        fits = (
            write.operands[1] is k.result
            and uses(k.result) == 1
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
        after = self._patterns.skip_views(at + 3)
        reader = named(after, "attention")
        if (
            reader is not None
            and reader.operands[0] is q.result
            and reader.operands[1] is write.result
            and uses(q.result) == 1
        ):
            turning = TurningAttention(self._binding, after, q, k, write, reader)
            self._turning.append(turning)
            return turning, after + 1
        return attention.rope_write(self._binding, q, k, write), at + 3
