"""AdamW, and the learning rates of the kinds of parameters that training changes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.parameters import Parameter

Array = NDArray[np.float32]

# Learning rates of dimensionless parameters, see lowbitq.students. SmolLM2 in int2g64, 40 steps of
# 512 tokens: scale, offset, norm at 2e-3, 4e-3, 2e-3 took the held-back KL from 1.287 to 0.907; at
# 1e-3, 4e-3, 1e-3 to 0.910; at 6e-3, 12e-3, 6e-3 to 1.045. In int4g64 with 4-bit inputs, 16 steps
# of 256 tokens with activation at 5e-3 took the packed model's held-back KL from 0.900 to 0.876.
# The others are orders of magnitude.
RATES = {
    "scale": 2.5e-3,
    "offset": 5e-3,
    "level": 4e-3,
    "norm": 2.5e-3,
    "row": 2e-3,
    "fusion": 2e-3,
    "column": 2e-3,
    "bias": 1e-3,
    "adapter": 1e-3,
    "activation": 5e-3,
    "rotation": 1e-4,
}
BETAS, EPSILON = (0.9, 0.95), 1e-8


class AdamW:
    """Adam with decoupled weight decay, on parameters of several learning rates.

    Parameters
    ----------
    parameters : list of Parameter
    rates : mapping of str to float
        Learning rate of each kind.
    decay : float, default=0.0
        Weight decay towards zero; parameters that start at 1 should have none.
    pull : float, default=0.0
        Weight of half the squared distance from the start, which is not part of the gradients: as
        with `decay`, Adam's division by their size would cancel it. Each step ends in the proximal
        one, ``value - start`` divided by ``1 + rate pull``, stable for any weight.
    clip : float, default=1.0
        Largest norm of all gradients together; longer ones are scaled down. inf: never.

    References
    ----------
    I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", 2019, algorithm 2. N. Parikh,
    S. Boyd, "Proximal Algorithms", 2014, section 4.2.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        rates: Mapping[str, float],
        *,
        decay: float = 0.0,
        pull: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.parameters = parameters
        self.steps = 0
        self._rates, self._decay, self._pull, self._clip = rates, decay, pull, clip
        self._moments = [(np.zeros_like(p.value), np.zeros_like(p.value)) for p in parameters]

    def step(self, factor: float) -> float:
        """Move the parameters, with learning rates times `factor`; return the gradient's norm."""
        self.steps += 1
        norm = math.sqrt(sum(_core.square_sum(p.gradient.reshape(-1)) for p in self.parameters))
        short = min(1.0, self._clip / norm) if norm else 1.0
        for parameter, (first, second) in zip(self.parameters, self._moments, strict=True):
            gradient = parameter.gradient
            gradient *= np.float32(short)
            rate = factor * self._rates[parameter.kind]
            _core.adamw(
                *(a.reshape(-1) for a in (parameter.value, gradient, first, second)),
                lr=rate,
                beta1=BETAS[0],
                beta2=BETAS[1],
                epsilon=EPSILON,
                decay=self._decay,
                step=self.steps,
            )
            gradient[:] = 0
            if self._pull:
                gap = parameter.value - parameter.start
                parameter.value[:] = parameter.start + gap / np.float32(1 + rate * self._pull)
        return norm

    def state(self) -> dict[str, Array]:
        """Return the arrays that a later `restore` needs."""
        state = {f"value/{i}": p.value for i, p in enumerate(self.parameters)}
        for i, (first, second) in enumerate(self._moments):
            state |= {f"first/{i}": first, f"second/{i}": second}
        return state

    def restore(self, state: Mapping[str, Array], steps: int) -> None:
        """Continue where `state` was taken, after `steps` steps."""
        self.steps = steps
        for i, (parameter, moments) in enumerate(zip(self.parameters, self._moments, strict=True)):
            parameter.value[:] = state[f"value/{i}"]
            for name, moment in zip(("first", "second"), moments, strict=True):
                moment[:] = state[f"{name}/{i}"]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate in step 1, 2, ..., `steps`.

    It rises from 1 / (warmup + 1) and then falls along half a cosine to a tenth.

    Examples
    --------
    >>> [round(cosine(step, 10, 1), 2) for step in (1, 2, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - warmup - 1) / max(steps - warmup - 1, 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
