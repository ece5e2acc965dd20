"""compress(): what comes out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq import _core
from lowbitq.calibration import Statistics, calibrate
from lowbitq.compression import compress
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.loading import load
from lowbitq.models.quantized import QuantizedModel
from lowbitq.plans import Plan
from lowbitq.quantizers import relative_error

TOKENS = random_tokens(8 * 64).reshape(8, 64)
HELD_OUT = random_tokens(64, seed=1)
MUCH = random_tokens(64 * 64, seed=2).reshape(64, 64)  # enough for feedback not to overfit


def names_of(model):
    return [name for name, _ in model.linears()]


def assert_same(one, two):
    for (name, a), (_, b) in zip(one.matrices(), two.matrices(), strict=True):
        assert np.array_equal(a.tensor.panels, b.tensor.panels), name
    assert [r["sha256"] for r in one.records.values()] == [
        r["sha256"] for r in two.records.values()
    ]


def divergence(model, reference):
    """Mean KL divergence of the predictions, in nats."""
    log_p, log_q = (
        x - np.log(np.exp(x).sum(1, keepdims=True))
        for x in (m.logits(HELD_OUT).astype(np.float64) for m in (reference, model))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(1).mean()


def test_blocks_without_rope_stay_without():
    model = random_model()
    model.blocks[1].rope = False
    small = compress(model, "int8g32", text=TOKENS, rotation="hadamard", activation_bits=None)
    assert [block.rope for block in small.blocks] == [True, False, True]
    assert divergence(small, model) < 1e-3


@pytest.mark.parametrize("rotation", ["none", "hadamard", "orthogonal"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_eight_bits_change_little(method, rotation):
    model = random_model()
    before = model.logits(HELD_OUT)
    small = compress(
        model, "int8g32", text=TOKENS, method=method, rotation=rotation, activation_bits=None
    )
    assert isinstance(small, QuantizedModel)
    assert all(isinstance(linear, QuantizedLinear) for _, linear in small.linears())
    assert np.array_equal(model.logits(HELD_OUT), before), "the given model has changed"
    assert divergence(small, model) < 1e-3
    assert {layer.rounding.method for layer in small.plan.layers.values()} == {method}
    assert small.bits_per_weight == pytest.approx(9, abs=0.01)


def test_feedback_beats_rounding():
    """In the median: of one rotation the divergence on so few tokens is a matter of luck."""
    model = random_model(seed=1)
    errors = {
        method: [
            divergence(compress(model, "int3g32", text=MUCH, method=method, seed=seed), model)
            for seed in range(7)
        ]
        for method in ("rtn", "gptq")
    }
    assert np.median(errors["gptq"]) < np.median(errors["rtn"])


@pytest.mark.parametrize("options", [
    {"order": "act"}, {"order": "none"}, {"damping_by": "mean"}, {"importance": False},
    {"arithmetic": "float64"}, {"first_tokens": 0}, {"range": "minmax"}, {"norm": 2.4},
    {"sweeps": 1},
])  # fmt: skip
def test_options_reach_the_core(options):
    model = random_model(layers=1)
    base = compress(model, "int3g32", text=TOKENS)
    other = compress(model, "int3g32", text=TOKENS, **options)
    if options != {"arithmetic": "float64"}:
        assert base.records != other.records
    assert divergence(other, model) < 1


@pytest.mark.parametrize("format", [
    "int4", "int4tensor", "int4tensorsym", "int4g32s8", "int2g32s4", "ternaryg64", "binary",
    "nf4g64", "log3g32", "kmeans2g64", "int4symz8",
])  # fmt: skip
@pytest.mark.parametrize("order", ["group", "act"])
def test_every_kind_of_format(format, order):
    model = random_model(layers=1)
    small = compress(model, format, text=TOKENS, order=order)
    errors = [record["relative_error"] for record in small.records.values()]
    assert min(errors) > 0
    assert max(errors) < 0.6
    assert np.isfinite(small.logits(HELD_OUT)).all()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_chosen_zero_is_kept(tmp_path, method, sweeps):
    model = random_model()
    text = "int4g32symz8"
    small = compress(
        model, text, text=TOKENS, method=method, sweeps=sweeps, embedding="int8g64symz128"
    )
    assert {layer.copies[0].format for layer in small.plan.layers.values()} == {text}
    for name, linear in small.matrices():
        tensor = linear.tensor
        zero = 128 if name == "model.embed_tokens" else 8
        assert tensor.zero == tensor.format.zero == zero, name
        assert (tensor.offset == -zero * tensor.scale).all()
        assert (tensor.codes == zero).any(), "nothing became an exact zero"
    small.save(tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert loaded.plan == small.plan
    assert_same(loaded, small)
    assert np.array_equal(loaded.logits(HELD_OUT), small.logits(HELD_OUT))
    assert divergence(small, model) < 0.1


def untied_model(**options):
    model = random_model(**options)
    model.head = Linear(random_model(seed=7).embedding.weight)
    return model


@pytest.mark.parametrize("make", [random_model, untied_model])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_embedding_and_head_are_packed(make, rotation):
    model = make()
    small = compress(model, "int4g32", text=TOKENS, rotation=rotation)
    outer = dict(small.matrices())
    for name in ("model.embed_tokens", "lm_head"):
        assert (name in outer) == (name in dict(model.matrices())) == (name in small.records)
        if name in outer:
            before = outer[name].rotate_input(dict(model.matrices())[name].weight)
            after = outer[name].tensor.dequantize()
            assert outer[name].rotation is small.residual_rotation
            half_step = (outer[name].tensor.scale / 2).max()
            assert abs(after - before).max() <= 1.01 * half_step
            exact = relative_error(before, after)
            assert small.records[name]["relative_error"] == pytest.approx(exact, rel=1e-4)
            assert small.records[name]["format"] == str(small.plan.embedding)
            assert outer[name].activation_bits == 8
    assert isinstance(model.embedding, Linear), "the given model has changed"


def test_an_embedding_may_be_left_alone():
    model = untied_model()
    kept = compress(model, "int4g32", method="rtn", embedding=None)
    small = compress(model, "int4g32", method="rtn")
    assert kept.embedding is model.embedding
    assert kept.head is model.head
    assert set(small.records) - set(kept.records) == {"model.embed_tokens", "lm_head"}
    assert kept.bits_per_weight == small.bits_per_weight
    saved = 2 * 4 * 100 * 64 - small.embedding.nbytes - small.head.nbytes
    assert kept.nbytes - small.nbytes == saved


@pytest.mark.parametrize(("asked", "given"), [(8, 8), (4, 8), (None, None)])
def test_activations_of_the_head(asked, given):
    small = compress(untied_model(), "int4g32", method="rtn", activation_bits=asked)
    assert (small.embedding.activation_bits, small.head.activation_bits) == (given, given)


def test_blocks_see_the_packed_embedding():
    """Two bits of it are another input, and so are other codes."""
    model = random_model(layers=1)
    records = [
        compress(model, "int2g32", text=TOKENS, rotation="none", embedding=format).records
        for format in ("int8g64", "int2g64")
    ]
    name = "model.layers.0.mlp.up_proj"
    assert records[0][name]["sha256"] != records[1][name]["sha256"]


def test_formats_follow_the_plan():
    model = random_model()
    plan = Plan.uniform(names_of(model), "int4g32", overrides={"*.q_proj": "int2g64"})
    small = compress(model, plan, text=TOKENS)
    for name, linear in small.linears():
        expected = "int2g64" if name.endswith("q_proj") else "int4g32"
        assert str(linear.tensor.format) == expected == small.records[name]["format"]


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_layers_have_adapters(tmp_path, rotation):
    model, options = random_model(), {"text": MUCH, "rotation": rotation}
    plain = compress(model, "int2g32", **options)
    small = compress(model, "int2g32 + rank16", **options)
    small.save(tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert np.array_equal(loaded.logits(HELD_OUT), small.logits(HELD_OUT))
    assert (loaded.plan, loaded.records.keys()) == (small.plan, small.records.keys())

    added = sum(16 * 16 * sum(linear.shape) for _, linear in small.linears())
    weights = sum(np.prod(linear.shape) for _, linear in small.linears())
    assert small.bits_per_weight == pytest.approx(plain.bits_per_weight + added / weights)
    assert loaded.bits_per_weight == small.bits_per_weight
    assert divergence(small, model) < divergence(plain, model)
    first = "model.layers.0.self_attn.q_proj"  # later layers see other inputs
    assert small.records[first]["relative_error"] < plain.records[first]["relative_error"]
    assert {small.records[name].get("rank") for name, _ in small.linears()} == {16}


def test_ranks_that_do_not_fit_are_refused_before_work_begins():
    message = (
        r"model.layers.0.self_attn.k_proj: rank is 33, expected at most 32 for 32 x 64 weights"
    )
    with pytest.raises(ValueError, match=message):
        compress(random_model(), "int4g32 + rank33", text=TOKENS)
    plan = Plan.uniform(names_of(random_model()), "int4g32", embedding="int4g32 + rank65")
    with pytest.raises(ValueError, match="embed_tokens: rank is 65, expected at most 64"):
        compress(random_model(), plan, text=TOKENS)


def test_the_embedding_may_have_an_adapter(tmp_path):
    model = random_model()
    kept = {"text": TOKENS, "activation_bits": None}
    plain, small = (
        compress(model, "int8g32", embedding=f"int2g32{more}", **kept) for more in ("", " + rank32")
    )
    assert divergence(small, model) < divergence(plain, model)
    small.save(tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert np.array_equal(loaded.logits(HELD_OUT), small.logits(HELD_OUT))


def test_records_hold_the_errors_of_the_outputs():
    """Of block 0, whose inputs are those of the float model with the packed embedding."""
    model = random_model()
    small = compress(model, "int3g32", text=TOKENS, rotation="none", first_tokens=0, drift=False)
    taps = {}
    inputs = []
    for row in TOKENS:
        model.block_forward(0, small.embed(row), taps)
        inputs.append(taps["down"].copy())
    x = np.concatenate(inputs).astype(np.float64)
    weight = model.blocks[0].linears["down_proj"].weight
    error = weight - small.blocks[0].linears["down_proj"].tensor.dequantize()
    expected = ((x @ error.T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    record = small.records["model.layers.0.mlp.down_proj"]
    assert record["relative_error"] == pytest.approx(expected, rel=1e-3)
    assert record["damping"] == pytest.approx(0.01 * np.median((x**2).sum(0)), rel=1e-4)
    assert (record["retries"], record["dead"]) == (0, 0)


def test_blocks_see_the_quantized_prefix():
    """Block 1's error is smallest on what block 0, quantized, sends it."""
    model = random_model(layers=2)
    whole = compress(model, "int2g32", text=TOKENS, rotation="none")
    alone = Plan.uniform(
        names_of(model), "int2g32", rotation="none", overrides={"model.layers.0.*": "int8g32"}
    )
    other = compress(model, alone, text=TOKENS)
    name = "model.layers.1.mlp.up_proj"
    assert whole.records[name]["sha256"] != other.records[name]["sha256"]


