"""A program's weights: matrices in tiles, vectors as float32, in the place of the file's pages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from refengine.backend.weights import PlannedWeight, StoredMatrix, WeightPlan
from refengine.program import Program
from refengine.quantizer import LazyTensor
from refengine.quantizer.finite import not_finite
from refengine_numba.matrix import TiledMatrix, check_halves
from refengine_numba.repack import layout_of
from refengine_numba.team import Team
from refengine_numba.tile_store import TileStore


def plan_tiles(program: Program, weights: Mapping[str, LazyTensor]) -> WeightPlan:
    """How a program's weights are held: there is one way.

    Raises:
        UnsupportedError: a matrix is stored in an encoding without kernels.
    """
    used = {leaf.name: weights[leaf.name] for leaf in program.leaves if leaf.kind == "weight"}
    return WeightPlan(MappingProxyType({role: _planned(tensor) for role, tensor in used.items()}))


def _planned(tensor: LazyTensor) -> PlannedWeight:
    if len(tensor.shape) == 1:
        return PlannedWeight(tensor.encoding, tensor.nbytes, "decoded", 4 * tensor.size)
    nbytes = layout_of(tensor.encoding).nbytes(*tensor.shape)
    return PlannedWeight(tensor.encoding, tensor.nbytes, "repacked", nbytes)


class TiledWeights:
    """Weights as kernels read them; each is made when a program is first compiled with it.

    One tensor at a time, whose pages of the file are given back: so loading takes little more memory than the
    weights take in the end.

    Args:
        stored: by role.
        team: the threads that repack.

    Attributes:
        held: bytes held now.
    """

    def __init__(self, stored: Mapping[str, LazyTensor], team: Team | None = None) -> None:
        self._stored, self._team, self._store = stored, team, TileStore.chosen()
        self._matrices: dict[str, TiledMatrix] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._halves: set[str] = set()
        self.held = 0

    @property
    def encodings(self) -> dict[str, str]:
        """How each weight is stored, by role."""
        return {role: tensor.encoding for role, tensor in self._stored.items()}

    def matrix(self, role: str, *, halves: bool = False) -> TiledMatrix:
        """A matrix, repacked.

        Args:
            halves: whether its weights are rounded to float16 where it is used.

        Raises:
            NumericalError: a weight is infinite or NaN, or, for ``halves``, would be.
            UnsupportedError: the encoding has no kernels.
        """
        if role not in self._matrices:
            self._matrices[role] = TiledMatrix.of(
                self._stored[role], halves=halves, team=self._team, store=self._store
            )
            self.held += self._matrices[role].tiles.nbytes
        elif halves and role not in self._halves:
            check_halves(self._stored[role])
        if halves:
            self._halves.add(role)
        return self._matrices[role]

    def vector(self, role: str) -> NDArray[np.float32]:
        """A vector, as numbers.

        Raises:
            NumericalError: one is infinite or NaN.
        """
        if role not in self._vectors:
            numbers = self._stored[role].decode()
            if not np.isfinite(numbers).all():
                raise not_finite(self._stored[role].name)
            self._vectors[role] = numbers
            self.held += numbers.nbytes
            self._stored[role].pages.release()
        return self._vectors[role]

    def golden(self, role: str) -> NDArray[np.float32] | StoredMatrix:
        """A weight as a golden op takes it: a matrix as it is stored."""
        tensor = self._stored[role]
        if len(tensor.shape) == 1:
            return self.vector(role)
        return StoredMatrix(tensor, np.dtype(np.float32), streamed=False)
