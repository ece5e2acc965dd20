"""Rotations as values, and folded into models."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from golden import tiny_models
from random_model import random_model, random_tokens

from lowbitq.calibration import Stream, calibrate
from lowbitq.models import load
from lowbitq.models.rotating import rotate, rotate_hessians, rotate_inputs
from lowbitq.models.slots import SLOTS, name_in_block
from lowbitq.rotations import Rotation, hadamard_orders

SIZES = [1, 2, 3, 5, 7, 12, 20, 64, 80, 96, 128, 144, 171, 576]
LIMIT = 1e-4  # of the largest logit; rotations may cost no more than rounding does elsewhere


def all_kinds(n):
    haar = Rotation(n, "orthogonal", seed=3)
    return [Rotation(n, seed=3), haar, Rotation.from_matrix(haar.matrix()[::-1])]


@pytest.mark.parametrize("n", SIZES)
def test_every_kind_applies_its_matrix(n):
    x = np.random.default_rng(n).standard_normal((2, 3, n), dtype=np.float32)
    before = x.copy()
    for rotation in all_kinds(n):
        R = rotation.matrix().astype(float)
        # Rounding of n-term sums with entries of unit size, in R and in the product.
        bound = (n + 8) * 2.0**-24 * 3
        assert (abs(R @ R.T - np.eye(n)) <= bound).all()
        reach = abs(x).sum(-1, keepdims=True)
        assert (abs(rotation.apply(x) - x @ R.T) <= bound * reach).all()
        assert (abs(rotation.inverse(x) - x @ R) <= bound * reach).all()
        assert np.array_equal(rotation.apply(x[0, 0]), rotation.apply(x[:1, :1])[0, 0])
    assert np.array_equal(x, before)


def test_a_hadamard_rotation_is_flat():
    for n in (12, 576, 4864):
        unit = np.zeros(n, np.float32)
        unit[n // 3] = 1
        assert (abs(Rotation(n).apply(unit)) == np.float32(1 / np.sqrt(n))).all()


def test_signs_of_a_seed_never_change():
    """They are part of the file format: saved models hold the seed alone."""
    signs = "-+-----+++-++-+-"
    row = Rotation(16, seed=42, stream=1).matrix()[0]
    assert row.tolist() == [0.25 if sign == "+" else -0.25 for sign in signs]


def test_seeds_and_streams_are_unrelated():
    n = 512
    first = Rotation(n, seed=1).matrix().astype(float)
    for other in (Rotation(n, seed=2), Rotation(n, seed=1, stream=1)):
        # A mean of n products of random signs.
        assert abs((first * other.matrix()).sum() / n) < 5 / np.sqrt(n)
    for a, b in ((0, 1), (5, 6)):
        assert np.array_equal(Rotation(96, seed=a).matrix(), Rotation(96, seed=a).matrix())
        assert not np.array_equal(Rotation(96, seed=a).matrix(), Rotation(96, seed=b).matrix())


def test_rounding_errors_of_two_seeds_are_uncorrelated():
    """At 2 bits, after the part along W is taken out: what makes averaging of copies work."""
    W = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
    errors = []
    for seed in (1, 2):
        rotation = Rotation(512, seed=seed)
        rotated = rotation.apply(W)
        rounded = np.clip(np.round(rotated - 0.5) + 0.5, -1.5, 1.5)
        error = rotation.inverse(rounded - rotated)
        errors.append(error - W * (error * W).sum() / (W * W).sum())
    a, b = errors
    correlation = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert abs(correlation) < 0.01


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_round_trip_through_json_and_arrays(kind):
    rotation = all_kinds(36)[kind]
    x = np.random.default_rng(0).standard_normal((2, 36), dtype=np.float32)
    fields = json.loads(json.dumps(rotation.to_dict()))
    for again in (
        Rotation.from_dict(fields, rotation.to_arrays()),
        pickle.loads(pickle.dumps(rotation)),
    ):
        assert np.array_equal(again.apply(x), rotation.apply(x))
        assert repr(again) == repr(rotation)


def test_numpys_integers_fit_json_too():
    rotation = Rotation(np.int64(24), seed=np.int32(5))
    assert json.dumps(rotation.to_dict()) == json.dumps(Rotation(24, seed=5).to_dict())


def test_a_saved_rotation_keeps_its_orders():
    """Even if the search for the cheapest ones should choose others one day."""
    fields = {"kind": "hadamard", "n": 576, "seed": 0, "stream": 0, "orders": [12, 12]}
    assert hadamard_orders(576) == (36,)
    rotation = Rotation.from_dict(fields)
    assert rotation.orders == (12, 12)
    unit = np.eye(576, dtype=np.float32)[:1]
    assert (abs(rotation.apply(unit)) == np.float32(1 / 24)).all()


def test_refusals_of_rotations():
    with pytest.raises(ValueError, match="kind is 'random', expected 'hadamard' or 'orthogonal'"):
        Rotation(4, "random")
    for kind in ("hadamard", "orthogonal"):
        with pytest.raises(ValueError, match="n is 0, expected"):
            Rotation(0, kind)
    with pytest.raises(ValueError, match="order over 4096"):
        Rotation(4099)
    with pytest.raises(TypeError, match="x has dtype complex128, expected real numbers"):
        Rotation(4).apply(np.zeros(4, complex))
    for shape in ((5,), (4, 3), ()):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 4\)"):
            Rotation(4).apply(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="differs from I by 3"):
        Rotation.from_matrix(np.eye(2, dtype=np.float32) * 2)
    with pytest.raises(ValueError, match="not orthogonal"):
        Rotation.from_matrix(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        Rotation.from_matrix(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "kind is 'other'"),
        ({"orders": [5]}, "expected a divisor of 24"),
        ({"orders": [48]}, "expected divisors of n = 24"),
        ({"orders": [0]}, "expected divisors of n = 24"),
        ({"orders": []}, "expected a power of two"),
        ({"orders": None}, "expected kind, n, seed, stream, orders"),
        ({"n": 0}, "n = 0"),
        ({"n": float("inf")}, "n of a rotation: found inf, expected an integer"),
        ({"n": float("nan")}, "n of a rotation: found nan"),
        ({"n": 24.0}, "n of a rotation: found 24.0"),
        ({"n": "24"}, "n of a rotation: found '24'"),
        ({"seed": True}, "seed of a rotation: found True"),
        ({"seed": 2**63}, "seed of a rotation: found 9223372036854775808"),
        ({"stream": 0.5}, "stream of a rotation: found 0.5"),
        ({"orders": [12.0]}, "orders of a rotation: found 12.0"),
        ({"orders": ["12"]}, "orders of a rotation: found '12'"),
        ({"orders": "12"}, "orders of a rotation: found '1'"),
        ({"kind": ["hadamard"]}, r"kind is \['hadamard'\]"),
        ({"seed": -1}, "seed is -1"),
        ({"kind": "matrix"}, "'matrix' of a rotation is missing"),
    ],
)
def test_refusals_of_saved_rotations(change, message):
    with pytest.raises(ValueError, match=message):
        Rotation.from_dict({**Rotation(24).to_dict(), **change})


def arrays_of(model):
    parts = [model.embedding.weight, model.final_norm]
    for block in model.blocks:
        parts += [block.attention_norm, block.mlp_norm]
        parts += [a for x in block.linears.values() for a in (x.weight, x.bias)]
    return [part.copy() for part in parts if part is not None]


@pytest.mark.parametrize("online_down", [True, False])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_rotated_models_have_the_same_logits(name, kind, online_down, tmp_path):
    model = load(tiny_models.write_folder(name, tmp_path))
    before = arrays_of(model)
    tokens = tiny_models.tokens_of(name)
    expected = model.logits(tokens)

    rotated = rotate(model, kind, seed=1, online_down=online_down)
    assert abs(rotated.logits(tokens) - expected).max() <= LIMIT * abs(expected).max()
    changed = {n for n, linear in rotated.linears() if linear is not dict(model.linears())[n]}
    assert changed == {n for n, _ in model.linears()}
    assert all(block.attention_norm is None for block in rotated.blocks)
    assert (rotated.blocks[0].linears["down_proj"].rotation is not None) == online_down

    assert all(map(np.array_equal, arrays_of(model), before)), "the given model was changed"
    assert np.array_equal(model.logits(tokens), expected)


def test_blocks_rotate_by_different_signs(tmp_path):
    model = load(tiny_models.write_folder(next(iter(tiny_models.MODELS)), tmp_path))
    rotated = rotate(model, seed=1)
    streams = [block.linears["down_proj"].rotation.stream for block in rotated.blocks]
    assert len({rotated.residual_rotation.stream, *streams}) == 1 + len(streams)


def test_no_rotation_is_no_change(tmp_path):
    name = next(iter(tiny_models.MODELS))
    model = load(tiny_models.write_folder(name, tmp_path))
    same = rotate(model, "none")
    assert same is not model
    assert same.residual_rotation is None
    tokens = tiny_models.tokens_of(name)
    assert np.array_equal(same.logits(tokens), model.logits(tokens))


def test_any_orthogonal_matrix_rotates_the_residual_stream():
    model, tokens = random_model(2), random_tokens(30)
    given = Rotation.from_matrix(Rotation(64, "orthogonal", seed=9).matrix())
    rotated = rotate(model, given, seed=1)
    assert rotated.residual_rotation is given
    expected = model.logits(tokens)
    assert abs(rotated.logits(tokens) - expected).max() <= LIMIT * abs(expected).max()
    again = rotate(rotated, "none")  # what compress does with rotation="none"
    assert np.array_equal(again.logits(tokens), rotated.logits(tokens))


def test_layers_rotate_their_own_inputs():
    model, tokens = random_model(2), random_tokens(30)
    turn, other = Rotation(64, seed=5), Rotation(96, "orthogonal", seed=6)
    given = {f"model.layers.1.self_attn.{name}_proj": turn for name in "qkv"}
    given |= {"model.layers.0.mlp.down_proj": other, "model.layers.0.self_attn.o_proj": None}
    rotated = rotate_inputs(model, given)
    own = {name: linear.rotation for name, linear in rotated.linears() if linear.rotation}
    assert own == {name: rotation for name, rotation in given.items() if rotation}
    expected = model.logits(tokens)
    assert abs(rotated.logits(tokens) - expected).max() <= LIMIT * abs(expected).max()


@pytest.mark.parametrize("before", [False, True])
def test_hessians_follow_all_rotations(before):
    """Those of the inputs as the weights see them, whether the model is rotated before or after."""
    plain, tokens = random_model(2), random_tokens(60).reshape(2, 30)
    turn = Rotation(96, "orthogonal", seed=6)
    given = {"model.layers.1.mlp.down_proj": turn}
    if before:
        model = rotate_inputs(rotate(plain, seed=3, online_down=False), given)
        rotated = rotate(model, "none")
    else:
        model, rotated = plain, rotate(plain, seed=3)
    stats = calibrate(model, tokens, samples=2, window=30, hessians=True, first_weight=1)
    for index in range(2):
        known = {s.name: stats.hessians[name_in_block(index, s)] for s in SLOTS}
        found = rotate_hessians(model, rotated, index, known, 3)
        stream = Stream(rotated, tokens)
        for _ in range(index):
            stream.advance()
        sums = dict.fromkeys(known, 0.0)
        for taps in stream.taps():
            for slot in SLOTS:
                x = rotated.blocks[index].linears[slot.name].rotate_input(taps[slot.tap])
                sums[slot.name] = sums[slot.name] + x.T.astype(float) @ x
        for name, expected in sums.items():
            assert np.allclose(found[name], expected, atol=1e-3 * abs(expected).max()), name


def test_refusals_of_models(tmp_path):
    model = load(tiny_models.write_folder(next(iter(tiny_models.MODELS)), tmp_path))
    with pytest.raises(ValueError, match="expected 'hadamard', 'orthogonal', 'none' or a Rot"):
        rotate(model, "givens")
    hidden = model.config.hidden_size
    with pytest.raises(ValueError, match=f"kind has order {hidden + 1}, expected {hidden}"):
        rotate(model, Rotation(hidden + 1))
    down = "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match=f"rotation of {down} has order 3"):
        rotate_inputs(model, {down: Rotation(3)})
    turned = rotate_inputs(model, {down: Rotation(model.config.intermediate_size)})
    with pytest.raises(ValueError, match=f"{down} rotates its input already"):
        rotate_inputs(turned, {down: Rotation(model.config.intermediate_size)})
    with pytest.raises(KeyError, match="no linear layer 'down_proj'"):
        rotate_inputs(model, {"down_proj": None})
    with pytest.raises(ValueError, match="read the same input, expected one rotation"):
        rotate_inputs(model, {"model.layers.0.mlp.up_proj": Rotation(hidden)})
    for rotated in (rotate(model), rotate(model, online_down=False)):
        with pytest.raises(ValueError, match="rotated already"):
            rotate(rotated)


@pytest.mark.model
def test_smollm2_has_the_same_logits_rotated(smollm2):
    model = load(smollm2)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 64)
    expected = model.logits(tokens)
    assert abs(rotate(model, seed=1).logits(tokens) - expected).max() <= 1e-3
