"""A program's weights: matrices in planes, vectors as float32; on the device, or in the host's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.backend.weights import PlannedWeight, WeightPlan
from refengine.program import Program
from refengine.quantizer import LazyTensor
from refengine.quantizer.finite import check_finite, fit_float16, not_finite, too_large
from refengine_cupy.packing import (
    ALIGNMENT,
    TILE,
    held_as,
    pack,
    packed_bytes,
    plane_bytes,
)
from refengine_cupy.runtime import Memory, Pinned, Runtime
from refengine_cupy.streaming import Passing, plan_streamed

Put = Callable[[int, NDArray[Any]], None]
"""Lets the memory from an address on hold an array."""

CHUNK_BYTES = 2**24
"""Stored bytes that are packed at once, so that little of the host's memory is used."""


@dataclass(frozen=True)
class DeviceWeight:
    """A weight where the device reads it.

    Attributes:
        encoding: how it is held.
        shape: of the weight.
        planes: addresses, by plane.
        fits_float16: whether its weights are finite in float16, as far as anybody asked.
    """

    encoding: str
    shape: tuple[int, ...]
    planes: Mapping[str, int]
    fits_float16: bool = True

    @property
    def address(self) -> int:
        """Of the first plane."""
        return self.planes["codes"]

    def moved(self, by: int) -> DeviceWeight:
        """The same, so many bytes further on."""
        planes = {plane: address + by for plane, address in self.planes.items()}
        return replace(self, planes=MappingProxyType(planes))


def plan_packed(program: Program, weights: Mapping[str, LazyTensor], limit: int | None = None) -> WeightPlan:
    """How a program's weights are held: all on the device, or what a limit leaves room for there.

    Args:
        limit: bytes of the device's memory; ``None`` for as many as there are. See ``plan_streamed``.

    Clauses: BCK-15, BCK-16.
    """
    used = {leaf.name: weights[leaf.name] for leaf in program.leaves if leaf.kind == "weight"}
    plan = WeightPlan(MappingProxyType({role: _planned(tensor) for role, tensor in used.items()}))
    if limit is None or plan.total <= limit:
        return plan
    shapes = {role: tensor.shape for role, tensor in used.items()}
    return plan_streamed(program, plan.weights, shapes, limit)


def _planned(tensor: LazyTensor) -> PlannedWeight:
    return PlannedWeight(tensor.encoding, tensor.nbytes, "repacked", _device_bytes(tensor))


