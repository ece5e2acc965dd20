"""The Gaussian process sampler: the formula of its gain, and how fast it finds known minima."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from scipy.stats import norm

from lowbitq.search.gaussian import GaussianSampler, expected_improvement, posterior

optuna.logging.set_verbosity(optuna.logging.WARNING)


def branin(trial):
    """Three minima of 0.397887."""
    x, y = trial.suggest_float("x", -5, 10), trial.suggest_float("y", 0, 15)
    curve = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return curve**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def test_expected_improvement_is_its_closed_form():
    rng = np.random.default_rng(0)
    mean, deviation = rng.normal(size=1000) * 3, rng.exponential(size=1000)
    z = (0.3 - mean) / deviation
    expected = deviation * (z * norm.cdf(z) + norm.pdf(z))
    assert abs(expected_improvement(mean, deviation, 0.3) - expected).max() < 1e-12
    certain = expected_improvement([0.0, 1.0], [0.0, 0.0], 0.3)
    assert np.array_equal(certain, [0.3, 0.0])


def test_expected_improvement_is_the_mean_gain():
    draws = np.random.default_rng(1).normal(0.5, 0.7, 10**6)
    gain = np.maximum(0.2 - draws, 0)
    four = 4 * gain.std() / 1000
    assert expected_improvement(0.5, 0.7, 0.2) == pytest.approx(gain.mean(), abs=four)


def test_branin():
    study = optuna.create_study(sampler=GaussianSampler())
    study.optimize(branin, n_trials=50)
    assert study.best_value == pytest.approx(0.397887, abs=1e-2)


def test_the_posterior_passes_through_what_was_seen():
    study = optuna.create_study(sampler=GaussianSampler())
    with pytest.raises(ValueError, match="study has 0 finished trials"):
        posterior(study, [{"x": 0.5}])
    study.optimize(lambda trial: np.sin(6 * trial.suggest_float("x", 0, 1)), n_trials=12)
    seen = [trial.params for trial in study.trials]
    mean, deviation = posterior(study, seen)
    assert np.allclose(mean, [trial.value for trial in study.trials], atol=1e-2)
    between = [{"x": x} for x in np.linspace(0, 1, 50)]
    mean, unsure = posterior(study, between)
    errors = mean - np.sin([6 * point["x"] for point in between])
    assert (abs(errors) <= 4 * unsure + 1e-3).all()
    assert deviation.max() < unsure.max()
    with pytest.raises(ValueError, match="points lack x"):
        posterior(study, [{"y": 1}])


def test_a_maximum_is_found_too():
    study = optuna.create_study(sampler=GaussianSampler(), direction="maximize")
    study.optimize(lambda trial: -((trial.suggest_float("x", -1, 2) - 0.7) ** 2), n_trials=20)
    assert study.best_params["x"] == pytest.approx(0.7, abs=1e-2)


def mixed(trial):
    """Every kind of parameter; the minimum is 0, of 5 x 3 x 9 values and two ranges."""
    near = (trial.suggest_categorical("a", [0.8, 0.9, 1.0, 1.1, 1.2]) - 1.1) ** 2
    kind = {"red": 0.3, "green": 0.0, "blue": 0.5}[
        trial.suggest_categorical("b", ["red", "green", "blue"])
    ]
    whole = (trial.suggest_int("c", 0, 8) - 5) ** 2 / 30
    power = np.log10(trial.suggest_float("d", 1e-4, 1.0, log=True) / 1e-2) ** 2 / 10
    step = (trial.suggest_float("e", 0, 1, step=0.25) - 0.75) ** 2
    return near + kind + whole + power + step


def test_every_kind_of_parameter():
    study = optuna.create_study(sampler=GaussianSampler(2))
    study.optimize(mixed, n_trials=60)
    assert study.best_value < 0.02
    assert {key: study.best_params[key] for key in "abce"} == {
        "a": 1.1,
        "b": "green",
        "c": 5,
        "e": 0.75,
    }


def ranks(trial):
    """A planted choice of ranks for six layers: error falls with each rank, bytes cost."""
    best = [0, 4, 8, 2, 6, 8]
    found = [trial.suggest_int(f"rank{i}", 0, 8, step=2) for i in range(6)]
    return sum((f - b) ** 2 * (1 + i / 4) for i, (f, b) in enumerate(zip(found, best, strict=True)))


def test_planted_ranks_are_found():
    study = optuna.create_study(sampler=GaussianSampler(0))
    study.optimize(ranks, n_trials=60, callbacks=[lambda s, t: t.value == 0 and s.stop()])
    assert study.best_value == 0


def test_points_of_a_finite_space_are_not_repeated():
    study = optuna.create_study(sampler=GaussianSampler(0))

    def objective(trial):
        return trial.suggest_int("x", 0, 4) + 10 * trial.suggest_categorical("y", [0.0, 1.0, 4.0])

    study.optimize(objective, n_trials=15)
    after = [tuple(trial.params.values()) for trial in study.trials][8:]
    assert len(set(after)) == len(after)
    assert study.best_value == 0


def test_the_same_seed_and_trials_give_the_same_points():
    """Also if the study ended and was resumed with another sampler object."""
    whole = optuna.create_study(sampler=GaussianSampler(4))
    whole.optimize(branin, n_trials=14)
    parts = optuna.create_study()
    for _ in range(2):
        parts.sampler = GaussianSampler(4)
        parts.optimize(branin, n_trials=7)
    assert [trial.params for trial in whole.trials] == [trial.params for trial in parts.trials]
    other = optuna.create_study(sampler=GaussianSampler(5))
    other.optimize(branin, n_trials=1)
    assert other.trials[0].params != whole.trials[0].params


def test_workers_spread():
    """Points asked for at once differ, before and after the process is asked."""
    study = optuna.create_study(sampler=GaussianSampler(0, startup=4))
    study.optimize(branin, n_trials=6)
    asked = [study.ask() for _ in range(3)]
    for trial in asked:
        branin(trial)
    points = [np.array([trial.params["x"], trial.params["y"]]) for trial in asked]
    assert min(np.linalg.norm(a - b) for a in points for b in points if a is not b) > 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        GaussianSampler(-1)
    study = optuna.create_study(sampler=GaussianSampler(), directions=["minimize", "minimize"])
    with pytest.raises(ValueError, match="2 objectives, expected 1"):
        study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 0.0), n_trials=2)
