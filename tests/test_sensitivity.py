"""sensitivity(): every metric against NumPy, the measured divergence against an evaluation."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq.calibration import calibrate
from lowbitq.copies import LayerInputs
from lowbitq.encoding import encode
from lowbitq.linears import Linear
from lowbitq.models.decoder import Model
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import TAPS, name_in_block
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
from lowbitq.quantizers import quantize
from lowbitq.scores import part_of
from lowbitq.sensitivity import sensitivity

MODULE = sys.modules["lowbitq.sensitivity"]  # as an attribute, the function hides it
SAMPLES, WINDOW, BLOCKS = 3, 20, 3
RTN = Rounding(method="rtn")
Q0 = "model.layers.0.self_attn.q_proj"


def calibrated(model, **options):
    tokens = random_tokens(SAMPLES * WINDOW).reshape(SAMPLES, WINDOW)
    return calibrate(model, tokens, **options)


@pytest.fixture(scope="module")
def model():
    return random_model(layers=BLOCKS)


@pytest.fixture(scope="module")
def stats(model):
    return calibrated(model, hessians=True)


def made_up(model, tokens):
    """Gradients from the last layer to the first."""
    assert tokens.shape == (SAMPLES, WINDOW)
    for seed, (name, linear) in reversed(list(enumerate(model.linears()))):
        yield name, np.random.default_rng(seed).standard_normal(linear.shape, np.float32)


def rows_of(found, format="int2g32"):
    return {row.layer: row for row in found.of(format)}


def inputs_of(model, tokens):
    """What each layer's weights read, all windows in one array of float32."""
    found = {}
    for window in tokens:
        hidden = model.embed(window)
        for index, block in enumerate(model.blocks):
            taps = {}
            model.block_forward(index, hidden, taps)
            for tap, slots in TAPS.items():
                for slot in slots:
                    x = block.linears[slot.name].rotate_input(taps[tap])
                    found.setdefault(name_in_block(index, slot), []).append(x.copy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_metrics_of_weights_match_numpy(model, turned):
    model = rotate(model) if turned else model
    stats = calibrated(model)
    inputs, gradients = inputs_of(model, stats.tokens), dict(made_up(model, stats.tokens))
    found = sensitivity(model, stats, ["int2g32", "int4g32"], gradients=made_up)
    for format in ("int2g32", "int4g32"):
        rows = rows_of(found, format)
        assert list(rows) == [name for name, _ in model.linears()]
        for name, linear in model.linears():
            W, G = linear.weight.astype(np.float64), gradients[name].astype(np.float64)
            E = W - quantize(linear.weight, format).dequantize()
            D = np.sqrt((inputs[name].astype(np.float64) ** 2).mean(0))
            norm = np.linalg.norm
            row = rows[name]
            assert row.parameters == W.size
            assert row.quant == pytest.approx(norm(E) / norm(W), rel=1e-6)
            assert row.gradient == pytest.approx(norm(G) * norm(E), rel=1e-6)
            assert row.fisher == pytest.approx((G**2 * E**2).sum(), rel=1e-6)
            # Mean squares are float32 sums where `calibrate` made them.
            assert row.output == pytest.approx(norm(E * D) / norm(W * D), rel=1e-5)


def by_layer(model, tokens):
    for found in model.gradients(tokens, of=["weight"]):
        for name, gradient in found.items():
            yield name.removesuffix(".weight"), gradient


def test_gradients_of_the_model_fit(model, stats):
    found = rows_of(sensitivity(model, stats, "int2g32", gradients=by_layer))
    for name, gradient in by_layer(model, stats.tokens):
        weight = dict(model.linears())[name].weight
        error = np.linalg.norm(weight - quantize(weight, "int2g32").dequantize())
        expected = np.linalg.norm(gradient) * error
        assert found[name].gradient == pytest.approx(expected, rel=1e-5)
        assert found[name].fisher > 0


def test_quantization_error_does_not_depend_on_the_unit(model, stats):
    before = rows_of(sensitivity(model, stats, "int2g32"))
    for factor, tolerance in ((4.0, 0), (0.37, 2e-3)):  # other scales round to other float16
        scaled = model.copy()
        for name, linear in model.linears():
            scaled.replace_linear(name, Linear(linear.weight * np.float32(factor)))
        after = rows_of(sensitivity(scaled, calibrated(scaled), "int2g32"))
        for name, row in after.items():
            assert row.quant == pytest.approx(before[name].quant, rel=tolerance)


def test_a_layer_of_zeros_loses_nothing(model):
    model = model.copy()
    name = "model.layers.1.mlp.up_proj"
    model.replace_linear(name, Linear(np.zeros((96, 64), np.float32)))
    found = sensitivity(model, calibrated(model), "int2g32", gradients=made_up, measure=True)
    row = rows_of(found)[name]
    assert (row.quant, row.output, row.gradient, row.fisher) == (0, 0, 0, 0)
    assert row.measured == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("turned", [False, True])
def test_a_plan_is_rounded_as_it_says(model, turned):
    model = rotate(model) if turned else model
    stats, plan = calibrated(model, hessians=True), LayerPlan.parse("int2g32 a32")
    found = rows_of(sensitivity(model, stats, plan), "int2g32 a32")
    inputs = inputs_of(model, stats.tokens)
    weights = np.where(np.arange(WINDOW) < 4, 16.0, 1.0)
    nearest = rows_of(sensitivity(model, stats, "int2g32"))
    for name, linear in model.linears():
        x = inputs[name].reshape(SAMPLES, WINDOW, -1).astype(np.float64)
        hessian = np.einsum("t,sti,stj->ij", weights, x, x)
        layer, _ = encode(linear, LayerInputs(hessian), plan)
        E = linear.weight.astype(np.float64) - layer.to_float().weight
        # Hessians that differ by rounding may move a few codes.
        expected = np.linalg.norm(E) / np.linalg.norm(linear.weight)
        assert found[name].quant == pytest.approx(expected, rel=0.02)
        assert found[name].quant > nearest[name].quant


# --- inputs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Token 5 alone has channel 7, which the first norm makes a thousand times as large."""
    model = random_model(layers=1)
    embedding = model.embedding.weight.copy()
    embedding[:, 7] = 0
    embedding[5] = np.eye(64, dtype=np.float32)[7]
    model.embedding = Linear(embedding)
    model.blocks[0].attention_norm[:] = 1
    model.blocks[0].attention_norm[7] = 1e4
    tokens = np.arange(10, 10 + SAMPLES * WINDOW, dtype=np.int32).reshape(SAMPLES, WINDOW)
    tokens[[0, 0, 2], [3, 9, 19]] = 5
    return model, calibrate(model, tokens)


@pytest.mark.parametrize(
    ("tau_by", "tau"), [("mean", 100), ("median", 100), ("absolute", 1000), ("quantile", 0.9997)]
)
def test_planted_massive_inputs_are_counted_exactly(planted, tau_by, tau):
    model, stats = planted
    row = rows_of(sensitivity(model, stats, "int2g32", tau=tau, tau_by=tau_by))[Q0]
    assert row.massive == 3 / (SAMPLES * WINDOW * 64)
    assert 0.9999 < row.energy < 1


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("tau_by", "tau"), [("mean", 2.5), ("median", 3), ("absolute", 1.7), ("quantile", 0.97)]
)
def test_metrics_of_inputs_match_numpy(model, turned, tau_by, tau):
    model = rotate(model) if turned else model
    stats = calibrated(model)
    inputs = inputs_of(model, stats.tokens)
    shared = ("k_proj", "v_proj", "up_proj")  # read what q and gate read
    whole = np.concatenate([x.ravel() for name, x in inputs.items() if not name.endswith(shared)])
    found = rows_of(sensitivity(model, stats, "int2g32", tau=tau, tau_by=tau_by))
    assert len({row.massive for row in found.values()}) > 5
    for name, x in inputs.items():
        x = abs(x)
        threshold = {
            "mean": lambda x=x: tau * x.mean(dtype=np.float64),
            "median": lambda x=x: tau * truncated(np.sort(x, None)[(x.size + 1) // 2 - 1]),
            "absolute": lambda: tau,
            "quantile": lambda: truncated(np.sort(abs(whole))[int(np.ceil(tau * whole.size)) - 1]),
        }[tau_by]()
        above = x.astype(np.float64) > threshold
        squares = x.astype(np.float64) ** 2
        assert found[name].massive == above.mean()
        assert found[name].energy == pytest.approx(squares[above].sum() / squares.sum())


def truncated(value):
    """A float32 rounded down to bfloat16."""
    return float((np.float32(value).view(np.uint32) & 0xFFFF0000).view(np.float32))


# --- levels and scores ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["half", "block"])
def test_levels_are_weighted_means_of_linear_layers(model, stats, level):
    linear = sensitivity(model, stats, "int2g32", gradients=made_up)
    found = sensitivity(model, stats, "int2g32", gradients=made_up, level=level)
    assert found.level == level
    assert found.rows == linear.at(level).rows
    for row in found.rows:
        own = [one for one in linear.rows if part_of(one.layer, level) == row.layer]
        sizes = np.array([one.parameters for one in own], float)
        expected = sizes @ [one.score for one in own] / sizes.sum()
        assert row.score == pytest.approx(expected, rel=1e-9)


def test_weights_are_those_of_the_format_or_of_the_caller(model, stats):
    found = sensitivity(model, stats, ["int2g32", "binaryg32"], gradients=made_up)
    assert found.weights == {"int2g32": (0.5, 0.3, 0.2), "binaryg32": (0.3, 0.5, 0.2)}
    found = sensitivity(model, stats, "int2g32", weights=(1, 0, 1), normalize="rank")
    assert found.weights["int2g32"] == (1, 0, 0)
    by_quant = sorted(rows_of(found).values(), key=lambda row: row.quant)
    assert [row.score for row in by_quant] == pytest.approx(np.linspace(0, 1, 7 * BLOCKS))
    assert found.rows[0].gradient is None


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["linear", "half", "block"])
def test_measured_is_the_divergence_of_that_layer_alone(model, stats, level):
    formats = ["int2g32", "int3g32 a32"]
    found = sensitivity(model, stats, formats, level=level, measure=True)
    assert found.measured_windows == SAMPLES
    for format in formats:
        for part, row in rows_of(found, format).items():
            student = model.copy()
            for name, linear in model.linears():
                if part_of(name, level) == part:
                    layer, _ = encode(linear, LayerInputs(), LayerPlan.parse(format, RTN))
                    student.replace_linear(name, layer)
            expected = lq.kl_divergence(student, model, stats.tokens.ravel(), WINDOW)
            assert row.measured == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
            assert row.measured > 0


def test_fewer_windows_can_be_measured(model, stats):
    found = sensitivity(model, stats, "int2g32", level="block", measure=2)
    assert (found.measured_windows, found.shape) == (2, (SAMPLES, WINDOW))
    student = model.copy()
    for name, linear in model.linears():
        if name.startswith("model.layers.2."):
            student.replace_linear(
                name, encode(linear, LayerInputs(), LayerPlan.parse("int2g32", RTN))[0]
            )
    expected = lq.kl_divergence(student, model, stats.tokens[:2].ravel(), WINDOW)
    assert rows_of(found)["model.layers.2"].measured == pytest.approx(float(expected), rel=1e-6)


def test_a_block_that_occurs_twice_is_quantized_in_one_place():
    model = random_model(layers=2)
    model.blocks[1] = model.blocks[0]
    stats = calibrated(model)
    found = rows_of(sensitivity(model, stats, "int2g32", level="block", measure=1))
    student = model.copy()
    for name, linear in model.linears():
        if name.startswith("model.layers.0."):
            student.replace_linear(
                name, encode(linear, LayerInputs(), LayerPlan.parse("int2g32", RTN))[0]
            )
    expected = lq.kl_divergence(student, model, stats.tokens[0], WINDOW)
    assert found["model.layers.0"].measured == pytest.approx(float(expected), rel=1e-6)
    assert found["model.layers.1"].measured != found["model.layers.0"].measured


def test_rankings_before_and_after_rotation(model, stats):
    turned = rotate(model, seed=1)
    before = sensitivity(model, stats, "int2g32", level="block", measure=1)
    after = sensitivity(turned, calibrated(turned), "int2g32", level="block", measure=1)
    found = before.compare(after, by="measured")["int2g32"]
    assert -1 <= found["kendall"] <= 1
    assert before.compare(before)["int2g32"]["kendall"] == pytest.approx(1)


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau_by", "tau", "runs"),
    [("absolute", 1, 1), ("mean", 1, 2), ("median", 1, 2), ("quantile", 0.5, 2)],
)
def test_work_is_linear_in_samples(model, monkeypatch, tau_by, tau, runs):
    calls = {"blocks": 0, "heads": 0, "layers": 0}

    def counted(name, function):
        def wrapper(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return wrapper

    for samples in (1, 2, 5):
        tokens = random_tokens(samples * WINDOW).reshape(samples, WINDOW)
        stats = calibrate(model, tokens)
        with monkeypatch.context() as patch:
            patch.setattr(Model, "block_forward", counted("blocks", Model.block_forward))
            patch.setattr(Model, "head_logits", counted("heads", Model.head_logits))
            patch.setattr(MODULE, "encode", counted("layers", encode))
            calls.update(dict.fromkeys(calls, 0))
            sensitivity(model, stats, "int2g32", tau=tau, tau_by=tau_by)
            assert calls == {"blocks": runs * BLOCKS * samples, "heads": 0, "layers": 7 * BLOCKS}
            calls.update(dict.fromkeys(calls, 0))
            sensitivity(model, stats, "int2g32", tau=tau, tau_by=tau_by, measure=True)
        # Each layer runs the blocks from its own on; the float model all but the last once.
        later = 7 * BLOCKS * (BLOCKS + 1) // 2 + BLOCKS - 1
        assert calls == {
            "blocks": (runs * BLOCKS + later) * samples,
            "heads": (7 * BLOCKS + 1) * samples,
            "layers": 7 * BLOCKS,
        }


def test_progress_counts_every_step(model, stats):
    done = []
    for options in ({}, {"measure": 2, "level": "half"}, {"tau_by": "quantile", "tau": 0.9}):
        done.clear()
        sensitivity(model, stats, "int2g32", progress=lambda *c: done.append(c), **options)
        total = done[-1][1]
        assert done == [(i + 1, total) for i in range(total)]


def test_a_bar_if_asked(model, stats, capsys):
    sensitivity(model, stats, "int2g32", progress=True)
    total = BLOCKS + 7 * BLOCKS
    assert f"{total}/{total}" in capsys.readouterr().err


def test_the_model_is_left_unchanged(model, stats):
    before = dict(model.linears())
    logits = model.logits(stats.tokens[0])
    sensitivity(model, stats, "int2g32", measure=1)
    assert all(before[name] is linear for name, linear in model.linears())
    assert np.array_equal(model.logits(stats.tokens[0]), logits)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "layer"}, "level is 'layer', expected one of 'linear'"),
        ({"normalize": "max"}, "normalize is 'max', expected one of 'minmax'"),
        ({"tau_by": "max"}, "tau_by is 'max', expected one of 'mean'"),
        ({"tau": -1}, "tau is -1, expected 0 to 1e\\+30"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"tau_by": "quantile"}, "tau is 100.0, expected 0 to 1 with tau_by = 'quantile'"),
        ({"weights": (1, -1, 1)}, "weights are"),
        ({"measure": 0}, "measure is 0, expected at least 1"),
        ({"measure": SAMPLES + 1}, "measure is 4, but stats has only 3 windows"),
    ],
)
def test_options_out_of_range_are_refused(model, stats, options, said):
    with pytest.raises(ValueError, match=said):
        sensitivity(model, stats, "int2g32", **options)


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ([], "formats is empty"),
        (["int2g32", "int2g32"], "'int2g32' twice"),
        ("int9g32", "unknown format"),
        ("int2g32 + int3g32 shared", "expected format int2g32"),
    ],
)
def test_formats_that_cannot_be_scored_are_refused(model, stats, formats, said):
    with pytest.raises(ValueError, match=said):
        sensitivity(model, stats, formats)


