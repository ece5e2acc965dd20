"""Hints: what a student is told of its teacher's blocks, beside the teacher's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.gradients import Differentiable, Pass
from lowbitq.losses import feature_loss, relation_loss

Array = NDArray[np.float32]

KINDS = ("features", "relations")


@dataclass(frozen=True)
class Hints:
    """Losses of the residual stream behind some blocks, each a mean over the blocks.

    Parameters
    ----------
    blocks : tuple of int, default=(-1,)
        Negative numbers count from the end.
    features : float, default=0.0
        Weight of the relative squared distance of each token's state, which is
        `lowbitq.losses.feature_loss` normalized by token. 0: not computed, as below.
    relations : float, default=0.0
        Weight of `lowbitq.losses.relation_loss`, the distance of the similarities of a window's
        tokens to each other.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, or there are no blocks.

    References
    ----------
    A. Romero et al., "FitNets: Hints for Thin Deep Nets", 2015.

    Examples
    --------
    >>> Hints((9, 19, -1), features=0.1).within(30)
    (9, 19, 29)
    """

    blocks: tuple[int, ...] = (-1,)
    features: float = 0.0
    relations: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("blocks is empty, expected at least one")
        for kind in KINDS:
            weight = getattr(self, kind)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{kind} is {weight}, expected a finite number of at least 0")

    def __bool__(self) -> bool:
        """Whether any of them has a weight."""
        return any(self.weights.values())

    @property
    def weights(self) -> dict[str, float]:
        """The weights, by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def within(self, count: int) -> tuple[int, ...]:
        """Return the blocks of a network of `count`, in order and each once.

        Raises
        ------
        ValueError
            If there is no such block.
        """
        for index in self.blocks:
            if not -count <= index < count:
                raise ValueError(f"blocks has {index}, expected {-count} to {count - 1}")
        return tuple(sorted({index % count for index in self.blocks}))

    def add(self, run: Pass, states: dict[int, Array], share: float) -> dict[str, float]:
        """Compare a student's pass with its teacher's; gradients are added on the way back.

        Parameters
        ----------
        run : Pass
            Of the student.
        states : dict of int to ndarray of shape (t, hidden), float32
            By block: the teacher's residual stream behind it, not rotated.
        share : float
            Of this window in the loss of a step.

        Returns
        -------
        dict of str to float
            By kind: the mean over the blocks, before weight and share; only what has a weight.
        """
        wanted = {kind: weight for kind, weight in self.weights.items() if weight}
        found = dict.fromkeys(wanted, 0.0)
        for index, state in states.items():
            x, target = run.behind(index), turned(run.model, state)
            for kind, weight in wanted.items():
                if kind == "features":
                    value, gradient = feature_loss(x, target, normalize="token")
                else:
                    value, gradient = relation_loss(x, target)
                found[kind] += value / len(states)
                run.inject(index, np.float32(weight * share / len(states)) * gradient)
        return found


def turned(model: Differentiable, x: Array) -> Array:
    """Return a residual stream that is not rotated as `model` has it, in a new array."""
    if model.residual_rotation is None:
        return x.copy()
    return np.asarray(model.residual_rotation.apply(x))


def check_alike(model: Any, teacher: Any) -> None:
    """Raise ValueError unless the blocks of two models can be compared, one by one."""
    shapes = [(len(one.blocks), one.config.hidden_size) for one in (model, teacher)]
    if shapes[0] != shapes[1]:
        (blocks, width), (others, other) = shapes
        raise ValueError(
            f"blocks are compared, but the model has {blocks} of width {width}, the teacher "
            f"{others} of {other}"
        )
    if teacher.residual_rotation is not None:
        raise ValueError("teacher is rotated, expected the model as it was loaded")