def test_statistics_bring_their_tokens():
    model = random_model()
    stats = calibrate(model, TOKENS)
    assert_same(compress(model, "int4g32", stats), compress(model, "int4g32", text=TOKENS))
    with pytest.raises(TypeError, match="text and stats"):
        compress(model, "int4g32", stats, text=TOKENS)


def test_presets():
    model = random_model(layers=1)
    plans = {
        preset: compress(model, "int3g32", text=TOKENS, preset=preset).plan
        for preset in (None, "fast", "balanced")
    }
    assert [plan.drift for plan in plans.values()] == [True, False, True]
    up = plans["fast"].layers["model.layers.0.mlp.up_proj"]
    assert up.rounding.sweeps == 0
    assert plans[None] == plans["balanced"]
    assert not compress(model, "int3g32", text=TOKENS, preset="balanced", drift=False).plan.drift
    assert not compress(model, "int3g32", text=TOKENS[:1]).plan.drift, "one window"
    assert not compress(model, "int3g32", method="rtn").plan.drift, "no text"
    assert not compress(model, "int3g32", calibrate(model, TOKENS, hessians=True)).plan.drift
    with pytest.raises(ValueError, match="preset is 'slow', expected one of 'fast', 'balanced'"):
        compress(model, "int3g32", text=TOKENS, preset="slow")
    with pytest.raises(TypeError, match="'preset' is given beside a plan"):
        compress(model, plans[None], text=TOKENS, preset="fast")


