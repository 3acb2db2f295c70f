"""The arrays that ops take."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[Any]
"""An array of one of the floating dtypes of the precision policies."""

IndexArray: TypeAlias = NDArray[np.integer[Any]]
"""An array of ids, positions or slots."""
