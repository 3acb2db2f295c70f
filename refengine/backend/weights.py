"""Weights under a limit: which are decoded for good, and which are read where they lie in the file.

A weight is held in one of three ways:

``decoded``
    as numbers in the policy's dtype: fastest. Its pages of the file are given back.
``mapped``
    as stored, its pages of the file in memory: each use decodes it tile by tile.
``streamed``
    as stored, with the pages of one tile in memory at a time: each use reads it anew, from the system's file
    cache where there is room for that, else from the disk. So a model runs that is larger than the limit.

All three give the same bits: ``linear`` goes by the same tiles in each case. Matrices that products of the
mixed policies read are never decoded for good: these take the stored integers, or round what they decode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from refengine.ops import FloatArray, IndexArray
from refengine.ops.linear import tile_rows
from refengine.ops.linear_a8 import Groups
from refengine.ops.scratch import Scratch
from refengine.program import Policy, Program
from refengine.quantizer import GROUP, LazyTensor, decode, has_offsets, read_groups
from refengine.quantizer.decode import CHUNK_WEIGHTS
from refengine.quantizer.finite import not_finite

Holding = Literal["decoded", "mapped", "streamed", "repacked", "pinned"]

LOOKUP_ROWS = 64
"""Rows of a streamed table that are looked up at a time: each may bring a window of pages of its own."""


@dataclass(frozen=True)
class PlannedWeight:
    """How one weight is held.

    Attributes:
        encoding: as it is stored.
        stored: its bytes in the file.
        holding: ``decoded``, ``mapped``, ``streamed``; or ``repacked``, in a form of the backend's own; or
            ``pinned``, in such a form in the host's memory, where a device reads the rows that it needs.
        nbytes: bytes that this takes: decoded, repacked or stored, or of the largest tile; of a device's
            memory, where it has its own: of what is streamed, the bytes that pass at once.
        host: bytes of the host's memory, beside a device that has its own.
    """

    encoding: str
    stored: int
    holding: Holding
    nbytes: int
    host: int = 0


@dataclass(frozen=True)
class WeightPlan:
    """How a program's weights are held.

    Attributes:
        weights: by role, in the order in which a step first uses them.
        passage: bytes that streamed weights pass through; ``None`` for those of the largest tile.
    """

    weights: Mapping[str, PlannedWeight]
    passage: int | None = None

    @property
    def held(self) -> int:
        """Bytes of decoded and repacked weights."""
        own = ("decoded", "repacked")
        return sum(weight.nbytes for weight in self.weights.values() if weight.holding in own)

    @property
    def mapped(self) -> int:
        """Bytes of the file that stay in memory."""
        return sum(weight.nbytes for weight in self.weights.values() if weight.holding == "mapped")

    @property
    def streamed(self) -> int:
        """Bytes that the others pass through: one tile at a time, so those of the largest; or ``passage``."""
        if self.passage is not None:
            return self.passage
        sizes = (weight.nbytes for weight in self.weights.values() if weight.holding == "streamed")
        return max(sizes, default=0)

    @property
    def total(self) -> int:
        """Bytes of all weights, where a step reads them: on the device, if that has memory of its own."""
        return self.held + self.mapped + self.streamed

    @property
    def host(self) -> int:
        """Bytes of the host's memory, beside a device that has its own."""
        return sum(weight.host for weight in self.weights.values())


def plan_weights(
    program: Program, weights: Mapping[str, LazyTensor], policy: Policy, limit: int | None = None
) -> WeightPlan:
    """Choose how each weight of a Program is held, so that all together take ``limit`` bytes at most.

    Without a limit everything is decoded but the tables that are only looked up and the matrices of mixed
    products, which are mapped. Under one, vectors are decoded; then matrices, then tables, are mapped in the
    order of the program for as long as there is room, and the rest is streamed; what room is left goes to
    decoding mapped matrices, but those of mixed products. Where the limit is too small, everything is
    streamed that can be, and the total shows what is needed.

    The choice is made once. A step uses every weight in turn, and the next step again: a cache that throws
    out what was used longest ago throws out what is needed next, and never hits. A fixed set always hits.

    Args:
        weights: by role; those of the program at least.
        limit: bytes; ``None`` for any number.

    Clauses: BCK-15, BCK-16, MIX-12.
    """
    itemsize = policy.activations.itemsize
    tables, stay_stored = _tables(program), _read_as_stored(program)
    used = {leaf.name: weights[leaf.name] for leaf in program.leaves if leaf.kind == "weight"}
    planned = {role: _smallest(tensor, itemsize, role in tables) for role, tensor in used.items()}
    streamed = [role for role, weight in planned.items() if weight.holding == "streamed"]
    matrices = [role for role in streamed if role not in tables]
    tables_last = (*matrices, *(role for role in streamed if role in tables))
    _hold(planned, "mapped", {role: used[role].nbytes for role in tables_last}, limit)
    mapped = [r for r in matrices if planned[r].holding == "mapped" and r not in stay_stored]
    _hold(planned, "decoded", {role: used[role].size * itemsize for role in mapped}, limit)
    return WeightPlan(MappingProxyType(planned))