def test_hessians_stand_for_the_text():
    """Without rotation and with a float embedding, those of the first block are those it sees."""
    model = random_model(layers=2)
    stats = calibrate(model, TOKENS, hessians=True, first_tokens=3, first_weight=7)
    options = {"rotation": "none", "embedding": None, "first_tokens": 3, "first_weight": 7}
    options["drift"] = False
    seen = compress(model, "int3g32", text=TOKENS, **options).records
    known = compress(model, "int3g32", stats, **options).records
    for name, record in seen.items():
        same = record["sha256"] == known[name]["sha256"]
        assert same == name.startswith("model.layers.0.")


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
def test_hessians_are_turned_with_the_model(rotation):
    """To the last digits: sums of other numbers, so codes may differ at a tie."""
    model = random_model(layers=1)
    model.blocks[0].attention_norm[:] = np.linspace(0.5, 2, 64)
    stats = calibrate(model, MUCH, hessians=True)
    options = {"rotation": rotation, "embedding": None, "drift": False}
    seen = compress(model, "int3g32", text=MUCH, **options).records
    known = compress(model, "int3g32", stats, **options).records
    for name, record in seen.items():
        assert known[name]["damping"] == pytest.approx(record["damping"], rel=1e-4)
        assert known[name]["relative_error"] == pytest.approx(record["relative_error"], rel=0.02)


