"""What a search makes small, window by window: predictions, blocks, how alike copies err."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from math import exp, log
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import NumericalError
from lowbitq.calibration import Stream
from lowbitq.divergences import Reference
from lowbitq.evaluation import perplexity
from lowbitq.linears import Activation, QuantizedLinear
from lowbitq.losses import diversity_loss, feature_loss, orthogonality_loss
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.slots import SLOTS, name_in_block

Array = NDArray[np.float32]
Tokens = NDArray[np.int32]
Spec: TypeAlias = "str | Mapping[str, float] | Callable[[QuantizedModel], float]"

# -log det of correlations that differ from dependence by rounding only.
_DEPENDENT = 50 * log(2)


class Seen:
    """The windows of a search, and what the float model makes of them.

    Parameters
    ----------
    reference : Model
        Not rotated.
    tokens : ndarray of shape (windows, window), int32
    layers : sequence of str
        The layers that change.
    """

    def __init__(self, reference: Model, tokens: Tokens, layers: Sequence[str]) -> None:
        self.reference, self.tokens, self.layers = reference, tokens, layers
        self.blocks = sorted({int(name.split(".")[2]) for name in layers})

    @cached_property
    def predictions(self) -> list[Reference]:
        """Logits, 4 windows window vocab bytes."""
        return [Reference(self.reference, window) for window in self.tokens]

    @cached_property
    def edges(self) -> dict[int, tuple[Array, Array]]:
        """The residual stream (windows, window, hidden) before and after the blocks that change."""
        stream, found = Stream(self.reference, self.tokens), {}
        for index in range(self.blocks[-1] + 1):
            before = stream.hidden.copy() if index in self.blocks else None
            stream.advance()
            if before is not None:
                found[index] = before, stream.hidden.copy()
        return found

    def through_block(
        self, model: Model, index: int, window: int
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Run a block on the float model's stream.

        Returns what it gives, what the float block gives, both as the model is rotated, and the
        inputs of its layers.
        """
        before, after = (edge[window] for edge in self.edges[index])
        turn = model.residual_rotation
        hidden = before.copy() if turn is None else turn.apply(before)
        taps: dict[str, Array] = {}
        model.block_forward(index, hidden, taps)
        return hidden, after if turn is None else turn.apply(after), taps


class _Term(ABC):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    @abstractmethod
    def of(self, model: QuantizedModel, window: int) -> float:
        """The value on one window."""

    def whole(self, mean: float) -> float:
        """The value of several windows, from their mean."""
        return mean


class _Perplexity(_Term):
    def of(self, model: QuantizedModel, window: int) -> float:
        tokens = self.seen.tokens[window]
        return perplexity(model, tokens, len(tokens)).nll

    def whole(self, mean: float) -> float:
        return exp(mean)


class _Divergence(_Term):
    def of(self, model: QuantizedModel, window: int) -> float:
        hidden = model.hidden(self.seen.tokens[window])[:-1]
        return self.seen.predictions[window].divergence(hidden)


class _BlockError(_Term):
    def of(self, model: QuantizedModel, window: int) -> float:
        errors = []
        for index in self.seen.blocks:
            found, target, _ = self.seen.through_block(model, index, window)
            errors.append(feature_loss(found, target, normalize="token")[0])
        return float(np.mean(errors))


class _Likeness(_Term):
    """How alike the copies of a layer err because they round their inputs; mean over layers."""

    @staticmethod
    @abstractmethod
    def alike(errors: list[Array]) -> float: ...

    def of(self, model: QuantizedModel, window: int) -> float:
        found = []
        for block in self.seen.blocks:
            _, _, taps = self.seen.through_block(model, block, window)
            for slot in SLOTS:
                linear = model.blocks[block].linears[slot.name]
                name = name_in_block(block, slot)
                if name not in self.seen.layers or not isinstance(linear, QuantizedLinear):
                    continue
                if len(linear.copies) > 1:
                    found.append(self.alike(_errors(linear, taps[slot.tap])))
        if not found:
            raise ValueError("no layer that changes has several copies")
        return float(np.mean(found))


