"""How a student rounds its inputs: scales, clips and zero points that are trained.

The forward pass rounds as the packed model does; gradients are those of "Learned Step Size
Quantization" and its kin, see `csrc/linear/fake.h`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lowbitq.linears import Activation, Copy
from lowbitq.parameters import Parameter
from lowbitq.rotations import Rotation

Array = NDArray[np.float32]

# The range of a clip and of a scale, as `Activation` has it.
_CLIPS, _SCALES = (1e-3, 1.0), (2.0**-100, 2.0**120)


class StudentInput:
    """An activation quantizer as training sees it; copies that read an input alike share one.

    Parameters
    ----------
    name : str
        Of the first copy.
    activation : Activation
        Of 8 or 4 bits.

    Attributes
    ----------
    values, gradient : ndarray of shape (3,), float32
        Clip, scale (0: by each token) and zero (NaN: by each token), which `compose` rewrites; and
        where a pass adds their gradient.
    parameters : list of Parameter
        The scale or, if each token has its own, the clip; and the zero, if there is one.
    """

    def __init__(self, name: str, activation: Activation) -> None:
        assert activation.bits is not None
        self.activation = activation
        scale, zero = activation.scale or 0.0, activation.zero
        start = [activation.clip, scale, np.nan if isinstance(zero, str) else zero]
        self._start: Array = np.array(start, np.float32)
        self.values, self.gradient = self._start.copy(), np.zeros(3, np.float32)
        self._place, self._range = (1, _SCALES) if scale else (0, _CLIPS)
        key = f"{name}.activation.{('clip', 'scale')[self._place]}"
        self._size = Parameter(key, "activation", np.ones(1, np.float32))
        self.parameters = [self._size]
        self._zero: Parameter | None = None
        if activation.is_centred and not isinstance(zero, str):
            self._zero = Parameter(f"{name}.activation.zero", "activation", np.zeros(1, np.float32))
            self.parameters.append(self._zero)
        # Of the zero: the largest number that the scale reaches, or the zero itself.
        limit = (1 << (activation.bits - 1)) - 1
        self._unit = np.float32(limit * scale or abs(start[2]))

    def compose(self) -> None:
        """Write the values as the parameters have them now; these stay in the range allowed."""
        low, high = self._range
        start = self._start[self._place]
        np.clip(self._size.value, low / start, high / start, out=self._size.value)
        self.values[self._place] = np.clip(start * self._size.value[0], low, high)
        if self._zero is not None:
            self.values[2] = self._start[2] + self._unit * self._zero.value[0]

    def pull(self) -> None:
        """Add to the gradients of the parameters what a pass has left behind."""
        self._size.gradient += self.gradient[self._place] * self._start[self._place]
        if self._zero is not None:
            self._zero.gradient += self.gradient[2] * self._unit
        self.gradient[:] = 0

    def finish(self) -> Activation:
        """Return the quantizer as it is now; unchanged, the one that was given."""
        if not any(p.changed for p in self.parameters):
            return self.activation
        clip, scale, zero = self.values.tolist()
        return replace(
            self.activation,
            clip=clip,
            scale=scale or None,
            zero=self.activation.zero if self._zero is None else zero,
        )


def reading(copy: Copy) -> Hashable:
    """Return a value that is equal for copies that rotate and round a common input alike."""
    how, (_, cols) = copy.activation, copy.tensor.shape
    group = copy.tensor.format.group or cols
    plain = replace(how, rotation=None)
    return plain, _turn(copy.rotation), _turn(how.rotation), group if group < cols else cols


def _turn(rotation: Rotation | None) -> Hashable:
    if rotation is None:
        return None
    if rotation.kind != "hadamard":
        return id(rotation)
    return rotation.n, rotation.seed, rotation.stream, rotation.orders