def test_hessians_that_do_not_fit_are_refused(tmp_path):
    model = random_model(layers=1)
    stats = calibrate(model, TOKENS, hessians=True)
    compress(model, "int3g32", stats, work_dir=tmp_path)
    other = calibrate(model, TOKENS, hessians=True, first_tokens=0)
    with pytest.raises(ValueError, match="with different hessians"):
        compress(model, "int3g32", other, work_dir=tmp_path)
    name = "model.layers.0.self_attn.o_proj"
    del stats.hessians[name]
    with pytest.raises(ValueError, match=rf"{name}'\] has shape None, expected \(64, 64\)"):
        compress(model, "int3g32", stats)
    stats = calibrate(model, TOKENS, hessians=True)
    model.blocks[0].mlp_norm[5] = 0
    with pytest.raises(ValueError, match="a norm of block 0 has gains of 0: give text"):
        compress(model, "int3g32", stats)


def test_fisher_weights_reach_the_layers():
    """Either in Hessians or beside the text, which is the same for the first block."""
    model = random_model(layers=2)
    plain = calibrate(model, TOKENS, hessians=True)
    options = {"rotation": "none", "embedding": None, "first_tokens": 2, "clip": 5}
    options["drift"] = False
    stats = calibrate(model, TOKENS, fisher=True, first_tokens=2, clip=5)
    weighted = calibrate(model, TOKENS, fisher=True, hessians=True, first_tokens=2, clip=5)
    unweighted, seen, known, clipped = (
        compress(model, "int3g32", given, **options | more).records
        for given, more in ((plain, {}), (stats, {}), (weighted, {}), (stats, {"clip": 1}))
    )
    for name, record in seen.items():
        assert record["sha256"] not in (unweighted[name]["sha256"], clipped[name]["sha256"])
        same = record["sha256"] == known[name]["sha256"]
        assert same == name.startswith("model.layers.0.")


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
def test_weighted_hessians_are_turned_with_the_model(rotation):
    model = random_model(layers=1)
    model.blocks[0].attention_norm[:] = np.linspace(0.5, 2, 64)
    options = {"rotation": rotation, "embedding": None, "drift": False}
    seen, known = (
        compress(model, "int3g32", calibrate(model, MUCH, fisher=True, hessians=h), **options)
        for h in (False, True)
    )
    for name, record in seen.records.items():
        assert known.records[name]["damping"] == pytest.approx(record["damping"], rel=1e-3)
        close = pytest.approx(record["relative_error"], rel=0.03)
        assert known.records[name]["relative_error"] == close


def test_weighted_hessians_lower_the_weighted_error():
    model = random_model(layers=2)
    stats = [calibrate(model, MUCH, hessians=True, fisher=fisher) for fisher in (False, True)]
    errors = []
    for found in stats:
        small = dict(compress(model, "int3g32", found, rotation="none").linears())
        errors.append(0.0)
        for name, linear in model.linears():
            difference = small[name].tensor.dequantize() - linear.weight
            errors[-1] += _core.hessian_error(stats[1].hessians[name], difference)
    assert errors[1] < errors[0]


def test_token_weights_that_do_not_fit_are_refused(tmp_path):
    model = random_model(layers=1)
    stats = calibrate(model, TOKENS, fisher=True)
    compress(model, "int3g32", stats, work_dir=tmp_path)
    other = calibrate(model, TOKENS, fisher=True, seed=1)
    with pytest.raises(ValueError, match="with different token weights"):
        compress(model, "int3g32", other, work_dir=tmp_path)
    name = "model.layers.0.self_attn.o_proj"
    stats.token_weights[name] = stats.token_weights[name][1:]
    message = rf"{name}'\] has shape \(7, 64\), expected \(8, 64\)"
    with pytest.raises(ValueError, match=message):
        compress(model, "int3g32", stats)


def test_progress_reports_each_layer():
    steps = []
    small = compress(random_model(), "int4g32", text=TOKENS, progress=steps.append)
    assert [step.done for step in steps] == list(range(1, 23))
    assert {step.total for step in steps} == {22}
    assert steps[0].layer == "model.embed_tokens"
    assert {step.layer: step.record for step in steps} == small.records