def _errors(linear: QuantizedLinear, x: Array) -> list[Array]:
    """What rounding the inputs changes in the outputs of each copy."""
    errors = []
    for copy in linear.copies:
        if copy.activation.bits is None:
            raise ValueError("diversity is of copies that round their inputs, but one does not")
        rounded = QuantizedLinear((replace(copy, weight=None),))
        exact = QuantizedLinear((replace(copy, weight=None, activation=Activation(None)),))
        errors.append(rounded.forward(x) - exact.forward(x))
    return errors


class _Diversity(_Likeness):
    @staticmethod
    def alike(errors: list[Array]) -> float:
        try:
            return min(diversity_loss(errors)[0], _DEPENDENT)
        except NumericalError:  # equal copies
            return _DEPENDENT


class _Orthogonality(_Likeness):
    @staticmethod
    def alike(errors: list[Array]) -> float:
        sizes = [float(np.linalg.norm(error)) for error in errors]
        return float(
            np.mean(
                [
                    orthogonality_loss(errors[i], errors[j])[0] / (sizes[i] * sizes[j] or 1.0)
                    for i, j in combinations(range(len(errors)), 2)
                ]
            )
        )


TERMS: dict[str, type[_Term]] = {
    "kl": _Divergence,
    "perplexity": _Perplexity,
    "block": _BlockError,
    "diversity": _Diversity,
    "orthogonality": _Orthogonality,
}


class Objective:
    """A weighted sum of terms, or a function of the model.

    Parameters
    ----------
    spec : str, mapping of str to float, or callable
        A term, terms with weights, or ``f(model)``. Terms are ``"kl"``: divergence from the float
        model, nats per token, both with the float head; ``"perplexity"``; ``"block"``: relative
        squared error of the outputs of the blocks that change, each from the float model's input,
        mean over tokens; ``"diversity"``: -log det of the correlations of what rounding the inputs
        changes in the outputs of each copy; ``"orthogonality"``: ||E1^T E2|| / (||E1|| ||E2||) of
        the same.
    seen : Seen

    Raises
    ------
    ValueError
        If a term is unknown or a weight is not a finite number.
    """

    def __init__(self, spec: Spec, seen: Seen) -> None:
        self._function = None if isinstance(spec, (str, Mapping)) else spec
        weights: Mapping[str, float] = {}
        if isinstance(spec, (str, Mapping)):
            weights = {spec: 1.0} if isinstance(spec, str) else spec
            if not weights:
                raise ValueError("objective is empty, expected at least one term")
        for name, weight in weights.items():
            if name not in TERMS:
                expected = f"one of {', '.join(map(repr, TERMS))}"
                raise ValueError(f"objective has {name!r}, expected {expected}")
            if not np.isfinite(weight):
                raise ValueError(f"objective has {name!r} times {weight}, expected a finite number")
        self._terms = [(weight, TERMS[name](seen)) for name, weight in weights.items()]
        self._windows = len(seen.tokens)
        self.text = _text(spec, weights)

    def __call__(
        self, model: QuantizedModel, report: Callable[[int, float], None] | None = None
    ) -> float:
        """Return the objective; `report` is told the number of windows so far and their value."""
        if self._function is not None:
            return float(self._function(model))
        found = np.zeros((self._windows, len(self._terms)))
        value = 0.0
        for window in range(self._windows):
            found[window] = [term.of(model, window) for _, term in self._terms]
            means = found[: window + 1].mean(0).tolist()
            value = sum(
                weight * term.whole(mean)
                for (weight, term), mean in zip(self._terms, means, strict=True)
            )
            if report is not None:
                report(window + 1, value)
        return value


def _text(spec: Spec, weights: Mapping[str, float]) -> str:
    if weights:
        return " + ".join(n if w == 1 else f"{w:g} {n}" for n, w in weights.items())
    return str(getattr(spec, "__qualname__", type(spec).__qualname__))
