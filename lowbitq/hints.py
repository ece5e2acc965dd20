"""Hints: what a student is told of its teacher's blocks, beside the teacher's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.attention_maps import AttentionMap
from lowbitq.gradients import Differentiable, Pass, Target
from lowbitq.losses import feature_loss, relation_loss

Array = NDArray[np.float32]

KINDS = ("features", "relations", "attention")


@dataclass(frozen=True)
class Hints:
    """Losses of some blocks, each a mean over them: of the residual stream behind, of attention.

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
    attention : float, default=0.0
        Weight of the divergence of the teacher's attention map from the student's, a mean over
        heads and tokens: `lowbitq.attention_maps.AttentionMap.divergence`. Both have as many heads.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, or there are no blocks.

    References
    ----------
    A. Romero et al., "FitNets: Hints for Thin Deep Nets", 2015. W. Wang et al., "MiniLM: Deep
    Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers", 2020.

    Examples
    --------
    >>> Hints((9, 19, -1), features=0.1).within(30)
    (9, 19, 29)
    """

    blocks: tuple[int, ...] = (-1,)
    features: float = 0.0
    relations: float = 0.0
    attention: float = 0.0

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

    def states(self, count: int) -> tuple[int, ...]:
        """Return the blocks of a network of `count` behind which the teacher's states are wanted.

        Attention is made of the state before a block; that before the first is the embedding.

        Examples
        --------
        >>> Hints((0, 9), attention=0.1).states(30)
        (8,)
        """
        chosen = self.within(count)
        wanted: set[int] = set()
        if self.features or self.relations:
            wanted.update(chosen)
        if self.attention:
            wanted.update(index - 1 for index in chosen if index)
        return tuple(sorted(wanted))

    def add(
        self, run: Pass, teacher: Differentiable, states: dict[int, Array], share: float
    ) -> dict[str, float]:
        """Compare a student's pass with its teacher's; gradients are added on the way back.

        Parameters
        ----------
        run : Pass
            Of the student.
        teacher : Model
        states : dict of int to ndarray of shape (t, hidden), float32
            By block, those of `states`: the teacher's residual stream behind it, not rotated.
        share : float
            Of this window in the loss of a step.

        Returns
        -------
        dict of str to float
            By kind: the mean over the blocks, before weight and share; only what has a weight.
        """
        chosen = self.within(len(teacher.blocks))
        found = {kind: 0.0 for kind, weight in self.weights.items() if weight}
        for index in chosen:
            part = share / len(chosen)
            values = self._compare_states(run, index, states.get(index), part)
            if self.attention:
                before = states[index - 1] if index else teacher.embed(run.tokens)
                values["attention"] = self._compare_maps(run, index, teacher, before, part)
            for kind, value in values.items():
                found[kind] += value / len(chosen)
        return found

    def _compare_states(
        self, run: Pass, index: int, state: Array | None, share: float
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        if state is None or not (self.features or self.relations):
            return found
        x, target = run.behind(index), turned(run.model, state)
        if self.features:
            found["features"], gradient = feature_loss(x, target, normalize="token")
            run.inject(index, np.float32(self.features * share) * gradient)
        if self.relations:
            found["relations"], gradient = relation_loss(x, target)
            run.inject(index, np.float32(self.relations * share) * gradient)
        return found

    def _compare_maps(
        self, run: Pass, index: int, teacher: Differentiable, before: Array, share: float
    ) -> float:
        target = AttentionMap.of(teacher, index, before)
        found = run.attention(index).divergence(target)
        run.imitate(index, Target(target, self.attention * share / found.size))
        return float(found.mean())


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