def plan_decoded(program: Program, weights: Mapping[str, LazyTensor], policy: Policy) -> WeightPlan:
    """Every weight of a Program decoded: the plan of a backend that knows no other way."""
    used = {leaf.name: weights[leaf.name] for leaf in program.leaves if leaf.kind == "weight"}
    itemsize = policy.activations.itemsize
    return WeightPlan(
        MappingProxyType({role: _decoded_weight(tensor, itemsize) for role, tensor in used.items()})
    )


def _decoded_weight(tensor: LazyTensor, itemsize: int) -> PlannedWeight:
    return PlannedWeight(tensor.encoding, tensor.nbytes, "decoded", tensor.size * itemsize)


def _tables(program: Program) -> frozenset[str]:
    """The roles of weights that a Program looks rows up in, and never multiplies."""
    looked_up = {i.operands[1] for i in program if i.op.name == "embedding"}
    computed = {value for i in program if i.op.name != "embedding" for value in i.operands}
    return frozenset(value.name for value in looked_up - computed if value is not None)


def _read_as_stored(program: Program) -> frozenset[str]:
    """The roles of weights that mixed products read."""
    products = (i.operands[1] for i in program if i.op.name in ("linear_a8", "linear_a16"))
    return frozenset(value.name for value in products if value is not None)


def _smallest(tensor: LazyTensor, itemsize: int, table: bool) -> PlannedWeight:
    """The way to hold a weight that takes fewest bytes."""
    if len(tensor.shape) == 1:
        return _decoded_weight(tensor, itemsize)
    rows = min(LOOKUP_ROWS if table else tile_rows(tensor.shape), len(tensor.data))
    return PlannedWeight(tensor.encoding, tensor.nbytes, "streamed", rows * _row_bytes(tensor))


def _hold(
    planned: dict[str, PlannedWeight], holding: Holding, sizes: Mapping[str, int], limit: int | None
) -> None:
    """Hold weights in this way, each taking these bytes: in turn, where the total stays within the limit."""
    resident = sum(weight.nbytes for weight in planned.values() if weight.holding != "streamed")
    streams = [(weight.nbytes, role) for role, weight in planned.items() if weight.holding == "streamed"]
    streams.sort(reverse=True)
    held: set[str] = set()
    for role, nbytes in sizes.items():
        weight = planned[role]
        after = resident + nbytes - (weight.nbytes if weight.holding != "streamed" else 0)
        stream = next((size for size, other in streams if other != role and other not in held), 0)
        if limit is None or after + stream <= limit:
            planned[role] = replace(weight, holding=holding, nbytes=nbytes)
            resident = after
            held.add(role)


def _row_bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.data.shape[1:])


class Weights:
    """Weights held as planned, each from its first use on.

    Args:
        stored: by role.
        plan: how to hold them; ``None`` for what is fastest for the programs that come.
    """

    def __init__(self, stored: Mapping[str, LazyTensor], policy: Policy, plan: WeightPlan | None) -> None:
        self._stored, self._policy = stored, policy
        self._planned = dict(plan.weights) if plan is not None else {}
        self._settled = plan is not None
        self._operands: dict[str, FloatArray | StoredMatrix] = {}

    @property
    def held(self) -> int:
        """Bytes decoded now."""
        return self._in_use.held

    @property
    def mapped(self) -> int:
        """Bytes of the file counted as in memory now: all of what is mapped, one tile of what is streamed."""
        return self._in_use.mapped + self._in_use.streamed

    def settle(self, program: Program) -> None:
        """Choose how to hold a program's weights, unless that is planned."""
        if not self._settled:
            fastest = plan_weights(program, self._stored, self._policy).weights
            self._planned = {**fastest, **self._planned}

    def operand(self, role: str) -> FloatArray | StoredMatrix:
        """A weight as an op takes it: an array, or what gives its rows when asked.

        Raises:
            NumericalError: it is decoded now, and holds NaN or infinity.
        """
        if role not in self._operands:
            tensor, holding = self._stored[role], self._planned[role].holding
            if holding == "decoded":
                self._operands[role] = _decoded(tensor, self._policy.activations)
            else:
                streamed = holding == "streamed"
                self._operands[role] = StoredMatrix(tensor, self._policy.activations, streamed=streamed)
        return self._operands[role]

    @property
    def _in_use(self) -> WeightPlan:
        """The plan of what has been used."""
        return WeightPlan({role: self._planned[role] for role in self._operands})


