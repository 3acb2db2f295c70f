"""What is fused wherever values lie, told to the planner: so that places are right for it, and none is
planned for what is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

from refengine.program import Fusion, Instruction, Program, concrete
from refengine_cupy.binding import operand
from refengine_cupy.half_products import gates_alone, rounded_bytes
from refengine_cupy.opened_products import ALIGNMENT, opened_bytes
from refengine_cupy.packing import held_as
from refengine_cupy.patterns import Patterns, Products
from refengine_cupy.products import Units, gated_bytes


class Fusions:
    """Instructions of a Program that are launched as one.

    Args:
        program: what is computed.
        sizes: the most there may be of T, S and R.
        encodings: of weights as stored, by role.
        units: what the device has.
    """

    def __init__(
        self, program: Program, sizes: Mapping[str, int], encodings: Mapping[str, str], units: Units
    ) -> None:
        self._program, self._sizes, self._units = program, sizes, units
        self._encoding: Callable[[Instruction], str] = lambda i: held_as(encodings[operand(i, 1).name])
        self._patterns = Patterns(program, self._encoding)

    def __iter__(self) -> Iterator[Fusion]:
        at = 0
        while at < len(self._program):
            fusion = self._coded_products(at) or self._norm(at) or self._half_products(at)
            if fusion is not None:
                yield fusion
            at = at + 1 if fusion is None else fusion.last + 1

    def _norm(self, at: int) -> Fusion | None:
        found = self._patterns.norm_and_codes(at)
        return None if found is None else Fusion(at, at + 1, frozenset({found[0].result.index}))

    def _half_products(self, at: int) -> Fusion | None:
        found = self._patterns.half_products(at)
        if found is None:
            return None
        last = found.last
        tokens, columns = concrete(found.activations.shape, self._sizes)
        workspace = rounded_bytes(tokens, columns)
        if self._units.warpgroups:
            rows = sum(int(operand(part, 1).shape[0]) for part in found.parts)
            opened = opened_bytes(rows, columns, tokens)
            if self._freed(found, last) + ALIGNMENT < opened:
                workspace += opened
        unwritten = set() if found.norm is None else {found.norm.result.index}
        encoding = self._encoding(found.parts[0])
        if found.added is not None or (found.gated and gates_alone(encoding, tokens, self._units)):
            unwritten |= {part.result.index for part in found.parts}
        return Fusion(at, last, frozenset(unwritten), workspace)

    def _freed(self, found: Products, last: int) -> int:
        """Bytes of what is rounded, where nobody needs it then."""
        patterns, source = self._patterns, found.source
        residual = None if found.added is None else operand(found.added, 0)
        if residual is not None and patterns.root(residual) is patterns.root(source):
            return 0
        return 4 * prod(concrete(source.shape, self._sizes)) if patterns.is_free(source, last) else 0

    def _coded_products(self, at: int) -> Fusion | None:
        found = self._patterns.normed_products(at) or self._patterns.coded_products(at)
        if found is None:
            return None
        unwritten = frozenset[int]() if found.norm is None else frozenset({found.norm.result.index})
        if found.follower is None:
            return Fusion(at, found.last, unwritten)
        unwritten |= {part.result.index for part in found.parts}
        if found.gated is None:
            return Fusion(at, found.last, unwritten)
        tokens = concrete(found.activations.shape, self._sizes)[0]
        workspace = gated_bytes(int(found.gated.result.shape[1]), tokens, self._units)
        return Fusion(at, found.last + (found.coded is not None), unwritten, workspace, found.last)
