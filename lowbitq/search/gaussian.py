"""An Optuna sampler: a Gaussian process of the objective, and the point of most expected gain.

Optuna and scikit-learn are needed: ``pip install "lowbitq[search]"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState
from scipy.optimize import minimize
from scipy.special import ndtr

Floats = NDArray[np.float64]

_CANDIDATES = 2048  # points at which the expected gain is compared
_LOCAL = 256  # points around the best of them, at each of these distances
_DISTANCES = (0.1, 0.03, 0.01, 0.003, 0.001)


def expected_improvement(mean: ArrayLike, deviation: ArrayLike, best: float) -> Floats:
    """Return the mean gain over `best` of a normally distributed objective, which is minimised.

    With ``z = (best - mean) / deviation`` it is ``deviation (z Phi(z) + phi(z))``, Phi and phi the
    distribution and density of the standard normal.

    Parameters
    ----------
    mean, deviation : array_like of shape (n,)
        Where the deviation is 0, the gain is ``max(best - mean, 0)``.
    best : float

    Returns
    -------
    ndarray of shape (n,), float64

    References
    ----------
    D. R. Jones, M. Schonlau, W. J. Welch, "Efficient Global Optimization of Expensive Black-Box
    Functions", Journal of Global Optimization 13, 1998, equation 15.

    Examples
    --------
    >>> expected_improvement([0.0, 2.0], [1.0, 0.0], best=0.0).round(6)
    array([0.398942, 0.      ])
    """
    mu, sigma = np.asarray(mean, np.float64), np.asarray(deviation, np.float64)
    gain = best - mu
    z = np.divide(gain, sigma, out=np.zeros(np.broadcast(gain, sigma).shape), where=sigma > 0)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    found = np.where(sigma > 0, gain * ndtr(z) + sigma * density, gain)
    return np.maximum(found, 0)


def posterior(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> tuple[Floats, Floats]:
    """What a Gaussian process fitted to a study's finished trials expects of points.

    Parameters
    ----------
    study : optuna.Study
        Of one objective, with at least two finished trials.
    points : sequence of mapping of str to value
        A value of each parameter that all trials have.

    Returns
    -------
    mean, deviation : ndarray of shape (points,), float64
        Of the objective itself, without the noise of an evaluation.

    Raises
    ------
    ValueError
        If the trials are too few, or a point lacks a parameter.
    """
    space = IntersectionSearchSpace().calculate(study)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < 2:
        raise ValueError(f"the study has {len(done)} finished trials, expected at least 2")
    lacking = {name for point in points for name in space.keys() - point.keys()}
    if lacking:
        raise ValueError(f"points lack {', '.join(sorted(lacking))}, which the trials have")
    cube = _Cube(space)
    seen = np.array([cube.encode(one.params) for one in done])
    predict = _fitted(seen, np.array([one.value for one in done], np.float64))
    return predict(np.array([cube.encode(point) for point in points]))


class GaussianSampler(optuna.samplers.BaseSampler):
    """Bayesian optimisation of one objective: a Gaussian process and expected improvement.

    The process has a Matern 5/2 kernel with a length for each parameter and a noise term, fitted by
    marginal likelihood. The expected improvement over the best posterior mean is maximised over
    quasi-random points, then around the best of them; over all points where they are few. Trials
    that other workers are running count with the mean objective, so that workers spread.

    What it draws depends on the seed, the number of a trial and the trials before, so workers of
    one study may have the same seed, and a study that is resumed goes on as if it had not ended.

    Parameters
    ----------
    seed : int, default=0
    startup : int, default=8
        Trials at quasi-random points before the process is asked.

    Raises
    ------
    ValueError
        If a number is out of range; by a study, if it has several objectives.

    References
    ----------
    J. Snoek, H. Larochelle, R. P. Adams, "Practical Bayesian Optimization of Machine Learning
    Algorithms", 2012. M. Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018
    (the points).
    """

    def __init__(self, seed: int = 0, startup: int = 8) -> None:
        if seed < 0 or startup < 1:
            raise ValueError(f"seed is {seed} and startup {startup}, expected at least 0 and 1")
        self.seed, self.startup = seed, startup

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that all finished trials have."""
        return IntersectionSearchSpace().calculate(study)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return the values of the most promising point."""
        if len(study.directions) != 1:
            raise ValueError(f"the study has {len(study.directions)} objectives, expected 1")
        if not search_space:
            return {}
        cube = _Cube(search_space)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        done = [one for one in done if search_space.keys() <= one.params.keys()]
        rng = np.random.default_rng([self.seed, trial.number])
        if len(done) < self.startup:
            return cube.decode(_quasirandom(trial.number, cube.width, self.seed))
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        values = sign * np.array([one.value for one in done], np.float64)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = [
            one
            for one in running
            if one.number != trial.number and search_space.keys() <= one.params.keys()
        ]
        points = np.array([cube.encode(one.params) for one in [*done, *others]])
        values = np.append(values, np.full(len(others), values.mean()))
        return cube.decode(_most_promising(points, values, cube, rng))

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a quasi-random value of a parameter that no finished trial has."""
        cube = _Cube({param_name: param_distribution})
        known = sum(name < param_name for name in trial.params)
        # Each parameter takes its own axis of the sequence.
        point = _quasirandom(trial.number, known + cube.width, self.seed)[-cube.width :]
        return cube.decode(point)[param_name]