def _device_bytes(tensor: LazyTensor) -> int:
    if len(tensor.shape) == 1:
        return -(-4 * tensor.size // ALIGNMENT) * ALIGNMENT
    return packed_bytes(tensor.encoding, math.prod(tensor.shape[:-1]), tensor.shape[-1])


class DeviceWeights:
    """Weights in one stretch of the device's memory, or of the host's, packed tensor by tensor.

    Pages of the file are given back as soon as they are read.

    Args:
        runtime: the device.
        stored: by role.
        plan: which are taken, and where they lie; ``None`` for all, on the device.
        halves: whether products may round them to float16.

    Attributes:
        held: bytes of those on the device.
        passage: bytes of the device's memory that streamed ones pass through.
        host: bytes of those in the host's memory.

    Raises:
        NumericalError: a weight is NaN or infinite.
        MemoryLimitError: the device, or the host, has no room for them.
    """

    def __init__(
        self,
        runtime: Runtime,
        stored: Mapping[str, LazyTensor],
        plan: WeightPlan | None = None,
        *,
        halves: bool = False,
    ) -> None:
        self._halves = halves
        self._names = {role: tensor.name for role, tensor in stored.items()}
        holdings = dict.fromkeys(stored, "repacked")
        if plan is not None:
            holdings = {role: weight.holding for role, weight in plan.weights.items()}
        self._stored = {role: stored[role].encoding for role in holdings}
        sizes = {role: _device_bytes(stored[role]) for role in holdings}
        here = {role: nbytes for role, nbytes in sizes.items() if holdings[role] == "repacked"}
        away = {role: nbytes for role, nbytes in sizes.items() if role not in here}
        self.held, self.host = sum(here.values()), sum(away.values())
        self.passage = plan.streamed if plan is not None else 0
        self._memory: Memory | None = runtime.allocate(self.held, "weights") if here else None
        self._passage: Memory | None = None
        if self.passage:
            self._passage = runtime.allocate(self.passage, "streamed weights in passage")
        self._pinned: Pinned | None = runtime.pinned(self.host, "weights in pinned memory") if away else None
        self._weights: dict[str, DeviceWeight] = {}
        if self._memory is not None:
            self._take_all(stored, here, self._memory.address, runtime.upload)
        if self._pinned is not None:
            self._take_all(stored, away, self._pinned.address, partial(_put, self._pinned))
        at = {role: self._weights[role].address for role in away if holdings[role] == "streamed"}
        self._sources = {role: (address, sizes[role]) for role, address in at.items()}

    def __getitem__(self, role: str) -> DeviceWeight:
        """A weight where it lies; the device can read it there, slowly if that is the host's memory."""
        return self._weights[role]

    def passing(self, program: Program) -> Passing | None:
        """Where a program's products find the weights that are streamed; ``None`` where none is."""
        if self._passage is None:
            return None
        return Passing(program, self._stored, self._sources, self._passage.address, self.passage)

    def check_float16(self, program: Program) -> None:
        """Look at the weights that a program's products round to float16.

        Raises:
            NumericalError: one would be infinite.

        Clauses: MIX-11.
        """
        products = (i.operands[1] for i in program if i.op.name == "linear_a16")
        for weight in products:
            if weight is not None and not self._weights[weight.name].fits_float16:
                raise too_large(self._names[weight.name])

    def _take_all(
        self, stored: Mapping[str, LazyTensor], sizes: Mapping[str, int], address: int, put: Put
    ) -> None:
        for role, nbytes in sizes.items():
            self._weights[role] = _take(stored[role], address, put, self._halves)
            address += nbytes

    @property
    def encodings(self) -> Mapping[str, str]:
        """How each is held, by role."""
        return {role: weight.encoding for role, weight in self._weights.items()}


def _take(tensor: LazyTensor, address: int, put: Put, halves: bool) -> DeviceWeight:
    """Pack a weight into the memory from an address on."""
    if len(tensor.shape) == 1:
        put(address, _finite_numbers(tensor))
        tensor.pages.release()
        return DeviceWeight("f32", tensor.shape, MappingProxyType({"codes": address}))
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    planes, at = {}, address
    for plane, nbytes in plane_bytes(tensor.encoding, rows, columns).items():
        planes[plane] = at
        at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    data = tensor.data.reshape(rows, -1)
    step = max(1, CHUNK_BYTES // data.shape[1] // TILE) * TILE
    places, fits = dict(planes), True
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        check_finite(tensor, data[start:stop])
        fits = fits and (not halves or fit_float16(tensor.encoding, data[start:stop]))
        for plane, values in pack(tensor.encoding, data[start:stop], columns).items():
            if plane in places:
                put(places[plane], np.ascontiguousarray(values))
                places[plane] += values.nbytes
        tensor.pages.release(start * data.shape[1], stop * data.shape[1])
    return DeviceWeight(held_as(tensor.encoding), tensor.shape, MappingProxyType(planes), fits)


def _put(memory: Pinned, address: int, values: NDArray[Any]) -> None:
    at = address - memory.address
    memory.data[at : at + values.nbytes] = values.reshape(-1).view(np.uint8)


def _finite_numbers(tensor: LazyTensor) -> NDArray[np.float32]:
    numbers = tensor.decode()
    if not np.isfinite(numbers).all():
        raise not_finite(tensor.name)
    return numbers
