"""Parameters: what training changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(eq=False)
class Parameter:
    """An array that training changes in place.

    Attributes
    ----------
    name, kind : str
        Such as ``"model.layers.3.mlp.up_proj.scale"`` and ``"scale"``.
    value, gradient, start : ndarray of one shape, float32
        `start` is the value before training.
    pace : float, default=1.0
        Factor of its kind's learning rate.
    """

    name: str
    kind: str
    value: Array
    pace: float = 1.0
    gradient: Array = field(init=False)
    start: Array = field(init=False)

    def __post_init__(self) -> None:
        self.gradient = np.zeros_like(self.value)
        self.start = self.value.copy()

    @property
    def changed(self) -> bool:
        """Whether the value is not that before training."""
        return not np.array_equal(self.value, self.start)
