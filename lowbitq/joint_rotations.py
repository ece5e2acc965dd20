"""Rotations of a layer's copies, optimised together so that their errors cancel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import NumericalError
from lowbitq.copies import LayerInputs
from lowbitq.encoding import check_plan, encode
from lowbitq.formats import Format
from lowbitq.gptq import product
from lowbitq.linears import Copy, Linear, QuantizedLinear
from lowbitq.plans import LayerPlan
from lowbitq.procrustes import nearest
from lowbitq.rotations import Rotation

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

DIVERSITIES = ("logdet", "orthogonal")
OBJECTIVES = ("fused", "each")
# The pull towards the previous rotation where a step raised the loss, in root mean square singular
# values. A copy is encoded once for each, so there are few.
_PULLS = (1e-9, 0.1, 1.0, 10.0)


def log_det_loss(gram: Float64) -> tuple[float, Float64]:
    """How alike the errors of copies are: ``-log det C`` of their correlations C, not centred.

    Parameters
    ----------
    gram : ndarray of shape (copies, copies), float64
        Inner products G of the errors; ``C = D^-1/2 G D^-1/2`` with the diagonal D of G.

    Returns
    -------
    value : float
        At least 0, up to rounding; infinity for dependent errors.
    gradient : ndarray of shape (copies, copies)
        By G: ``D^-1 - G^-1``; zeros where the value is infinite.

    References
    ----------
    A. Kulesza, B. Taskar, "Determinantal Point Processes for Machine Learning", 2012, section 2.2.

    Examples
    --------
    >>> value, _ = log_det_loss(np.array([[1.0, 0.5], [0.5, 1.0]]))
    >>> bool(np.isclose(value, -np.log(1 - 0.5**2)))
    True
    """
    size = np.diagonal(gram)
    if not (size > 0).all():
        return 0.0, np.zeros_like(gram)  # nothing to be diverse
    C = gram / np.sqrt(np.outer(size, size))
    sign, value = np.linalg.slogdet(C)
    if sign <= 0:
        return float("inf"), np.zeros_like(gram)
    return -float(value), np.diag(1 / size) - np.linalg.inv(gram)


def overlap_loss(errors: Sequence[Float64]) -> tuple[float, list[Float64]]:
    """How far the errors of copies are from orthogonal: the sum of ``||E_i^T E_j||_F / (e_i e_j)``.

    Parameters
    ----------
    errors : sequence of ndarray of shape (rows, cols), float64

    Returns
    -------
    value : float
        Over all pairs; ``e_i = ||E_i||_F``.
    gradients : list of ndarray of shape (rows, cols)
        By each error.

    Examples
    --------
    >>> value, _ = overlap_loss([np.eye(2), np.eye(2)])
    >>> bool(np.isclose(value, np.sqrt(2) / 2))
    True
    """
    value, gradients = 0.0, [np.zeros_like(E) for E in errors]
    sizes = [float(np.sqrt(np.square(E).sum())) for E in errors]
    for i in range(len(errors)):
        for j in range(i):
            whole = sizes[i] * sizes[j]
            M = _turned_product(errors[i], errors[j])
            norm = float(np.sqrt(np.square(M).sum()))
            if not norm or not whole:
                continue
            value += norm / whole
            by_i = product(errors[j], M) / norm  # E_j M^T
            by_j = product(errors[i], np.ascontiguousarray(M.T)) / norm
            gradients[i] += by_i / whole - norm / whole * errors[i] / sizes[i] ** 2
            gradients[j] += by_j / whole - norm / whole * errors[j] / sizes[j] ** 2
    return value, gradients


def _turned_product(a: Float64, b: Float64) -> Float64:
    """Return a^T b."""
    return product(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))


@dataclass(frozen=True, eq=False)
class JointRotations:
    """What `optimize_copies` found.

    Attributes
    ----------
    rotations : tuple of Rotation
        One for each copy.
    layer : QuantizedLinear
        The layer with these copies, averaged.
    history : tuple of float
        The loss at the start and after each round; it never rises.
    error : float
        Relative squared error of the averaged outputs in the end.
    errors : tuple of float
        The same of each copy alone.
    correlations : ndarray of shape (copies, copies)
        Of the copies' errors in the outputs, not centred.
    """

    rotations: tuple[Rotation, ...]
    layer: QuantizedLinear
    history: tuple[float, ...]
    error: float
    errors: tuple[float, ...]
    correlations: Float64 = field(repr=False)


def optimize_copies(
    weight: Float32,
    plan: LayerPlan | Format | str,
    hessian: Float64 | None = None,
    *,
    copies: int = 2,
    objective: str = "fused",
    strength: float = 0.0,
    diversity: str = "logdet",
    rounds: int = 20,
    seed: int = 0,
) -> JointRotations:
    """Find rotations for several quantized copies of a layer whose outputs are averaged.

    With ``W_i = round(W R_i^T) R_i`` the loss is ``L_quant + strength L_diversity``, where
    ``L_quant = |mean_i W_i - W|^2 / |W|^2`` in the norm of the inputs. The copies take turns: the
    words of one stay, and R_i becomes the orthogonal matrix that takes them nearest to what the
    other copies leave of W; then the copy is encoded again. Steps that raise the loss are tried
    again with a pull towards the previous R_i, or not taken.

    Parameters
    ----------
    weight : ndarray of shape (rows, cols), float32
    plan : LayerPlan, Format or str
        How each copy is quantized, such as ``"int2g64"``: one copy, no adapter.
    hessian : ndarray of shape (cols, cols), float64, default=None
        ``sum x x^T`` over the inputs, symmetric. None: the identity, for rounding to nearest only.
    copies : int, default=2
    objective : {"fused", "each"}, default="fused"
        ``"fused"``: L_quant as above. ``"each"``: the mean of ``|W_i - W|^2 / |W|^2``, so that
        copies meet in the diversity only and without it are independent.
    strength : float, default=0.0
        Weight of the diversity. With "fused" the errors cancel without it; see `tune_strength`.
    diversity : {"logdet", "orthogonal"}, default="logdet"
        Of the errors ``E_i = W_i - W``: `log_det_loss` in the norm of the inputs, or
        `overlap_loss`.
    rounds : int, default=20
        Largest number of rounds; it ends early if no copy moves.
    seed : int, default=0
        Copy i starts from the Hadamard rotation of seed ``seed + i``.

    Returns
    -------
    JointRotations

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or an option is out of range.
    NumericalError
        If `strength` is above 0 and the copies' errors are dependent at the start.

    Notes
    -----
    An optimised R_i is a dense matrix of cols^2 numbers, which the layer multiplies by as it runs.
    It pays where many layers share it, or to learn how far rotations could go. k_proj of block 5 of
    SmolLM2 (192 x 576) in int2g64 by gptq, two copies, 5 rounds, 6 windows of 512 tokens: L_quant
    falls from .0051 to .0029 and on two other windows to .0040; copies optimised by "each" reach
    the same. A strength up to .01 changes little, .1 makes it worse (.0045).

    The step for R_i minimises ``|T - c Q R_i|^2`` with the words Q and the target T. In the norm of
    a Hessian H its quadratic part is bounded from above by its tangent at the previous R_i and the
    largest eigenvalue a of Q^T Q, which leaves a Procrustes problem with the moment
    ``c Q^T (T - c Q R_i) H + c^2 a R_i H``.

    References
    ----------
    P. Schoenemann, "A generalized solution of the orthogonal Procrustes problem", 1966; J. Xiang,
    S. Zhang, "DFRot", 2024, for one rotation.

    Examples
    --------
    >>> w = np.random.default_rng(0).standard_normal((32, 32), np.float32)
    >>> found = optimize_copies(w, "int2g32", np.eye(32), rounds=3)
    >>> found.history[-1] < found.history[0] and found.error < min(found.errors)
    True
    """
    task = _Task(weight, plan, hessian, objective, strength, diversity)
    if not copies >= 1:
        raise ValueError(f"copies is {copies}, expected at least 1")
    if not rounds >= 0:
        raise ValueError(f"rounds is {rounds}, expected at least 0")
    cols = weight.shape[1]
    made = [task.encoded(Rotation(cols, seed=seed + i)) for i in range(copies)]
    loss = task.loss(made)
    if not np.isfinite(loss):
        raise NumericalError("the errors of the copies are linearly dependent")
    history = [loss]
    for _ in range(rounds):
        before = made
        for i in range(copies):
            moment = task.moment(made, i)
            size = np.sqrt(np.square(moment).sum() / cols)
            for pull in _PULLS:
                matrix, _ = nearest(moment + pull * size * made[i].matrix)
                turn = Rotation.from_matrix(matrix.astype(np.float32))
                tried = [*made[:i], task.encoded(turn), *made[i + 1 :]]
                found = task.loss(tried)
                if found < loss:
                    made, loss = tried, found
                    break
        if made is before:
            break
        history.append(loss)
    gram = task.gram(made) / task.size
    share = np.full(len(weight), 1 / copies, np.float32)
    layer = QuantizedLinear(tuple(replace(one.copy, weight=share) for one in made))
    scale = np.sqrt(np.diagonal(gram))
    with np.errstate(invalid="ignore"):
        correlations = gram / np.outer(scale, scale)
    return JointRotations(
        tuple(one.rotation for one in made),
        layer,
        tuple(history),
        float(gram.mean()),
        tuple(np.diagonal(gram).tolist()),
        correlations,
    )


def tune_strength(
    weight: Float32,
    plan: LayerPlan | Format | str,
    hessian: Float64,
    held_out: Float64,
    *,
    strengths: Sequence[float] = (0.0, 0.001, 0.01, 0.1),
    **options: Any,
) -> tuple[JointRotations, dict[float, float]]:
    """Choose the weight of the diversity by the error of the averaged copies on other inputs.

    Parameters
    ----------
    weight, plan, hessian
        As for `optimize_copies`.
    held_out : ndarray of shape (cols, cols), float64
        ``sum x x^T`` over other inputs, symmetric.
    strengths : sequence of float
        What is tried, each once.
    **options
        Of `optimize_copies`.

    Returns
    -------
    found : JointRotations
        The best.
    errors : dict of float to float
        By strength: relative squared error of the averaged outputs on the other inputs.

    Raises
    ------
    ValueError
        As for `optimize_copies`, or if `held_out` does not fit or `strengths` is empty.

    Examples
    --------
    >>> w, x = np.random.default_rng(0).standard_normal((2, 64, 32), np.float32)
    >>> H = (x.T @ x).astype(np.float64)
    >>> _, errors = tune_strength(w, "int2g32", H, H, rounds=1)
    >>> list(errors)
    [0.0, 0.001, 0.01, 0.1]
    """
    if held_out.shape != hessian.shape or not strengths:
        raise ValueError(
            f"held_out has shape {held_out.shape} and strengths {list(strengths)}, "
            f"expected {hessian.shape} and at least one"
        )
    wide, errors = weight.astype(np.float64), {}
    best: JointRotations | None = None
    for strength in strengths:
        found = optimize_copies(weight, plan, hessian, strength=strength, **options)
        error = found.layer.dequantize() - wide
        sizes = [float((product(x, held_out) * x).sum()) for x in (error, wide)]
        errors[strength] = sizes[0] / sizes[1] if sizes[1] else 0.0
        if best is None or errors[strength] == min(errors.values()):
            best = found
    assert best is not None
    return best, errors


@dataclass(frozen=True, eq=False)
class _Made:
    """A copy encoded in its rotation."""

    rotation: Rotation
    matrix: Float64  # R
    copy: Copy
    words: Float64  # Q, the decoded words; Q R stands for W
    error: Float64  # E = Q R - W
    seen: Float64  # E H


class _Task:
    """A layer, and how its copies are encoded and judged."""

    def __init__(
        self,
        weight: Float32,
        plan: LayerPlan | Format | str,
        hessian: Float64 | None,
        objective: str,
        strength: float,
        diversity: str,
    ) -> None:
        if not isinstance(weight, np.ndarray) or weight.dtype != np.float32 or weight.ndim != 2:
            raise ValueError("weight is not a matrix of float32")
        if not np.isfinite(weight).all() or not weight.any():
            raise ValueError("weight has a NaN or an infinity, or only zeros")
        for name, value, choices in (
            ("objective", objective, OBJECTIVES),
            ("diversity", diversity, DIVERSITIES),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
        if not 0 <= strength < np.inf:
            raise ValueError(f"strength is {strength}, expected a finite number, at least 0")
        cols = weight.shape[1]
        if hessian is not None and hessian.shape != (cols, cols):
            raise ValueError(f"hessian has shape {hessian.shape}, expected ({cols}, {cols})")
        self._weight, self._plan = weight, LayerPlan.parse(plan)
        check_plan(self._plan, weight.shape, "weight")
        if self._plan.rank:
            raise ValueError(f"plan is '{self._plan}', expected no adapter")
        if hessian is None and self._plan.rounding.method != "rtn":
            raise ValueError("hessian is None, but the plan rounds by gptq; expected method 'rtn'")
        self._hessian, self._fused = hessian, objective == "fused"
        self._strength, self._diversity = float(strength), diversity
        self._wide = weight.astype(np.float64)
        self.size = float((self._in_norm(self._wide) * self._wide).sum())

    def _in_norm(self, x: Float64) -> Float64:
        """Return x H."""
        return x if self._hessian is None else product(x, self._hessian)

    def encoded(self, rotation: Rotation) -> _Made:
        """Return the copy in this rotation."""
        matrix = rotation.matrix().astype(np.float64)
        inputs = LayerInputs()
        if self._hessian is not None and self._plan.rounding.method != "rtn":
            inputs = LayerInputs(product(product(matrix, self._hessian), matrix))
        turned = Linear(rotation.apply(self._weight), rotation=rotation)
        layer, _ = encode(turned, inputs, self._plan)
        [copy] = layer.copies
        words = copy.tensor.dequantize().astype(np.float64)
        error = product(words, np.ascontiguousarray(matrix.T)) - self._wide
        return _Made(rotation, matrix, copy, words, error, self._in_norm(error))

    def gram(self, made: Sequence[_Made]) -> Float64:
        """Return the inner products of the copies' errors in the outputs."""
        found = [[float((one.seen * other.error).sum()) for other in made] for one in made]
        return np.array(found)

    def loss(self, made: Sequence[_Made]) -> float:
        """Return ``L_quant + strength L_diversity``."""
        gram = self.gram(made) / self.size
        error = float(gram.mean() if self._fused else np.diagonal(gram).mean())
        if not self._strength:
            return error
        if self._diversity == "logdet":
            return error + self._strength * log_det_loss(gram)[0]
        return error + self._strength * overlap_loss([one.error for one in made])[0]

    def moment(self, made: Sequence[_Made], i: int) -> Float64:
        """Return the matrix whose polar factor is the next rotation of copy i."""
        count, one = len(made), made[i]
        share = 1 / count if self._fused else 1.0
        # What copy i's own part lacks, T - share Q R_i: minus the error that the loss measures.
        lack = -one.seen if not self._fused else -sum(other.seen for other in made) / count
        if self._strength:
            # The loss has 1 / size before the squares, with "each" also 1 / count.
            unit = self.size if self._fused else self.size * count
            lack = lack - self._strength * unit / (2 * share) * self._pressure(made, i)
        back = _turned_product(one.words, np.ascontiguousarray(lack))
        own = one.matrix if self._hessian is None else product(one.matrix, self._hessian)
        gram = _turned_product(one.words, one.words)
        value, vector = np.empty(1), np.empty((1, len(gram)))
        _core.leading_eigenvectors(gram.copy(), None, value, vector)
        if self._hessian is None:  # the quadratic part is constant: no bound is needed
            return share * back + share**2 * product(gram, np.ascontiguousarray(one.matrix.T))
        return share * back + share**2 * float(value[0]) * own

    def _pressure(self, made: Sequence[_Made], i: int) -> Float64:
        """Return the gradient of the diversity by the error of copy i."""
        if self._diversity == "orthogonal":
            return overlap_loss([one.error for one in made])[1][i]
        _, by_gram = log_det_loss(self.gram(made))
        total = np.zeros_like(self._wide)
        for j, other in enumerate(made):
            total += 2 * by_gram[i, j] * other.seen
        return total
