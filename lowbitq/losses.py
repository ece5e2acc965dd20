"""Losses of distillation: what a quantized model is trained to make small, each with its gradient.

`Loss` compares predictions and runs in C. The functions compare what lies inside two networks, are
plain NumPy in float64, and return a value with its gradient by the first argument.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core

Floats: TypeAlias = NDArray[np.floating[Any]]

# Name of a part in a text -> field of Loss, in the order of the fields.
_PARTS = {"kl": "forward", "reverse": "reverse", "js": "jensen_shannon", "ce": "cross_entropy"}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = rf"(?:({_NUMBER})\s*)?({'|'.join(_PARTS)})"
_TEXT = re.compile(
    rf"\s*({_TERM}(?:\s*\+\s*{_TERM})*)\s*(?:,\s*temperature\s+({_NUMBER})\s*)?", re.ASCII
)
_GRAMMAR = (
    "a sum of kl, reverse, js and ce, each at most once with a weight before it, then optionally "
    "a temperature; for example 'kl', 'kl + 0.5 reverse' or '0.9 kl + 0.1 ce, temperature 2'"
)

# What _core accepts.
_MOST_WEIGHT = 1e6
_TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True)
class Loss:
    """How far predictions are from a teacher's, and from the tokens that came: a weighted sum.

    With ``q = softmax(logits / temperature)``, ``p = softmax(teacher / temperature)`` and
    ``m = (p + q) / 2``, a token's loss in nats is::

        temperature^2 (forward KL(p || q) + reverse KL(q || p)
                       + jensen_shannon (KL(p || m) + KL(q || m)) / 2)
        - cross_entropy log softmax(logits)[target]

    Parameters
    ----------
    forward : float, default=1.0
        Weight of KL(p || q), the ``"kl"`` of a text: q must cover whatever p does.
    reverse : float, default=0.0
        Weight of KL(q || p), ``"reverse"``: q must not go where p does not.
    jensen_shannon : float, default=0.0
        Weight of ``"js"``, which is symmetric and at most log 2.
    cross_entropy : float, default=0.0
        Weight of ``"ce"``, at temperature 1.
    temperature : float, default=1.0
        0.001 to 1000. Above 1, small probabilities count more.

    Raises
    ------
    ValueError
        If a number is out of range, or all weights are 0.

    References
    ----------
    G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.
    Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
    2024.

    Examples
    --------
    >>> loss = Loss.parse("kl + 0.5 reverse")
    >>> loss.reverse
    0.5
    >>> logits, teacher = np.log(np.float32([[[1, 3]], [[1, 1]]]))
    >>> value, gradient = loss.evaluate(logits, teacher)
    >>> bool(np.isclose(value[0], np.log(4 / 3) / 2 + np.log(0.5) / 8 + np.log(1.5) * 3 / 8))
    True
    >>> gradient.shape
    (1, 2)
    """

    forward: float = 1.0
    reverse: float = 0.0
    jensen_shannon: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in _PARTS.values():
            if not 0 <= getattr(self, name) <= _MOST_WEIGHT:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to {_MOST_WEIGHT:g}")
        if not _TEMPERATURES[0] <= self.temperature <= _TEMPERATURES[1]:
            low, high = _TEMPERATURES
            raise ValueError(f"temperature is {self.temperature}, expected {low:g} to {high:g}")
        if not any(getattr(self, name) for name in _PARTS.values()):
            raise ValueError("all weights of the loss are 0, expected at least one above")
        for field in fields(self):
            object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @classmethod
    def parse(cls, text: Loss | str) -> Loss:
        """Read a loss from its text; a Loss is returned as it is.

        Parameters
        ----------
        text : str or Loss
            Such as ``"kl"``, ``"kl + 0.5 reverse"`` or ``"0.9 kl + 0.1 ce, temperature 2"``.

        Returns
        -------
        Loss

        Raises
        ------
        ValueError
            If `text` is not a loss; the message shows the grammar.

        Examples
        --------
        >>> str(Loss.parse("1.0 js+kl"))
        'kl + js'
        """
        if isinstance(text, Loss):
            return text
        match = _TEXT.fullmatch(text)
        terms = re.findall(_TERM, match[1]) if match else []
        if not match or len({name for _, name in terms}) < len(terms):
            raise ValueError(f"unknown loss {text!r}; expected {_GRAMMAR}")
        weights = {_PARTS[name]: float(weight or 1) for weight, name in terms}
        temperature = float(match[match.re.groups] or 1)
        return cls(**{"forward": 0.0} | weights, temperature=temperature)

    def __str__(self) -> str:
        weights = {name: getattr(self, field) for name, field in _PARTS.items()}
        terms = [name if x == 1 else f"{_text(x)} {name}" for name, x in weights.items() if x]
        end = "" if self.temperature == 1 else f", temperature {_text(self.temperature)}"
        return " + ".join(terms) + end

    @property
    def needs_teacher(self) -> bool:
        """Whether a divergence has a weight, so that a teacher's logits are asked for."""
        return bool(self.forward or self.reverse or self.jensen_shannon)

    @property
    def needs_targets(self) -> bool:
        """Whether the cross entropy has a weight, so that targets are asked for."""
        return bool(self.cross_entropy)

    def evaluate(
        self,
        logits: NDArray[np.float32],
        teacher: NDArray[np.float32] | None = None,
        targets: NDArray[np.int32] | None = None,
        *,
        weights: NDArray[np.float32] | None = None,
        overwrite: bool = False,
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Loss of each token, and the gradient of their weighted sum by the logits.

        Parameters
        ----------
        logits : ndarray of shape (tokens, vocab), float32
            The student's, finite; C-contiguous if `overwrite`.
        teacher : ndarray of shape (tokens, vocab), float32, C-contiguous, or None, default=None
            None only if no divergence has a weight.
        targets : ndarray of shape (tokens,), int32, or None, default=None
            The tokens that came; -1: no cross entropy there. None only if that has no weight.
        weights : ndarray of shape (tokens,), float32, or None, default=None
            What each token's loss counts in the sum; ``1 / tokens`` gives the gradient of a mean.
            None: 1.
        overwrite : bool, default=False
            Whether `logits` may become the gradient, which saves a copy.

        Returns
        -------
        value : ndarray of shape (tokens,), float64
            In nats, not multiplied by `weights`.
        gradient : ndarray of shape (tokens, vocab), float32
            Of ``sum(weights * value)``; `logits` itself if `overwrite`.

        Raises
        ------
        TypeError
            If an array has another dtype.
        ValueError
            If shapes do not fit, an array is missing, a target is outside the vocabulary, or a row
            of logits is not finite.
        """
        gradient = logits if overwrite else logits.copy()
        value = np.empty(len(logits))
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        _core.loss_gradient(gradient, teacher, targets, weights, value, **options)
        return value, gradient


def _text(number: float) -> str:
    """The shortest text that float() reads as the same number."""
    return repr(number).removesuffix(".0")


def _floats(*, hides: bool = False, **arrays: Floats) -> list[NDArray[np.float64]]:
    """Each array in float64, if it has finite floats; `hides`: or -infinity."""
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name} is not an ndarray of float32 or float64")
        if array.size == 0:
            raise ValueError(f"{name} has shape {array.shape}, expected at least one number")
        if not (np.isfinite(array) | (hides & np.isneginf(array))).all():
            raise ValueError(f"{name} has a NaN or infinity")
    return [array.astype(np.float64) for array in arrays.values()]


def _same_shape(**arrays: Floats) -> None:
    (name, array), (other_name, other) = arrays.items()
    if array.shape != other.shape:
        raise ValueError(f"{other_name} has shape {other.shape}, expected {array.shape} as {name}")


def _result(value: Any, gradient: NDArray[np.float64], like: Floats) -> tuple[float, Floats]:
    return float(value), gradient.astype(like.dtype)


def feature_loss(
    hidden: Floats, teacher: Floats, *, normalize: str | None = None
) -> tuple[float, Floats]:
    """Mean squared distance of hidden states.

    Parameters
    ----------
    hidden : ndarray of any shape, such as (tokens, hidden), float32 or float64
        The student's.
    teacher : ndarray of the same shape
    normalize : {"mean", "token"}, default=None
        ``"mean"``: divide by the mean square of `teacher`, so that layers with large states count
        no more than others. ``"token"``: each row by its own, so that the massive states of a few
        tokens count no more either.

    Returns
    -------
    value : float
        ``mean((hidden - teacher)^2)``, that relative to ``mean(teacher^2)``, or the mean over rows
        of ``||hidden - teacher||^2 / ||teacher||^2``.
    gradient : ndarray like `hidden`

    Raises
    ------
    TypeError
        If an array does not have floats.
    ValueError
        If shapes differ, a number is not finite, or `teacher`, or one of its rows, is all zeros and
        has to normalize.

    References
    ----------
    A. Romero, N. Ballas, S. Kahou, A. Chassang, C. Gatta, Y. Bengio, "FitNets: Hints for Thin Deep
    Nets", 2015, equation 3.

    Examples
    --------
    >>> x, teacher, step = np.random.default_rng(0).standard_normal((3, 4, 5))
    >>> value, gradient = feature_loss(x, teacher, normalize="token")
    >>> sides = [feature_loss(x + h * step, teacher, normalize="token")[0] for h in (1e-6, -1e-6)]
    >>> bool(np.isclose((sides[0] - sides[1]) / 2e-6, (gradient * step).sum()))
    True
    """
    x, y = _floats(hidden=hidden, teacher=teacher)
    _same_shape(hidden=x, teacher=y)
    if normalize not in (None, "mean", "token"):
        raise ValueError(f"normalize is {normalize!r}, expected 'mean', 'token' or None")
    size = np.ones(1)
    if normalize:
        size = (y * y).mean(axis=-1 if normalize == "token" else None, keepdims=True)
    if not size.all():
        raise ValueError("teacher, or a row of it, is all zeros and cannot normalize")
    gap = x - y
    return _result((gap * gap / size).mean(), 2 / gap.size * gap / size, hidden)


def relation_loss(hidden: Floats, teacher: Floats) -> tuple[float, Floats]:
    """Squared distance of the similarities of a batch's tokens to each other.

    With ``S(X) = X X^T / ||X X^T||_F`` it is ``||S(hidden) - S(teacher)||_F^2``, which does not ask
    for equal widths and does not change if either is rotated or scaled.

    Parameters
    ----------
    hidden : ndarray of shape (tokens, width), float32 or float64
        The student's hidden states.
    teacher : ndarray of shape (tokens, teacher width)

    Returns
    -------
    value : float
        0 to 2.
    gradient : ndarray like `hidden`

    Raises
    ------
    TypeError
        If an array does not have floats.
    ValueError
        If shapes do not fit, a number is not finite, or an array is all zeros.

    References
    ----------
    W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", 2019.
    F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", 2019, equations 1 to 4; there
    each row of X X^T is divided by its own norm.

    Examples
    --------
    >>> x, step = np.random.default_rng(0).standard_normal((2, 4, 5))
    >>> teacher = np.random.default_rng(1).standard_normal((4, 7))
    >>> value, gradient = relation_loss(x, teacher)
    >>> sides = [relation_loss(x + h * step, teacher)[0] for h in (1e-6, -1e-6)]
    >>> bool(np.isclose((sides[0] - sides[1]) / 2e-6, (gradient * step).sum()))
    True
    """
    x, y = _floats(hidden=hidden, teacher=teacher)
    for name, array in (("hidden", x), ("teacher", y)):
        if array.ndim != 2 or len(array) != len(x):
            raise ValueError(f"{name} has shape {array.shape}, expected ({len(x)}, width)")
        if not array.any():
            raise ValueError(f"{name} is all zeros, which has no similarities")
    G, T = x @ x.T, y @ y.T
    size = np.linalg.norm(G)
    S = G / size
    D = S - T / np.linalg.norm(T)
    # dL/dS = 2 D; through the norm, dL/dG = (2 D - 2 <D, S> S) / ||G||; dL/dX = 2 dL/dG X.
    gradient = 4 / size * ((D - (D * S).sum() * S) @ x)
    return _result((D * D).sum(), gradient, hidden)


def attention_loss(scores: Floats, teacher: Floats) -> tuple[float, Floats]:
    """Kullback-Leibler divergence of attention maps, mean over queries.

    Parameters
    ----------
    scores : ndarray of shape (..., queries, keys), float32 or float64
        The student's, before softmax; -infinity where a key is hidden from a query.
    teacher : ndarray of the same shape
        Alike; both hide the same keys.

    Returns
    -------
    value : float
        Mean of KL(softmax(teacher) || softmax(scores)), in nats.
    gradient : ndarray like `scores`
        By the scores; 0 at hidden keys.

    Raises
    ------
    TypeError
        If an array does not have floats.
    ValueError
        If shapes differ, a score is a NaN or +infinity, the arrays hide different keys, or all keys
        of a query are hidden.

    References
    ----------
    W. Wang, F. Wei, L. Dong, H. Bao, N. Yang, M. Zhou, "MiniLM: Deep Self-Attention Distillation
    for Task-Agnostic Compression of Pre-Trained Transformers", 2020, equation 6.

    Examples
    --------
    >>> x, teacher, step = np.random.default_rng(0).standard_normal((3, 2, 4, 4))
    >>> value, gradient = attention_loss(x, teacher)
    >>> sides = [attention_loss(x + h * step, teacher)[0] for h in (1e-6, -1e-6)]
    >>> bool(np.isclose((sides[0] - sides[1]) / 2e-6, (gradient * step).sum()))
    True
    """
    x, y = _floats(hides=True, scores=scores, teacher=teacher)
    _same_shape(scores=x, teacher=y)
    hidden = np.isneginf(x)
    if (hidden != np.isneginf(y)).any():
        raise ValueError("scores and teacher hide different keys")
    if x.ndim < 1 or hidden.all(axis=-1).any():
        raise ValueError("all keys of a query are hidden, expected a finite score")
    log_q, log_p = _log_softmax(x), _log_softmax(y)
    q, p = np.exp(log_q), np.exp(log_p)
    gap = np.subtract(log_p, log_q, out=np.zeros_like(x), where=~hidden)
    rows = x.size // x.shape[-1]
    return _result((p * gap).sum() / rows, (q - p) / rows, scores)


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def diversity_loss(outputs: Floats | Sequence[Floats]) -> tuple[float, Floats]:
    """How alike the outputs, or the errors, of the copies of a layer are: ``-log det C``.

    C is the matrix of their correlations. The loss is 0 if they are uncorrelated and grows without
    bound as they become dependent, so that a mean over copies would gain nothing.

    Parameters
    ----------
    outputs : ndarray of shape (copies, ...), float32 or float64, or a sequence of arrays
        One array of equal shape for each copy.

    Returns
    -------
    value : float
        At least 0, up to rounding.
    gradient : ndarray of shape (copies, ...)

    Raises
    ------
    TypeError
        If an array does not have floats.
    ValueError
        If shapes differ, a number is not finite, or a copy's outputs are all equal.
    NumericalError
        If the outputs are linearly dependent, as those of equal copies are.

    References
    ----------
    A. Kulesza, B. Taskar, "Determinantal Point Processes for Machine Learning", 2012, section 2.2:
    why a determinant measures diversity.

    Examples
    --------
    >>> x, step = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    >>> value, gradient = diversity_loss(x)
    >>> sides = [diversity_loss(x + h * step)[0] for h in (1e-6, -1e-6)]
    >>> bool(np.isclose((sides[0] - sides[1]) / 2e-6, (gradient * step).sum()))
    True
    """
    stacked = outputs if isinstance(outputs, np.ndarray) else np.stack(list(outputs))
    (y,) = _floats(outputs=stacked)
    y = y.reshape(len(y), -1)
    y = y - y.mean(axis=1, keepdims=True)
    size = np.linalg.norm(y, axis=1, keepdims=True)
    if not size.all():
        raise ValueError(f"the outputs of copy {int(size.argmin())} are all equal")
    Z = y / size
    C = Z @ Z.T
    eigenvalues = np.linalg.eigvalsh(C)
    if eigenvalues[0] < len(C) * 2.0**-50:  # the rounding of C, whose entries are at most 1
        raise _core.NumericalError("the outputs of the copies are linearly dependent")
    # dL/dZ = -2 C^-1 Z, whose product with Z in each row is -2; the rest goes through the norm.
    gradient = 2 / size * (Z - np.linalg.solve(C, Z))
    return _result(-np.log(eigenvalues).sum(), gradient.reshape(stacked.shape), stacked)


def orthogonality_loss(first: Floats, second: Floats) -> tuple[float, Floats, Floats]:
    """How far the errors of two copies are from orthogonal: ``||first^T second||_F``.

    Parameters
    ----------
    first, second : ndarray of shape (rows, cols) each, float32 or float64
        Errors of the copies, of weights or of outputs; `cols` may differ.

    Returns
    -------
    value : float
    by_first, by_second : ndarray like `first`, `second`
        Gradients by each; zeros where the value is 0.

    Raises
    ------
    TypeError
        If an array does not have floats.
    ValueError
        If shapes do not fit or a number is not finite.

    Examples
    --------
    >>> x, y, step = np.random.default_rng(0).standard_normal((3, 4, 5))
    >>> value, by_first, by_second = orthogonality_loss(x, y)
    >>> sides = [orthogonality_loss(x + h * step, y - h * step)[0] for h in (1e-6, -1e-6)]
    >>> bool(np.isclose((sides[0] - sides[1]) / 2e-6, ((by_first - by_second) * step).sum()))
    True
    """
    x, y = _floats(first=first, second=second)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"first has shape {x.shape}, second {y.shape}, expected (rows, cols) each")
    M = x.T @ y
    value = np.linalg.norm(M)
    size = value or 1.0
    found, by_first = _result(value, y @ M.T / size, first)
    return found, by_first, _result(value, x @ M / size, second)[1]


def l2_to_start(parameters: Floats, start: Floats) -> tuple[float, Floats]:
    """Half the squared distance from where training began: a pull back to the pretrained values.

    Parameters
    ----------
    parameters : ndarray of any shape, float32 or float64
    start : ndarray of the same shape
        Their values before the first step.

    Returns
    -------
    value : float
        ``||parameters - start||^2 / 2``
    gradient : ndarray like `parameters`
        ``parameters - start``

    Raises
    ------
    TypeError
        If an array does not have floats.
    ValueError
        If shapes differ or a number is not finite.

    References
    ----------
    X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks", 2018, equation 2 (L2-SP).

    Examples
    --------
    >>> x, start, step = np.random.default_rng(0).standard_normal((3, 7))
    >>> value, gradient = l2_to_start(x, start)
    >>> sides = [l2_to_start(x + h * step, start)[0] for h in (1e-6, -1e-6)]
    >>> bool(np.isclose((sides[0] - sides[1]) / 2e-6, (gradient * step).sum()))
    True
    """
    x, y = _floats(parameters=parameters, start=start)
    _same_shape(parameters=x, start=y)
    gap = x - y
    return _result((gap * gap).sum() / 2, gap, parameters)