def test_what_does_not_belong_together_is_refused(model, stats):
    with pytest.raises(ValueError, match="rounded by gptq, but stats has no Hessians"):
        sensitivity(model, calibrated(model), LayerPlan.parse("int2g32"))
    with pytest.raises(ValueError, match=r"another model: 'model\.layers\.2\..* in only one"):
        sensitivity(random_model(layers=2), stats, "int2g32")
    with pytest.raises(ValueError, match="quantized already"):
        sensitivity(lq.compress(model, "int4g32", method="rtn"), stats, "int2g32")


def changed(change):
    def gradients(model, tokens):
        yield from change(list(made_up(model, tokens)))

    return gradients


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found[1:], "did not yield 'model.layers.2.mlp.down_proj'"),
        (lambda found: [*found, found[0]], "'model.layers.2.mlp.down_proj' twice"),
        (lambda found: [("lm_head", None)], "'lm_head' which the model does not have"),
        (
            lambda found: [(found[0][0], found[0][1].T)],
            r"has shape \(96, 64\), expected \(64, 96\)",
        ),
        (
            lambda found: [(found[0][0], np.full((64, 96), np.nan, np.float32))],
            r"model\.layers\.2\.mlp\.down_proj: gradient has a NaN",
        ),
    ],
)
def test_wrong_gradients_are_named(model, stats, change, said):
    with pytest.raises(ValueError, match=said):
        sensitivity(model, stats, "int2g32", gradients=changed(change))