def test_progress_bar(capsys):
    compress(random_model(layers=1), "int4g32", text=TOKENS, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "8/8" in shown.err
    assert "error" in shown.err
    compress(random_model(layers=1), "int4g32", text=TOKENS)
    assert capsys.readouterr().err == ""


def test_refusals():
    model = random_model()
    with pytest.raises(TypeError, match="'seed' is given beside a plan"):
        compress(model, Plan.uniform(names_of(model), "int4g32"), text=TOKENS, seed=1)
    with pytest.raises(ValueError, match="the plan is for another model"):
        compress(model, Plan.uniform(names_of(random_model(layers=2)), "int4g32"), text=TOKENS)
    with pytest.raises(ValueError, match="unknown format"):
        compress(model, "int9g32", text=TOKENS)
    with pytest.raises(TypeError, match="colour"):
        compress(model, "int4g32", text=TOKENS, colour="red")
    small = compress(model, "int4g32", method="rtn")
    with pytest.raises(ValueError, match="already"):
        compress(small, "int4g32", text=TOKENS)
    with pytest.raises(TypeError, match="stats is str, expected Statistics"):
        compress(model, "int4g32", "a text")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (TOKENS + 0.5, TypeError, "text has dtype float64"),
        (TOKENS > 5, TypeError, "text has dtype bool"),
        (TOKENS + 100, ValueError, r"text has \d+, expected 0 to 99"),
        (TOKENS.astype(np.int64) + 2**32, ValueError, r"text has 42949673\d\d, expected 0 to 99"),
        (TOKENS[0] - 50, ValueError, r"text has -\d+, expected 0 to 99"),
        (TOKENS[:, :1], ValueError, r"text has shape \(8, 1\), expected at least one window"),
        (TOKENS[:0], ValueError, r"text has shape \(0, 64\), expected at least one window"),
        (np.arange(50), ValueError, "text has 50 tokens, fewer than one window of 64"),
        (np.zeros((1, 2049), int), ValueError, "window is 2049, but the model has 2048 positions"),
        ("text", ValueError, "no tokenizer"),
    ],
)
def test_text_is_checked_before_work_begins(tmp_path, text, error, message):
    model, work = random_model(), tmp_path / "work"
    with pytest.raises(error, match=message):
        compress(model, "int4g32", text=text, samples=4, window=64, work_dir=work)
    with pytest.raises(error, match=message):
        calibrate(model, text, samples=4, window=64)
    if isinstance(text, np.ndarray) and text.ndim == 2:
        with pytest.raises(
            error, match=re.sub("^text has (?!shape)", "stats.tokens has ", message)
        ):
            compress(model, "int4g32", Statistics(text, {}, {}, []), work_dir=work)
    assert not work.exists()


def test_windows_are_not_longer_than_the_positions():
    """The default is 2048: the error says what to give instead."""
    model = random_model()
    model.config = replace(model.config, max_positions=1024)
    for run in (calibrate, lambda model, text: compress(model, "int4g32", text=text)):
        with pytest.raises(ValueError, match=r"window is 2048, but .* 1024 .* give window=1024"):
            run(model, np.arange(5000) % 100)


def test_windows_are_not_longer_than_the_sliding_window(tmp_path):
    model, work = random_model(), tmp_path / "work"
    model.config = replace(model.config, sliding_window=63)
    with pytest.raises(ValueError, match="64 tokens exceed the sliding window of 63"):
        compress(model, "int4g32", text=TOKENS, work_dir=work)
    assert not work.exists()


@pytest.mark.parametrize("options", [
    {"method": "gptq"}, {"method": "rtn"}, {"method": "rtn", "embedding": None},
    {"rotation": "none"},
])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_refused(options, value):
    """Wherever it is not; in a matrix, a norm within, and one that no block reads."""
    for name, place, array in [
        ("model.layers.1.self_attn.q_proj.weight", (3, 4), lambda m: linear_of(m, 1).weight),
        ("model.embed_tokens.weight", (5, 6), lambda m: m.embedding.weight),
        ("model.layers.2.input_layernorm.weight", (9,), lambda m: m.blocks[2].attention_norm),
        ("model.norm.weight", (7,), lambda m: m.final_norm),
    ]:
        model = random_model()
        array(model)[place] = value
        where = f"{name} has a NaN or an infinity at [{', '.join(map(str, place))}]"
        with pytest.raises(ValueError, match=re.escape(where)):
            compress(model, "int4g32", text=TOKENS, **options)
        with pytest.raises(ValueError, match=re.escape(where)):
            calibrate(model, TOKENS)


def linear_of(model, index):
    return model.blocks[index].linears["q_proj"]
