"""prices(): measured ones against evaluations, scaled ones against errors in NumPy."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq.calibration import calibrate
from lowbitq.compression import compress
from lowbitq.copies import LayerInputs
from lowbitq.encoding import encode
from lowbitq.models.rotating import rotate, rotate_hessians
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan, Plan
from lowbitq.prices import Prices, prices
from lowbitq.quantizers import quantize

MODULE = sys.modules["lowbitq.prices"]  # as an attribute, the function hides it
TOKENS = random_tokens(3 * 40).reshape(3, 40)
Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"
FORMATS = ["int2g32", "int3g32", "int4g32"]


@pytest.fixture(scope="module")
def model():
    return random_model(layers=2)


@pytest.fixture(scope="module")
def stats(model):
    return calibrate(model, TOKENS, hessians=True)


def alone(model, name, layer):
    """Divergence on the first window if one layer is replaced."""
    changed = model.copy()
    changed.replace_linear(name, layer)
    return float(lq.kl_divergence(changed, model, TOKENS[0], 40))


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_measured_prices_are_those_of_one_layer_at_a_time(model, stats, rotation):
    formats = ["int2g32", "int2g32 + rank2", "int2g32 + int2g32 hadamard residual"]
    found = prices(model, stats, formats, by="measured", measure=1, rotation=rotation)
    source = rotate(model, rotation)
    for name, block in ((Q0, 0), (DOWN1, 1)):
        key = name.rsplit(".")[-1]
        hessian = rotate_hessians(model, source, block, {key: stats.hessians[name]}, 0)[key]
        linear = dict(source.linears())[name]
        for column, format in enumerate(formats):
            layer, _ = encode(linear, LayerInputs(hessian), LayerPlan.parse(format))
            expected = alone(source, name, layer)
            row = found.layers.index(name)
            assert found.kl[row, column] == pytest.approx(expected, rel=1e-5)
            assert found.nbytes[row, column] == layer.nbytes


@pytest.mark.parametrize("known", [False, True])
def test_scaled_prices_are_proportional_to_errors(model, stats, known):
    """alpha t^2, t^2 = |E X| / |W X| where the Hessian is known, else |E| / |W|."""
    data = stats if known else calibrate(model, TOKENS)
    found = prices(model, data, FORMATS, by="int2g32", measure=1, rows=None, rotation="none")
    plan = LayerPlan.parse("int2g32", None if known else Rounding(method="rtn"))
    for name in (Q0, DOWN1):
        row, linear = found.layers.index(name), dict(model.linears())[name]
        H = stats.hessians[name] if known else np.eye(linear.shape[1])
        errors = []
        for format in FORMATS:
            inputs, how = LayerInputs(H), LayerPlan.parse(format, plan.rounding)
            E = linear.weight - encode(linear, inputs, how)[0].dequantize()
            errors.append(np.trace(E.astype(float) @ H @ E.T))
        expected = [error / errors[0] for error in errors]
        assert found.kl[row] / found.kl[row, 0] == pytest.approx(expected, rel=1e-5)
        probe, _ = encode(linear, LayerInputs(H), plan)
        measured = alone(model, name, linear.replace(weight=probe.dequantize()))
        assert found.kl[row, 0] == pytest.approx(measured, rel=1e-4)


def test_noise_prices_a_format_by_its_error(model):
    data = calibrate(model, TOKENS)
    how = {"by": "noise", "noise": 0.2, "measure": 1, "rows": None, "rotation": "none"}
    found = prices(model, data, FORMATS, seed=3, **how)
    linear, row = dict(model.linears())[DOWN1], found.layers.index(DOWN1)
    W = linear.weight.astype(float)
    N = np.random.default_rng([3, row]).standard_normal(W.shape, np.float32)
    noisy = linear.weight + N * np.float32(0.2 * np.linalg.norm(W) / np.linalg.norm(N))
    alpha = alone(model, DOWN1, linear.replace(weight=noisy)) / 0.2**2
    for column, format in enumerate(FORMATS):
        E = W - quantize(linear.weight, format).dequantize()
        expected = alpha * (E**2).sum() / (W**2).sum()
        assert found.kl[row, column] == pytest.approx(expected, rel=1e-3)


def test_some_rows_say_what_all_do(model, stats):
    whole = prices(model, stats, FORMATS, by="int2g32", measure=1, rows=None)
    part = prices(model, stats, FORMATS, by="int2g32", measure=1, rows=32)
    assert (part.kl.sum(0) > 0.7 * whole.kl.sum(0)).all()
    assert (part.kl.sum(0) < 1.4 * whole.kl.sum(0)).all()


def test_further_formats_run_the_model_no_more(model, stats, monkeypatch):
    calls = []

    def counted(model, tokens, layers, *others):
        calls.append(len(layers))
        return each_alone(model, tokens, layers, *others)

    each_alone = MODULE.each_alone
    monkeypatch.setattr(MODULE, "each_alone", counted)
    done = []
    for formats in (FORMATS[:1], FORMATS):
        done.clear()
        prices(model, stats, formats, by="int2g32", progress=lambda *c: done.append(c))
        assert done == [(step + 1, 14 * 3) for step in range(14 * 3)]
    prices(model, stats, FORMATS, by="measured", measure=1)
    assert calls == [14, 14, 3 * 14]


def test_bytes_are_those_of_the_model(model, stats):
    """Also of the embedding, and of what is not quantized."""
    for embedding in ("int8g64", None):
        found = prices(model, stats, ["int2g32 + rank2"], measure=1, embedding=embedding)
        small = compress(model, found.plan([0] * 14), stats)
        assert found.nbytes.sum() + found.outside == small.nbytes
        assert 8 * found.nbytes.sum() / found.parameters.sum() == small.bits_per_weight


def test_text_is_calibrated_on(model, stats):
    given = prices(model, stats, FORMATS, measure=1)
    text = prices(model, TOKENS.ravel(), FORMATS, samples=3, window=40, measure=1)
    assert text.kl.shape == given.kl.shape
    assert (text.kl > 0).all()


def test_plans_correct_for_drift_where_they_can(model, stats):
    def drift(data, **options):
        options = {"samples": 3, "window": 40, "measure": 1, **options}
        found = prices(model, data, FORMATS[:1], **options)
        return found.template.drift

    assert drift(TOKENS.ravel())
    assert not drift(TOKENS.ravel(), drift=False)
    assert not drift(TOKENS.ravel(), method="rtn")
    assert not drift(TOKENS[0], samples=1)
    assert not drift(stats)
    assert drift(calibrate(model, TOKENS))


def test_json_keeps_everything(model, stats, tmp_path):
    how = {"damping": 0.02, "seed": 2, "rotation": "orthogonal", "measure": 1}
    found = prices(model, stats, [*FORMATS, "int2g32 + rank1"], by="noise", **how)
    found.save(tmp_path / "prices.json")
    again = Prices.load(tmp_path / "prices.json")
    for name in ("layers", "candidates", "outside", "template", "by"):
        assert getattr(again, name) == getattr(found, name)
    for name in ("kl", "nbytes", "multiplications", "parameters"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    assert again.plan([1] * 14) == Plan.uniform(found.layers, "int3g32", **without(how))
    assert "noise" in str(found)
    assert "int2g32 + rank1" in str(found)


def without(how):
    return {name: value for name, value in how.items() if name != "measure"}


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("kl"),
        lambda values: values.update(kl=[[1.0]]),
        lambda values: values.update(kl=[[None] * 3] * 14),
        lambda values: values["candidates"].update(seeds=1),
        lambda values: values.update(nbytes=[[-1] * 3] * 14),
        lambda values: values.update(layers=[1] * 14),
        lambda values: values.update(outside="much"),
        lambda values: values.update(by=None),
    ],
)
def test_damaged_files_are_refused(model, stats, tmp_path, change):
    path = tmp_path / "prices.json"
    prices(model, stats, FORMATS, measure=1).save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(lq.FormatError, match=r"prices\.json"):
        Prices.load(path)
    path.write_text("[]")
    with pytest.raises(lq.FormatError, match="expected a JSON object"):
        Prices.load(path)


def test_frame(model, stats):
    pytest.importorskip("pandas")
    frame = prices(model, stats, FORMATS, measure=1).to_frame()
    assert list(frame.columns) == ["layer", "candidate", "kl", "nbytes", "multiplications"]
    assert len(frame) == 14 * 3


@pytest.mark.parametrize(
    ("formats", "options", "said"),
    [
        ([], {}, "formats is empty"),
        ("int2g32", {}, "formats is 'int2g32', expected a sequence"),
        (["int2g32", "int2g32"], {}, "'int2g32' twice"),
        (["int2g32", "int2g32 a4"], {}, "round activations differently"),
        (["int9"], {}, "unknown format"),
        (["int2g32 + rank33"], {}, "rank is 33, expected at most 32"),
        (FORMATS, {"by": "int9"}, "unknown format"),
        (FORMATS, {"by": "noise", "noise": 1}, "noise is 1, expected more than 0"),
        (FORMATS, {"rows": 0}, "rows is 0, expected at least 1"),
        (FORMATS, {"measure": 4}, "measure is 4, but data has only 3 windows"),
        (FORMATS, {"rotation": "half"}, "rotation is 'half'"),
    ],
)
def test_what_does_not_fit_is_refused(model, stats, formats, options, said):
    with pytest.raises(ValueError, match=said):
        prices(model, stats, formats, **options)


def test_a_quantized_model_is_refused(model, stats):
    with pytest.raises(ValueError, match="quantized already; price the float original"):
        prices(compress(model, "int4g32", method="rtn"), stats, FORMATS)