class StoredMatrix:
    """A matrix as it is stored, whose rows become numbers when they are asked for.

    It is a ``TiledMatrix`` for ``linear`` and ``linear_a16``, a ``GroupedMatrix`` for ``linear_a8`` and a
    table for ``embedding``. The rows of a tile are checked when they are read for the first time, and not
    again.

    Args:
        dtype: of the numbers: float32 or float64.
        streamed: whether the pages of the file are given back after each use.

    Clauses: BCK-14, BCK-15.
    """

    def __init__(self, stored: LazyTensor, dtype: np.dtype[np.floating], *, streamed: bool) -> None:
        rows, columns = stored.shape
        self.shape, self.dtype = (rows, columns), dtype
        self._stored, self._streamed = stored, streamed
        self._checked = np.zeros(rows, np.bool_)

    def tile(self, start: int, stop: int, scratch: Scratch) -> FloatArray:
        """Rows ``start`` to ``stop``, decoded into ``scratch``: ``[stop - start, K]``.

        Raises:
            NumericalError: they hold NaN or infinity.
        """
        rows = scratch.empty((stop - start, self.shape[1]), self.dtype)
        _decode_rows(self._stored, self._stored.data[start:stop], rows)
        self._check(start, stop, rows)
        self._release(start, stop)
        return rows

    def groups(self, start: int, stop: int, scratch: Scratch) -> Groups:
        """Rows ``start`` to ``stop`` as integers, scales and offsets, read into ``scratch``.

        Raises:
            NumericalError: a scale or an offset is NaN or infinity.
        """
        count, columns, encoding = stop - start, self.shape[1], self._stored.encoding
        integers = scratch.empty((count, columns), np.float32)
        scales = scratch.empty((columns // GROUP, count), np.float32)
        offsets = scratch.empty(scales.shape, np.float32) if has_offsets(encoding) else None
        read_groups(encoding, self._stored.data[start:stop], integers, scales, offsets)
        self._check(start, stop, scales, offsets)
        self._release(start, stop)
        return Groups(integers, scales, offsets)

    def __getitem__(self, rows: IndexArray) -> FloatArray:
        """The named rows: ``[n, K]``.

        Raises:
            NumericalError: they hold NaN or infinity.
        """
        if not self._streamed:
            return self._numbers(self._stored[rows])
        found = np.empty((len(rows), self.shape[1]), np.float32)
        for start in range(0, len(rows), LOOKUP_ROWS):
            some = slice(start, start + LOOKUP_ROWS)
            found[some] = self._stored[rows[some]]
            self._stored.pages.release()
        return self._numbers(found)

    def _check(self, start: int, stop: int, *arrays: FloatArray | None) -> None:
        if not self._checked[start:stop].all():
            for array in arrays:
                if array is not None:
                    _check_finite(array, self._stored.name)
            self._checked[start:stop] = True

    def _release(self, start: int, stop: int) -> None:
        if self._streamed:
            size = _row_bytes(self._stored)
            self._stored.pages.release(start * size, stop * size)

    def _numbers(self, rows: NDArray[np.float32]) -> FloatArray:
        return _check_finite(rows, self._stored.name).astype(self.dtype, copy=False)


def _decoded(tensor: LazyTensor, dtype: np.dtype[np.floating]) -> FloatArray:
    """All of a tensor as numbers: tile by tile, so that nothing is needed besides, and the pages can go."""
    size = _row_bytes(tensor)
    step = tile_rows(tensor.shape) if len(tensor.shape) > 1 else len(tensor.data)
    decoded = np.empty(tensor.shape, dtype)
    for start in range(0, len(tensor.data), step):
        stop = min(start + step, len(tensor.data))
        _decode_rows(tensor, tensor.data[start:stop], decoded[start:stop])
        _check_finite(decoded[start:stop], tensor.name)
        tensor.pages.release(start * size, stop * size)
    return decoded


def _decode_rows(tensor: LazyTensor, data: NDArray[np.uint8], out: FloatArray) -> None:
    """Decode stored rows into ``out`` of any float dtype."""
    if out.dtype == np.float32:
        decode(tensor.encoding, data, out)
        return
    step = max(1, CHUNK_WEIGHTS // max(1, math.prod(out.shape[1:])))
    for start in range(0, len(data), step):
        out[start : start + step] = decode(tensor.encoding, data[start : start + step])


def _check_finite(array: FloatArray, name: str) -> FloatArray:
    if not np.isfinite(array).all():
        raise not_finite(name)
    return array
