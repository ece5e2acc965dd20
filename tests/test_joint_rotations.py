"""Copies whose rotations are optimised together, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.joint_rotations import log_det_loss, optimize_copies, overlap_loss, tune_strength
from lowbitq.losses import diversity_loss
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
from lowbitq.rotations import Rotation

NEAREST = LayerPlan.parse("int2g32", Rounding(method="rtn"))
ROWS, COLS = 48, 32


def hessian_of(seed, tokens=300):
    mix = np.random.default_rng(0).standard_normal((COLS, COLS)) / np.arange(1, COLS + 1)[:, None]
    x = np.random.default_rng(seed).standard_normal((tokens, COLS)) @ mix
    return x.T @ x


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(7).standard_normal((ROWS, COLS), dtype=np.float32)


def errors_of(found, weight, copies):
    return [copies * copy.dequantize().astype(float) - weight for copy in found.layer.copies]


@pytest.mark.parametrize("objective", ["fused", "each"])
@pytest.mark.parametrize(
    ("strength", "diversity"), [(0, "logdet"), (0.1, "logdet"), (0.1, "orthogonal")]
)
@pytest.mark.parametrize("known", [False, True])
def test_the_loss_is_its_definition_and_never_rises(weight, objective, strength, diversity, known):
    H = hessian_of(1) if known else None
    found = optimize_copies(
        weight, NEAREST, H, objective=objective, strength=strength, diversity=diversity, rounds=6
    )
    assert found.history[-1] < found.history[0]
    assert (np.diff(found.history) < 0).all()
    norm = np.eye(COLS) if H is None else H
    E = errors_of(found, weight, 2)
    size = np.trace(weight @ norm @ weight.T.astype(float))
    gram = np.array([[np.trace(a @ norm @ b.T) for b in E] for a in E]) / size
    expected = gram.mean() if objective == "fused" else np.diag(gram).mean()
    rho = gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1])
    if diversity == "logdet":
        expected -= strength * np.log(1 - rho**2)
    else:
        overlap = np.linalg.norm(E[0].T @ E[1])
        expected += strength * overlap / (np.linalg.norm(E[0]) * np.linalg.norm(E[1]))
    assert np.isclose(found.history[-1], expected, rtol=1e-4)
    assert np.isclose(found.error, gram.mean(), rtol=1e-4)
    assert np.allclose(found.errors, np.diag(gram), rtol=1e-4)
    assert np.allclose(found.correlations, [[1, rho], [rho, 1]], atol=1e-4)
    for rotation in found.rotations:
        matrix = rotation.matrix().astype(float)
        assert abs(matrix @ matrix.T - np.eye(COLS)).max() < 1e-5


def test_the_layer_is_the_mean_of_its_copies(weight):
    found = optimize_copies(weight, "int3g32", hessian_of(1), copies=3, rounds=2)
    x = np.random.default_rng(3).standard_normal((5, COLS), dtype=np.float32)
    mean = found.layer.dequantize().astype(float)
    assert [copy.rotation for copy in found.layer.copies] == list(found.rotations)
    assert np.allclose(found.layer.forward(x), x @ mean.T, atol=0.05 * abs(x @ mean.T).max())


def test_copies_start_from_hadamard_matrices_of_different_seeds(weight):
    found = optimize_copies(weight, NEAREST, copies=3, rounds=0, seed=5)
    again = optimize_copies(weight, NEAREST, copies=3, rounds=0, seed=5)
    assert len(found.history) == 1
    matrices = [rotation.matrix() for rotation in found.rotations]
    for i, matrix in enumerate(matrices):
        assert np.array_equal(matrix, Rotation(COLS, seed=5 + i).matrix())
        assert np.array_equal(matrix, again.rotations[i].matrix())
        for other in matrices[:i]:
            assert abs(matrix @ other.T).max() < 1 - 1e-3


@pytest.mark.parametrize("known", [False, True])
def test_without_diversity_each_copy_is_a_problem_of_its_own(weight, known):
    H = hessian_of(1) if known else None
    both = optimize_copies(weight, NEAREST, H, objective="each", rounds=4, seed=3)
    for i in range(2):
        alone = optimize_copies(weight, NEAREST, H, copies=1, rounds=4, seed=3 + i)
        assert np.array_equal(alone.rotations[0].matrix(), both.rotations[i].matrix())


def test_fused_copies_make_up_for_each_other(weight):
    """Their mean has a smaller error than that of copies which are optimised alone."""
    fused, each = (optimize_copies(weight, NEAREST, objective=name) for name in ("fused", "each"))
    assert fused.error < 0.9 * each.error
    assert min(each.errors) < min(fused.errors)
    assert fused.correlations[0, 1] < -0.1


def test_error_feedback_and_held_out_inputs(weight):
    H, other = hessian_of(1), hessian_of(2)
    best, errors = tune_strength(weight, "int2g32", H, other, strengths=(0.0, 0.02), rounds=4)
    assert list(errors) == [0.0, 0.02]
    wide = weight.astype(float)
    E = best.layer.dequantize() - wide
    expected = np.trace(E @ other @ E.T) / np.trace(wide @ other @ wide.T)
    assert np.isclose(min(errors.values()), expected, rtol=1e-6)
    start = optimize_copies(weight, "int2g32", H, rounds=0)
    E = start.layer.dequantize() - wide
    assert expected < np.trace(E @ other @ E.T) / np.trace(wide @ other @ wide.T)


def central(f, x, step):
    h = 1e-6
    return (f(x + h * step) - f(x - h * step)) / (2 * h)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_log_det_is_that_of_correlations(copies):
    rng = np.random.default_rng(copies)
    errors = rng.standard_normal((copies, 60))
    errors -= errors.mean(1, keepdims=True)
    value, gradient = log_det_loss(errors @ errors.T)
    assert np.isclose(value, diversity_loss(errors)[0], atol=1e-10)
    step = rng.standard_normal(errors.shape)
    by_errors = 2 * gradient @ errors
    change = central(lambda e: log_det_loss(e @ e.T)[0], errors, step)
    assert np.isclose((by_errors * step).sum(), change, atol=1e-7)
    if copies == 2:
        rho = np.corrcoef(errors)[0, 1]
        assert np.isclose(value, -np.log(1 - rho**2), atol=1e-8)


def test_log_det_at_its_ends():
    assert log_det_loss(np.diag([2.0, 3.0]))[0] == 0
    assert log_det_loss(np.ones((2, 2)))[0] == np.inf
    assert log_det_loss(np.diag([1.0, 0.0]))[0] == 0


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_overlap_is_the_sum_over_pairs(copies):
    rng = np.random.default_rng(copies)
    errors = rng.standard_normal((copies, 6, 5))
    value, gradients = overlap_loss(list(errors))
    sizes = [np.linalg.norm(E) for E in errors]
    pairs = [(i, j) for i in range(copies) for j in range(i)]
    expected = [np.linalg.norm(errors[i].T @ errors[j]) / sizes[i] / sizes[j] for i, j in pairs]
    assert np.isclose(value, sum(expected))
    step = rng.standard_normal(errors.shape)
    change = central(lambda e: overlap_loss(list(e))[0], errors, step)
    assert np.isclose((np.array(gradients) * step).sum(), change, atol=1e-7)
    orthogonal = [np.eye(4)[:, :2] @ np.ones((2, 3)), np.eye(4)[:, 2:] @ np.ones((2, 3))]
    assert overlap_loss(orthogonal)[0] == 0


def test_refusals(weight):
    H = hessian_of(1)
    with pytest.raises(ValueError, match="objective is 'sum'"):
        optimize_copies(weight, NEAREST, objective="sum")
    with pytest.raises(ValueError, match="diversity is 'cosine'"):
        optimize_copies(weight, NEAREST, diversity="cosine")
    with pytest.raises(ValueError, match="copies is 0"):
        optimize_copies(weight, NEAREST, copies=0)
    with pytest.raises(ValueError, match="hessian is None"):
        optimize_copies(weight, "int2g32")
    with pytest.raises(ValueError, match=r"hessian has shape \(3, 3\), expected \(32, 32\)"):
        optimize_copies(weight, "int2g32", np.eye(3))
    for plan in ("int2g32 + rank2", "int2g32 + int2g32 residual", "int2g32 hadamard"):
        with pytest.raises(ValueError, match="expected one copy without rotation or adapter"):
            optimize_copies(weight, plan, H)
    with pytest.raises(ValueError, match="strength is -1"):
        optimize_copies(weight, "int2g32", H, strength=-1)
    with pytest.raises(ValueError, match="weight has a NaN"):
        optimize_copies(weight * np.float32(0), "int2g32", H)
    with pytest.raises(ValueError, match="held_out has shape"):
        tune_strength(weight, "int2g32", H, H, strengths=())
