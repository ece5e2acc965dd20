"""lowbitq.student_rotations: rotations stay orthogonal while they are trained."""

from __future__ import annotations

import numpy as np
import pytest
from student_models import TEXT, pair, with_copies

import lowbitq as lq
from lowbitq.distillation import distill
from lowbitq.rotations import Rotation
from lowbitq.student_rotations import nearest_orthogonal
from lowbitq.students import Student


def defect(matrix):
    """The largest entry of R^T R - I."""
    wide = matrix.astype(float)
    return abs(wide.T @ wide - np.eye(len(wide))).max()


@pytest.mark.parametrize("n", [1, 2, 64, 576])
@pytest.mark.parametrize("size", [1e-4, 0.5, 30.0])
def test_the_polar_factor_is_that_of_the_svd(n, size):
    rng = np.random.default_rng(n)
    matrix = (
        Rotation(n, "orthogonal", seed=3).matrix() + size * rng.standard_normal((n, n)) / n**0.5
    )
    U, _, Vt = np.linalg.svd(matrix)
    found = nearest_orthogonal(matrix)
    assert defect(found) < 1e-11
    assert np.allclose(found, U @ Vt, atol=1e-5)


def test_an_orthogonal_matrix_is_left_alone():
    for kind in ("hadamard", "orthogonal"):
        matrix = Rotation(576, kind, seed=1).matrix().astype(float)
        assert nearest_orthogonal(matrix) is matrix
    once = nearest_orthogonal(matrix + 1e-3).astype(np.float32).astype(float)
    assert nearest_orthogonal(once) is once, "float32 is close enough"


def test_what_has_no_nearest_orthogonal_matrix_is_refused():
    for matrix in (np.zeros((3, 3)), np.full((2, 2), np.nan), np.ones((4, 4))):
        with pytest.raises(lq.NumericalError, match="singular or not finite; lower its learning"):
            nearest_orthogonal(matrix)


def test_rotations_learn_and_stay_orthogonal():
    small, teacher = pair("int2g32 a32 + rank2")
    small = with_copies(small)
    options = {"steps": 12, "batch": 4, "validation": 4, "every": 4, "warmup": 2}
    learned = distill(small, teacher, TEXT, learn=["rotation"], rates={"rotation": 3e-3}, **options)
    curve = [value for _, value in learned.provenance["distillation"]["validation"]]
    assert min(curve) < curve[0]
    changed = []
    for (name, one), (_, two) in zip(small.linears(), learned.linears(), strict=True):
        for before, after in zip(one.copies, two.copies, strict=True):
            assert after.tensor is before.tensor
            if after.rotation is not before.rotation:
                changed.append(name)
                assert before.rotation.kind == "orthogonal"
                assert defect(after.rotation.matrix()) < 1e-6
    assert changed == ["model.layers.0.self_attn.o_proj"], "Hadamard matrices stay"
    assert learned.bits_per_weight == small.bits_per_weight


def test_large_steps_end_on_the_manifold():
    small = with_copies(pair("int2g32 a32 + rank2")[0])
    student = Student(small, ["rotation"])
    [p] = student.parameters
    p.value += np.random.default_rng(0).standard_normal(p.value.shape).astype(np.float32)
    student.compose()
    assert defect(p.value) < 1e-6
    before = p.value.copy()
    student.compose()
    assert (p.value == before).all()
    expected = student.model.logits(TEXT[0])
    found = student.finish().logits(TEXT[0])
    assert abs(found - expected).max() <= 2e-5 * abs(expected).max()


def test_without_dense_rotations_there_is_nothing_to_learn():
    with pytest.raises(ValueError, match="learn is rotation, but the model has no such parameter"):
        Student(pair("int2g32 a32")[0], ["rotation"])