def _most_promising(
    points: Floats, values: Floats, cube: _Cube, rng: np.random.Generator
) -> Floats:
    """Return the point of the cube with the most expected improvement."""
    predict = _fitted(points, values)
    best = float(predict(points)[0].min())

    def gain(candidates: Floats) -> Floats:
        found = expected_improvement(*predict(candidates), best)
        if cube.is_finite:  # nothing is learned from a point twice
            distance = abs(candidates[:, None] - points).max(2).min(1)
            found = np.where(distance < 1e-9, -1.0, found)
        return found

    if cube.points is not None:
        return np.asarray(cube.points[gain(cube.points).argmax()])
    candidates = cube.snap(rng.random((_CANDIDATES, cube.width)))
    found = candidates[gain(candidates).argmax()]
    for distance in _DISTANCES:
        around = found + distance * rng.standard_normal((_LOCAL, cube.width))
        candidates = np.vstack([found, cube.snap(np.clip(around, 0, 1))])
        found = candidates[gain(candidates).argmax()]
    return np.asarray(found, np.float64)


def _fitted(points: Floats, values: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
    """Fit the process; return what predicts mean and deviation at points."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    lengths = np.full(points.shape[1], 0.5)
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(lengths, (0.02, 20.0), nu=2.5)
    kernel += WhiteKernel(1e-4, (1e-8, 1.0))

    def likeliest(loss: Any, start: Floats, bounds: Floats) -> tuple[Floats, float]:
        # To the last digit it takes three times as long, and the points are no better.
        options = {"maxiter": 15}
        found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
        return found.x, found.fun

    process = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=likeliest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound
        process.fit(points, values)

    def predict(at: Floats) -> tuple[Floats, Floats]:
        mean, deviation = process.predict(at, return_std=True)
        # Without the noise of a single evaluation.
        noise = process.kernel_.k2.noise_level * np.var(values)
        return mean, np.sqrt(np.maximum(deviation**2 - noise, 0))

    return predict


def _quasirandom(number: int, width: int, seed: int) -> Floats:
    """Point `number` of a sequence that fills the unit cube evenly, moved by the seed."""
    root = 2.0
    for _ in range(60):  # the root of x^(width + 1) = x + 1, by fixed-point iteration
        root = (1 + root) ** (1 / (width + 1))
    steps = root ** -np.arange(1.0, width + 1)
    start = np.random.default_rng(seed).random(width)
    return np.asarray((start + number * steps) % 1)


class _Cube:
    """Parameters as points of a unit cube: an axis for a number, one for each other choice."""

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self._space = dict(sorted(space.items()))
        self.width = sum(_width(one) for one in self._space.values())
        sizes = [_count(one) for one in self._space.values()]
        self.is_finite = None not in sizes
        self.points: Floats | None = None  # all of them, where they are few
        if self.is_finite and np.prod([float(size or 0) for size in sizes]) <= _CANDIDATES:
            every = product(*map(_all_values, self._space.values()))
            names = list(self._space)
            points = [self.encode(dict(zip(names, one, strict=True))) for one in every]
            self.points = np.array(points)

    def encode(self, values: Mapping[str, Any]) -> Floats:
        parts = [_encode(values[name], one) for name, one in self._space.items()]
        return np.concatenate(parts)

    def decode(self, point: Floats) -> dict[str, Any]:
        found, at = {}, 0
        for name, one in self._space.items():
            found[name] = _decode(point[at : at + _width(one)], one)
            at += _width(one)
        return found

    def snap(self, points: Floats) -> Floats:
        """Return the points of values nearest to these."""
        parts, at = [], 0
        for one in self._space.values():
            parts.append(_snap(points[:, at : at + _width(one)], one))
            at += _width(one)
        return np.hstack(parts)


def _numbers(one: CategoricalDistribution) -> Floats | None:
    """The choices, if all are different numbers."""
    if any(isinstance(c, bool) or not isinstance(c, (int, float)) for c in one.choices):
        return None
    choices = np.array(one.choices, np.float64)
    return choices if len(np.unique(choices)) == len(choices) > 1 else None


def _width(one: BaseDistribution) -> int:
    if isinstance(one, CategoricalDistribution) and _numbers(one) is None:
        return len(one.choices)
    return 1


def _count(one: BaseDistribution) -> int | None:
    """Number of values; None: no end."""
    if isinstance(one, CategoricalDistribution):
        return len(one.choices)
    assert isinstance(one, (FloatDistribution, IntDistribution))
    return None if one.step is None else round((one.high - one.low) / one.step) + 1


def _all_values(one: BaseDistribution) -> Sequence[Any]:
    if isinstance(one, CategoricalDistribution):
        return one.choices
    assert isinstance(one, (FloatDistribution, IntDistribution))
    step: float = one.step or 1
    kind = type(one.low)
    return [kind(one.low + index * step) for index in range(_count(one) or 0)]


def _snap(columns: Floats, one: BaseDistribution) -> Floats:
    """Return the coordinates (n, width) of the values nearest to these."""
    if isinstance(one, CategoricalDistribution):
        choices = _numbers(one)
        if choices is None:
            return np.asarray(np.eye(len(one.choices))[columns.argmax(1)])
        levels = (choices - choices.min()) / np.ptp(choices)
        return np.asarray(levels[abs(columns - levels).argmin(1)][:, None])
    assert isinstance(one, (FloatDistribution, IntDistribution))
    return columns if one.step is None else _axis(_value(columns, one), one)


def _axis(values: Floats, one: FloatDistribution | IntDistribution) -> Floats:
    """Values to 0..1."""
    scale = np.log if one.log else np.asarray
    low, high = float(scale(one.low)), float(scale(one.high))
    return np.asarray((scale(values) - low) / (high - low) if high > low else 0.0 * values + 0.5)


def _value(axis: Floats, one: FloatDistribution | IntDistribution) -> Floats:
    """0..1 to the nearest values."""
    scale = np.log if one.log else np.asarray
    low, high = float(scale(one.low)), float(scale(one.high))
    values = low + axis * (high - low)
    values = np.clip(np.exp(values) if one.log else values, one.low, one.high)
    if one.step is None:
        return np.asarray(values)
    return np.minimum(one.low + np.round((values - one.low) / one.step) * one.step, one.high)


def _encode(value: Any, one: BaseDistribution) -> Floats:
    if isinstance(one, CategoricalDistribution):
        choices = _numbers(one)
        if choices is None:
            return np.array([float(value == choice) for choice in one.choices])
        return np.array([(value - choices.min()) / np.ptp(choices)])
    assert isinstance(one, (FloatDistribution, IntDistribution))
    return _axis(np.array([value], np.float64), one)


def _decode(point: Floats, one: BaseDistribution) -> Any:
    if isinstance(one, CategoricalDistribution):
        choices = _numbers(one)
        if choices is None:
            return one.choices[int(point.argmax())]
        levels = (choices - choices.min()) / np.ptp(choices)
        return one.choices[int(abs(levels - point[0]).argmin())]
    assert isinstance(one, (FloatDistribution, IntDistribution))
    value = float(_value(point, one)[0])
    return round(value) if isinstance(one, IntDistribution) else value
