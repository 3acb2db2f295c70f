"""A program's weights on the device: matrices in planes, vectors as float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.backend.weights import PlannedWeight, WeightPlan
from refengine.errors import NumericalError
from refengine.program import Program
from refengine.quantizer import LazyTensor, encoding
from refengine_cupy.packing import (
    ALIGNMENT,
    LAYOUTS,
    PLAIN,
    TILE,
    held_as,
    pack,
    packed_bytes,
    plane_bytes,
)
from refengine_cupy.runtime import Memory, Runtime

CHUNK_BYTES = 2**24
"""Stored bytes that are packed at once, so that little of the host's memory is used."""

HALVES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "q4_0": (0,),
        "q4_1": (0, 2),
        "q5_0": (0,),
        "q5_1": (0, 2),
        "q8_0": (0,),
        "q4_k": (0, 2),
        "q5_k": (0, 2),
        "q6_k": (208,),
    }
)
"""Where in a stored block float16 numbers stand; everything else is an integer."""

EXPONENTS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)}
)
"""Weights as unsigned integers, and their exponent's bits: all set in infinity and NaN alone."""


@dataclass(frozen=True)
class DeviceWeight:
    """A weight on the device.

    Attributes:
        encoding: how it is held.
        shape: of the weight.
        planes: addresses, by plane.
    """

    encoding: str
    shape: tuple[int, ...]
    planes: Mapping[str, int]

    @property
    def address(self) -> int:
        """Of the first plane."""
        return self.planes["codes"]


def plan_packed(program: Program, weights: Mapping[str, LazyTensor]) -> WeightPlan:
    """How a program's weights are held: there is one way."""
    used = {leaf.name: weights[leaf.name] for leaf in program.leaves if leaf.kind == "weight"}
    return WeightPlan(MappingProxyType({role: _planned(tensor) for role, tensor in used.items()}))


def _planned(tensor: LazyTensor) -> PlannedWeight:
    return PlannedWeight(tensor.encoding, tensor.nbytes, "repacked", _device_bytes(tensor))


def _device_bytes(tensor: LazyTensor) -> int:
    if len(tensor.shape) == 1:
        return -(-4 * tensor.size // ALIGNMENT) * ALIGNMENT
    return packed_bytes(tensor.encoding, math.prod(tensor.shape[:-1]), tensor.shape[-1])


class DeviceWeights:
    """Weights in one stretch of the device's memory, uploaded tensor by tensor as they are packed.

    Pages of the file are given back as soon as they are read.

    Args:
        runtime: the device.
        stored: by role.
        roles: those that are taken; ``None`` for all.

    Attributes:
        held: bytes.

    Raises:
        NumericalError: a weight is NaN or infinite.
        MemoryLimitError: the device has no room for them.
    """

    def __init__(
        self, runtime: Runtime, stored: Mapping[str, LazyTensor], roles: tuple[str, ...] | None = None
    ) -> None:
        self._runtime = runtime
        taken = {role: stored[role] for role in (stored if roles is None else roles)}
        self.held = sum(_device_bytes(tensor) for tensor in taken.values())
        self._memory: Memory = runtime.allocate(self.held, "weights")
        self._weights: dict[str, DeviceWeight] = {}
        address = self._memory.address
        for role, tensor in taken.items():
            self._weights[role] = self._take(tensor, address)
            address += _device_bytes(tensor)

    def __getitem__(self, role: str) -> DeviceWeight:
        return self._weights[role]

    @property
    def encodings(self) -> Mapping[str, str]:
        """How each is held, by role."""
        return {role: weight.encoding for role, weight in self._weights.items()}

    def _take(self, tensor: LazyTensor, address: int) -> DeviceWeight:
        if len(tensor.shape) == 1:
            self._runtime.upload(address, _finite_numbers(tensor))
            tensor.pages.release()
            return DeviceWeight("f32", tensor.shape, MappingProxyType({"codes": address}))
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        planes, at = {}, address
        for plane, nbytes in plane_bytes(tensor.encoding, rows, columns).items():
            planes[plane] = at
            at += -(-nbytes // ALIGNMENT) * ALIGNMENT
        data = tensor.data.reshape(rows, -1)
        step = max(1, CHUNK_BYTES // data.shape[1] // TILE) * TILE
        places = dict(planes)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            _check_finite(tensor, data[start:stop])
            for plane, values in pack(tensor.encoding, data[start:stop], columns).items():
                if plane in places:
                    self._runtime.upload(places[plane], np.ascontiguousarray(values))
                    places[plane] += values.nbytes
            tensor.pages.release(start * data.shape[1], stop * data.shape[1])
        return DeviceWeight(held_as(tensor.encoding), tensor.shape, MappingProxyType(planes))


def _finite_numbers(tensor: LazyTensor) -> NDArray[np.float32]:
    numbers = tensor.decode()
    if not np.isfinite(numbers).all():
        raise _not_finite(tensor)
    return numbers


def _check_finite(tensor: LazyTensor, rows: NDArray[np.uint8]) -> None:
    """Finite scales give finite weights: no product of float16 and small integers leaves float32."""
    name = tensor.encoding
    if name in PLAIN:
        dtype, exponent = EXPONENTS[name]
        numbers = [np.ascontiguousarray(rows).view(dtype)]
    elif name in LAYOUTS:
        dtype, exponent = EXPONENTS["f16"]
        blocks = rows.reshape(len(rows), -1, encoding(name).block_bytes)
        numbers = [np.ascontiguousarray(blocks[..., at : at + 2]).view(dtype) for at in HALVES[name]]
    else:
        dtype, exponent = EXPONENTS["f32"]
        numbers = [pack(name, rows, tensor.shape[-1])["codes"].view(dtype)]
    if any(((bits & exponent) == exponent).any() for bits in numbers):
        raise _not_finite(tensor)


def _not_finite(tensor: LazyTensor) -> NumericalError:
    return NumericalError(
        f"tensor {tensor.name} holds NaN or infinity: the file is damaged, "
        "or was quantized from damaged weights; get it again or use another one"
    )
