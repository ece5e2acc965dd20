"""Weights corrected for the drift of their inputs, against the formulas in NumPy."""

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq.calibration import calibrate
from lowbitq.compression import compress
from lowbitq.drift import RIDGES, Moments, correct

TOKENS = random_tokens(24 * 48).reshape(24, 48)


def drifting(tokens, seed, *, noise=0.1, cols=24, rows=10):
    """Inputs, drifted inputs, outputs and weights of tokens."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols))
    drifted = x @ (np.eye(cols) + 0.2 * np.random.default_rng(9).standard_normal((cols, cols)))
    drifted += noise * rng.standard_normal((tokens, cols))
    weight = np.random.default_rng(8).standard_normal((rows, cols), dtype=np.float32)
    weights = rng.random(tokens).astype(np.float32)
    return x.astype(np.float32), drifted.astype(np.float32), weight, weights


def moments(x, target, weights):
    found = Moments(x.shape[1], target.shape[1])
    half = len(x) // 2
    for part in (slice(half), slice(half, None)):
        given = None if weights is None else weights[part]
        found.add(x[part], np.ascontiguousarray(target[part]), given)
    return found


def by_formula(parts, weight, *, ridge=None):
    """B, H and the hundredth of a typical eigenvalue of (x, drifted, weights)."""
    x, drifted, d = (np.concatenate(arrays).astype(float) for arrays in zip(*parts, strict=True))
    lack = x @ weight.T - drifted @ weight.T
    sizes = d * (drifted**2).sum(1)
    unit = 0.01 * len(x) * np.median(sizes) / x.shape[1]
    return (lack * d[:, None]).T @ drifted, (drifted * d[:, None]).T @ drifted, unit


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_the_correction_follows_its_formula(of_inputs, weighted):
    (x, drifted, weight, d), (x2, drifted2, _, d2) = (drifting(n, n) for n in (300, 90))
    if not weighted:
        d, d2 = np.ones_like(d), np.ones_like(d2)
    target, target2 = (
        (a - b if of_inputs else a @ weight.T) for a, b in ((x, drifted), (x2, drifted2))
    )
    train, held = (
        moments(b, t, w if weighted else None)
        for b, t, w in ((drifted, target, d), (drifted2, target2, d2))
    )
    found, about = correct(weight, train, held, of_inputs=of_inputs)

    B, H, unit = by_formula([(x, drifted, d)], weight)
    B2, H2, _ = by_formula([(x2, drifted2, d2)], weight)
    gains = []
    for ridge in RIDGES:
        step = B @ np.linalg.inv(H + ridge * unit * np.eye(len(H)))
        alpha = np.clip((step * B2).sum() / ((step @ H2) * step).sum(), 0, 1)
        gain = 2 * alpha * (step * B2).sum() - alpha**2 * ((step @ H2) * step).sum()
        gains.append((gain, alpha, ridge))
    gain, alpha, ridge = max(gains)
    assert about.ridge == ridge
    assert about.alpha == pytest.approx(alpha, rel=1e-3)
    assert about.gain == pytest.approx(gain, rel=1e-2)

    B, H, unit = by_formula([(x, drifted, d), (x2, drifted2, d2)], weight)
    expected = weight + alpha * B @ np.linalg.inv(H + ridge * unit * np.eye(len(H)))
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_many_tokens_and_a_linear_drift_are_undone():
    x, drifted, weight, _ = drifting(4000, 0, noise=0.0)
    x2, drifted2, _, _ = drifting(400, 1, noise=0.0)
    train, held = moments(drifted, x - drifted, None), moments(drifted2, x2 - drifted2, None)
    found, about = correct(weight, train, held, of_inputs=True)
    assert about.alpha > 0.9
    before, after = (np.square(x @ weight.T - drifted @ w.T).sum() for w in (weight, found))
    assert after < 0.15 * before


def test_no_drift_leaves_the_weights_as_they_are():
    x, _, weight, _ = drifting(100, 0)
    train = held = moments(x, np.zeros_like(x), None)
    found, about = correct(weight, train, held, of_inputs=True)
    assert found is weight
    assert about.alpha == 0


def test_noise_alone_is_not_fitted():
    rng = np.random.default_rng(0)
    x, _, weight, _ = drifting(40, 0)
    x2, _, _, _ = drifting(2000, 1)
    noise, noise2 = (rng.standard_normal(a.shape).astype(np.float32) for a in (x, x2))
    train, held = moments(x, noise, None), moments(x2, noise2, None)
    _, about = correct(weight, train, held, of_inputs=True)
    assert about.alpha < 0.1


def last_error(model, small):
    """Mean squared difference of the last hidden states."""
    pairs = [(model.hidden(row), small.hidden(row)) for row in TOKENS]
    return np.mean([np.square(a - b).mean() for a, b in pairs])


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
@pytest.mark.parametrize("scaled", [False, True])
def test_models_drift_less(rotation, scaled):
    model = random_model(layers=4)
    if scaled:
        for block in model.blocks:
            block.attention_scale, block.mlp_scale = 0.5, 2.0
    options = {"text": TOKENS, "rotation": rotation, "embedding": None}
    plain, corrected = (compress(model, "int2g32", drift=d, **options) for d in (False, True))
    assert last_error(model, corrected) < 0.9 * last_error(model, plain)
    assert {"alpha", "ridge"} <= corrected.records["model.layers.2.mlp.down_proj"].keys()


def test_rounding_to_nearest_drifts_less():
    model = random_model(layers=4)
    options = {"text": TOKENS, "method": "rtn", "embedding": None}
    plain, corrected = (compress(model, "int2g32", drift=d, **options) for d in (False, True))
    assert last_error(model, corrected) < 0.9 * last_error(model, plain)


def test_layers_with_biases_drift_less():
    model = random_model(layers=3)
    rng = np.random.default_rng(3)
    for block in model.blocks:
        for name in ("q_proj", "o_proj", "down_proj"):
            linear = block.linears[name]
            bias = rng.standard_normal(linear.shape[0], dtype=np.float32)
            block.linears[name] = linear.replace(bias=bias)
    options = {"text": TOKENS, "embedding": None}
    plain, corrected = (compress(model, "int2g32", drift=d, **options) for d in (False, True))
    assert last_error(model, corrected) < 0.9 * last_error(model, plain)


def test_eight_bits_have_almost_no_drift():
    model = random_model()
    small = compress(model, "int8g32", drift=True, text=TOKENS, embedding=None)
    plain = compress(model, "int8g32", text=TOKENS, embedding=None)
    for name, linear in small.linears():
        one, other = linear.tensor.dequantize(), dict(plain.linears())[name].tensor.dequantize()
        assert np.abs(one - other).max() < 0.05 * np.abs(other).max()


def test_token_weights_reach_the_correction():
    model = random_model()
    stats = calibrate(model, TOKENS, fisher=True, window=48)
    small = compress(model, "int2g32", stats, drift=True, embedding=None)
    plain = compress(model, "int2g32", text=stats.tokens, drift=True, embedding=None)
    assert last_error(model, small) != last_error(model, plain)


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path):
    model = random_model(layers=4)

    class StopError(Exception):
        pass

    def stop(step):
        if step.done == 17:
            raise StopError

    options = {"text": TOKENS, "drift": True, "embedding": None}
    with pytest.raises(StopError):
        compress(model, "int2g32", work_dir=tmp_path / "work", progress=stop, **options)
    resumed = compress(model, "int2g32", work_dir=tmp_path / "work", **options)
    whole = compress(model, "int2g32", **options)
    for (name, a), (_, b) in zip(resumed.linears(), whole.linears(), strict=True):
        assert np.array_equal(a.tensor.panels, b.tensor.panels), name


def test_refusals():
    model = random_model()
    with pytest.raises(ValueError, match="one window of text; drift correction needs at least two"):
        compress(model, "int2g32", text=TOKENS[:1], drift=True)


def test_hessians_of_the_float_model_do_not_replace_the_text():
    model = random_model()
    stats = calibrate(model, TOKENS, hessians=True, window=48)
    seen = compress(model, "int2g32", text=TOKENS, drift=True)
    known = compress(model, "int2g32", stats, drift=True)
    for (name, a), (_, b) in zip(seen.linears(), known.linears(), strict=True):
        assert np.array_equal(a.tensor.panels, b.tensor.panels), name
