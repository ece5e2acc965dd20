"""Rotations fitted to inputs, against SciPy and against the alternation in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.linears import Activation
from lowbitq.procrustes import optimize_rotation, procrustes
from lowbitq.rotation_scores import token_errors
from lowbitq.rotations import Rotation


def inputs_of(tokens, n, seed, *, massive=0):
    """Tokens with correlated columns, as a norm returns them; the first ones are nearly a spike."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(n).standard_normal((n, n)) / np.sqrt(n)
    x = rng.standard_normal((tokens, n)) @ mix
    x[:massive, 3] = 400
    return (x / np.sqrt(np.square(x).mean(1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize(("tokens", "n"), [(1, 1), (5, 3), (40, 16), (30, 33)])
@pytest.mark.parametrize("weighted", [False, True])
def test_procrustes_equals_scipy(tokens, n, weighted):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng([tokens, n])
    a = rng.standard_normal((tokens, n))
    b = a @ Rotation(n, "orthogonal", seed=1).matrix() + rng.standard_normal((tokens, n)) / 4
    weights = rng.uniform(0, 3, tokens) if weighted else None
    matrix, scale = procrustes(a, b, weights)
    root = np.sqrt(weights if weighted else np.ones(tokens))[:, None]
    expected, size = linalg.orthogonal_procrustes(root * a, root * b)
    assert np.isclose(scale, size, rtol=1e-12)
    if tokens >= n:  # else several matrices are nearest
        assert abs(matrix - expected).max() <= 1e-5
    distance = [np.linalg.norm(root * (a @ R - b)) for R in (matrix, expected)]
    assert np.isclose(*distance, rtol=1e-10)


def test_procrustes_refuses():
    a = np.ones((3, 2))
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\), b \(2, 3\)"):
        procrustes(a, a.T)
    with pytest.raises(ValueError, match="expected 3 numbers >= 0"):
        procrustes(a, a, [1, -1, 1])
    with pytest.raises(ValueError, match="expected finite"):
        procrustes(a, a * np.nan)


def rounded(z):
    """To 4 bits, a symmetric scale for each token."""
    step = abs(z).max(1, keepdims=True) / 7
    return step * np.rint(z / step)


@pytest.mark.parametrize(("massive", "rounds"), [(0, 20), (5, 12)])
def test_rounds_equal_the_alternation_in_float64(massive, rounds):
    """DFRot's algorithm 1: B = Q(X R^T), then R from the singular vectors of B^T W X."""
    x = inputs_of(300, 24, 0, massive=massive)
    weights = np.where(np.arange(len(x)) < massive, 100.0, 1.0)
    found = optimize_rotation(x, group=None, rounds=rounds)
    assert found.massive == massive
    assert len(found.history) == rounds + 1
    matrix, history = Rotation(24).matrix().astype(float), []
    for _ in found.history:
        turned = x @ matrix.T
        b = rounded(turned)
        errors = np.square(b - turned).sum(1) / np.square(x.astype(float)).sum(1).mean()
        history.append((weights * errors).sum() / weights.sum())
        u, _, vt = np.linalg.svd((b * weights[:, None]).T @ x)
        matrix, before = u @ vt, matrix
    assert abs(found.rotation.matrix() - before).max() <= 1e-4
    assert np.allclose(found.history, history, rtol=1e-4)


@pytest.mark.parametrize("target", ["mean", "max", 0.9, 0.99])
@pytest.mark.parametrize("start", ["hadamard", "orthogonal"])
def test_the_target_never_rises_and_is_what_the_errors_say(target, start):
    x = inputs_of(600, 20, 1, massive=2)
    found = optimize_rotation(x, start=start, target=target, group=16, rounds=12)
    assert found.history[-1] < found.history[0]
    assert (np.diff(found.history) <= 0).all()
    matrix = found.rotation.matrix().astype(float)
    assert abs(matrix @ matrix.T - np.eye(20)).max() < 1e-5
    errors = token_errors(x, found.rotation, group=16)
    weights = np.where(np.arange(len(x)) < 2, 100.0, 1.0)
    if target == "mean":
        expected = np.average(errors, weights=weights)
    elif target == "max":
        expected = errors.max()
    else:  # each token as often as it counts
        expected = np.quantile(np.repeat(errors, weights.astype(int)), target, method="higher")
    assert np.isclose(found.history[-1], expected, rtol=1e-3)


def test_massive_tokens_gain_when_they_count_more_and_others_lose_nothing():
    x, other = inputs_of(2000, 32, 2, massive=16), inputs_of(2000, 32, 3, massive=16)
    light, heavy = (
        token_errors(other, optimize_rotation(x, rounds=15, massive_weight=weight).rotation)
        for weight in (1, 100)
    )
    assert heavy[:16].mean() < 0.7 * light[:16].mean()
    assert heavy[16:].mean() < 1.02 * light[16:].mean()


def test_a_target_is_reached_best_by_its_own_rotation_on_other_tokens():
    """Tokens of two kinds: a tenth of them, along a few directions, have the largest errors."""
    rng = np.random.default_rng(8)
    axes = np.random.default_rng(9).standard_normal((3, 32))
    parts = []
    for _ in range(2):
        x = rng.standard_normal((4000, 32))
        x[:400] = 3 * rng.choice([-2.0, -1.0, 1.0, 2.0], (400, 3)) @ axes / np.sqrt(3)
        parts.append((x + rng.standard_normal(x.shape) / 20).astype(np.float32))
    x, other = parts
    mean, tail = (
        token_errors(
            other, optimize_rotation(x, target=target, rounds=30, massive_weight=1).rotation
        )
        for target in ("mean", 0.99)
    )
    assert np.quantile(tail, 0.99) < np.quantile(mean, 0.99)
    assert mean.mean() < tail.mean()


def test_held_out_inputs_choose_the_round():
    """Fewer tokens than columns are learnt by heart, which says nothing about others."""
    x, other = inputs_of(20, 64, 4), inputs_of(500, 64, 5)
    start = Rotation(64, seed=2)
    found = optimize_rotation(x, start=start, rounds=6, held_out=other)
    assert len(found.held_out) == len(found.history) > 1
    best = np.average(token_errors(other, found.rotation))
    assert np.isclose(best, min(found.held_out), rtol=1e-3)
    alone = optimize_rotation(x, start=start, rounds=6)
    assert alone.history == found.history
    assert alone.held_out == ()
    none = optimize_rotation(x, start=start, rounds=0)
    assert none.rotation is start
    assert len(none.history) == 1


def test_directions_without_tokens_stay():
    x = inputs_of(300, 16, 6)
    x[:, 10:] = 0
    start = Rotation(16, "orthogonal", seed=4)
    found = optimize_rotation(x, start=start, rounds=1, massive_weight=1)
    turn = found.rotation.matrix() @ start.matrix().T  # R = turn start
    u = start.matrix().T[10:]  # images of directions without tokens
    kept = found.rotation.matrix().T[10:]
    assert (np.einsum("ij,ij->i", u, kept) > 0.9).all(), turn


def test_refusals():
    x = inputs_of(8, 4, 7)
    with pytest.raises(TypeError, match="float32"):
        optimize_rotation(x.astype(float))
    with pytest.raises(ValueError, match=r"held_out has shape \(8, 3\)"):
        optimize_rotation(x, held_out=x[:, :3].copy())
    with pytest.raises(ValueError, match="start has order 5, expected 4"):
        optimize_rotation(x, start=Rotation(5))
    with pytest.raises(ValueError, match="target is 'p99'"):
        optimize_rotation(x, target="p99")
    with pytest.raises(ValueError, match="rounds nothing"):
        optimize_rotation(x, activation=Activation(None))
    with pytest.raises(ValueError, match="massive_weight is -1"):
        optimize_rotation(x, massive_weight=-1)
    with pytest.raises(ValueError, match="all tokens are massive"):
        optimize_rotation(x, massive_weight=0, massive_ratio=0)
