"""Feature values with their nulls, before they are packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Computed:
    """n rows of c columns.

    values: float64 (n, c); anything where null. A NaN that is not null was in the data.
    null: bool (n, c). known: bool (n,), False for an entity that nothing was known of: its row is all null.
    """

    values: NDArray[np.float64]
    null: NDArray[np.bool_]
    known: NDArray[np.bool_]

    def float32(self) -> NDArray[np.float32]:
        """As models take them: NaN for null; beyond float32 is infinite."""
        with np.errstate(over="ignore"):
            return np.where(self.null, np.nan, self.values).astype(np.float32)
