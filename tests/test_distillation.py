"""distill(): what learns, what stays, and what is left after an interruption."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from random_model import random_tokens
from student_models import TEXT, content, pair

import lowbitq as lq
from lowbitq.distillation import AdamW, cosine, distill
from lowbitq.losses import Loss
from lowbitq.models.loading import load
from lowbitq.students import KINDS, Parameter, Student

# Windows of text like that of calibration; the last four are held back.
WINDOWS = random_tokens(20 * 48, seed=9).reshape(20, 48)
QUICK = {"steps": 12, "batch": 4, "validation": 4, "every": 4, "warmup": 2}
FAST = dict.fromkeys(KINDS, 3e-3)


def validations(model):
    return model.provenance["distillation"]["validation"]


def improvement(model):
    curve = [value for _, value in validations(model)]
    return min(curve) / curve[0]


def held_back_kl(model, teacher):
    return float(
        np.mean([lq.kl_divergence(model, teacher, row, window=48) for row in WINDOWS[-4:]])
    )


def assert_same(one, two):
    assert content(one) == content(two)
    tokens = TEXT[0]
    assert np.array_equal(one.logits(tokens), two.logits(tokens))
    assert validations(one) == validations(two)


# Which stored parts a kind may change. Rows go into scales and offsets.
TOUCHES = dict.fromkeys(("scale", "offset", "level", "row"), "grid") | {
    kind: kind for kind in ("norm", "bias", "adapter")
}


@pytest.mark.parametrize("kind", TOUCHES)
def test_each_kind_learns_alone(kind):
    small, teacher = pair("kmeans2g32 a32" if kind == "level" else "int2g32 a32 + rank2")
    before = content(small)
    learned = distill(small, teacher, WINDOWS, learn=[kind], rates=FAST, **QUICK)
    assert improvement(learned) < (1 if kind == "level" else 0.97)
    changed = {part for part, now in content(learned).items() if now != before[part]}
    assert changed == {TOUCHES[kind]}
    assert held_back_kl(learned, teacher) < held_back_kl(small, teacher)
    assert content(small) == before, "the given model has changed"


def test_adapters_and_scales_learn_together():
    small, teacher = pair()
    before = content(small)
    learned = distill(small, teacher, WINDOWS, learn=("adapter", "scale"), rates=FAST, **QUICK)
    changed = {part for part, now in content(learned).items() if now != before[part]}
    assert changed == {"adapter", "grid"}
    for (_, one), (_, two) in zip(small.linears(), learned.linears(), strict=True):
        assert np.array_equal(one.tensor.codes, two.tensor.codes)
        assert np.array_equal(one.tensor.offset, two.tensor.offset)
    assert held_back_kl(learned, teacher) < held_back_kl(small, teacher)
    assert learned.bits_per_weight == small.bits_per_weight


@pytest.mark.parametrize("format", ["int2g16s4", "trellis2g32", "kmeans2g32", "int4tensor"])
def test_every_kind_of_scale_learns(format, tmp_path):
    small, teacher = pair(f"{format} a32")
    learned = distill(
        small, teacher, WINDOWS, learn=["scale", "offset", "norm"], rates=FAST, **QUICK
    )
    assert improvement(learned) < 0.99
    assert content(learned)["codes"] == content(small)["codes"]
    learned.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert np.array_equal(loaded.logits(TEXT[0]), learned.logits(TEXT[0]))
    assert loaded.provenance["distillation"]["options"]["steps"] == 12


def test_the_best_validation_is_returned():
    small, teacher = pair()
    wild = distill(small, teacher, WINDOWS, learn=["scale"], rates={"scale": 3.0}, **QUICK)
    curve = validations(wild)
    assert [step for step, _ in curve] == [0, 4, 8, 12]
    assert min(curve, key=lambda pair: pair[1])[0] == 0
    assert content(wild) == content(small)


def test_validation_is_the_divergence_on_what_is_held_back():
    small, teacher = pair("int2g32 a32")
    seen = distill(small, teacher, WINDOWS, learn=["scale"], **QUICK | {"steps": 1})
    per_window = []
    for row in WINDOWS[-4:]:
        log_p, log_q = (
            x - np.log(np.exp(x).sum(1, keepdims=True))
            for x in (m.logits(row).astype(np.float64) for m in (teacher, small))
        )
        per_window.append((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    assert validations(seen)[0] == (0, pytest.approx(np.mean(per_window), rel=1e-4))


def test_the_seed_decides():
    small, teacher = pair()
    options = {"learn": ["scale", "norm"], "rates": FAST, **QUICK}
    one, two, other = (distill(small, teacher, WINDOWS, seed=seed, **options) for seed in (1, 1, 2))
    assert_same(one, two)
    assert content(one) != content(other)


class StopError(Exception):
    """Raised in place of a kill."""


def stopping_after(steps):
    def progress(found):
        if found.step == steps:
            raise StopError

    return progress


@pytest.mark.parametrize("steps", [1, 4, 7, 12])
def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, steps):
    small, teacher = pair()
    options = {"learn": KINDS, "rates": FAST, "regularization": 1e-3, **QUICK}
    whole = distill(small, teacher, WINDOWS, **options)
    options["work_dir"] = tmp_path / "work"
    with pytest.raises(StopError):
        distill(small, teacher, WINDOWS, progress=stopping_after(steps), **options)
    seen = []
    resumed = distill(small, teacher, WINDOWS, progress=seen.append, **options)
    assert [found.step for found in seen] == list(range(steps // 4 * 4 + 1, 13))
    assert_same(resumed, whole)
    assert_same(distill(small, teacher, WINDOWS, **options), whole)


def test_work_of_something_else_is_refused(tmp_path):
    small, teacher = pair()
    other, other_teacher = pair("int2g32 a32 + rank2", biases=False)

    def run(model=small, teacher=teacher, text=WINDOWS, **options):
        return distill(
            model, teacher, text, work_dir=tmp_path, **{"learn": ["scale"]} | QUICK | options
        )

    run()
    changes = {
        "text": {"text": WINDOWS[::-1].copy()},
        r"options \(learn\)": {"learn": ["norm"]},
        r"options \(steps\)": {"steps": 13},
        r"options \(rates\)": {"rates": {"scale": 1e-5}},
        r"options \(seed\)": {"seed": 5},
        r"options \(every\)": {"every": 3},
        r"options \(loss\)": {"loss": "reverse"},
        "model": {"model": other},
        "teacher": {"teacher": other_teacher},
    }
    for said, change in changes.items():
        with pytest.raises(
            ValueError, match=f"training.npz is from another run, with different {said};"
        ):
            run(**change)
    (tmp_path / "training.npz").write_bytes(b"damaged")
    with pytest.raises(lq.FormatError, match=r"training\.npz"):
        run()


def test_patience_ends_training():
    small, teacher = pair()
    wild = distill(
        small,
        teacher,
        WINDOWS,
        learn=["scale"],
        rates={"scale": 3.0},
        patience=2,
        **QUICK | {"steps": 99},
    )
    assert [step for step, _ in validations(wild)] == [0, 4, 8]


def test_time_ends_training():
    small, teacher = pair()
    seen = []
    options = {"learn": ["norm"], "rates": FAST, "progress": seen.append, **QUICK}
    none = distill(small, teacher, WINDOWS, seconds=0, **options)
    assert not seen
    assert content(none) == content(small)
    assert [step for step, _ in validations(none)] == [0]


def test_the_last_step_of_a_shortened_run_is_validated(monkeypatch):
    small, teacher = pair()
    left = iter([0.0] * 6 + [9.0] * 100)
    monkeypatch.setattr("lowbitq.distillation.time.monotonic", lambda: next(left))
    learned = distill(small, teacher, WINDOWS, learn=["norm"], rates=FAST, seconds=5, **QUICK)
    steps = [step for step, _ in validations(learned)]
    assert steps[0] == 0
    assert steps[-1] == len(learned.provenance["distillation"]["steps"])
    assert steps[-1] % 4


def test_a_teacher_that_agrees_teaches_nothing():
    small, _ = pair("int8g32 a32")
    teacher = Student(small, ["scale"])
    teacher.compose()
    seen = []
    learned = distill(
        small, teacher.model, WINDOWS, learn=["scale", "norm"], progress=seen.append, **QUICK
    )
    assert seen[0].loss == pytest.approx(0, abs=1e-9)
    assert seen[0].norm == pytest.approx(0, abs=1e-5)
    assert content(learned)["codes"] == content(small)["codes"]
    assert validations(learned)[0] == (0, pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("loss", ["reverse", "js", "kl + 0.05 ce", "kl, temperature 2"])
def test_other_losses_teach_too(loss):
    small, teacher = pair()
    learned = distill(small, teacher, WINDOWS, learn=["norm"], loss=loss, rates=FAST, **QUICK)
    assert improvement(learned) < 1
    assert learned.provenance["distillation"]["options"]["loss"] == str(Loss.parse(loss))


def test_text_may_be_one_row_of_tokens():
    small, teacher = pair()
    options = {"learn": ["norm"], **QUICK}
    one = distill(small, teacher, WINDOWS.reshape(-1), window=48, **options)
    assert_same(one, distill(small, teacher, WINDOWS, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"every": 0}, "every is 0, expected at least 1"),
        ({"validation": 0}, "validation is 0, expected at least 1"),
        ({"patience": 0}, "patience is 0, expected at least 1"),
        ({"rates": {"colour": 1}}, r"rates has \['colour'\], expected some of scale, "),
        ({"learn": ["colour"]}, r"learn has \['colour'\], expected some of scale, "),
        ({"loss": "anger"}, "unknown loss 'anger'"),
        ({"validation": 17}, "text has 20 windows of 48 tokens, expected at least 21"),
        (
            {"text": np.zeros((9, 4096), np.int32)},
            "window is 4096, but the model has 2048 positions",
        ),
        ({"text": WINDOWS + 99}, r"text has \d+, expected 0 to 99"),
    ],
)
def test_bad_arguments_are_named(options, message):
    small, teacher = pair()
    given = {"text": WINDOWS, "learn": ["norm"], **QUICK} | options
    with pytest.raises(ValueError, match=message):
        distill(small, teacher, **given)


def test_vocabularies_must_agree():
    small, teacher = pair()
    other = teacher.copy()
    other.config = replace(teacher.config, vocab_size=99)
    with pytest.raises(ValueError, match="teacher has a vocabulary of 99, the model of 100"):
        distill(small, other, WINDOWS)


def test_the_bar_shows_validations(capsys):
    small, teacher = pair()
    distill(small, teacher, WINDOWS, learn=["norm"], progress=True, **QUICK)
    shown = capsys.readouterr().err
    assert "distill: 100%" in shown
    assert "held back" in shown


def test_the_learning_rate_rises_and_falls():
    factors = [cosine(step, 100, 10) for step in range(1, 101)]
    assert np.argmax(factors) == 10
    assert factors[10] == 1
    assert factors[-1] == pytest.approx(0.1)
    assert (np.diff(factors[:10]) > 0).all()
    assert (np.diff(factors[10:]) < 0).all()


def test_adamw_is_the_published_algorithm():
    """Against a float64 version written from algorithm 2."""
    rng = np.random.default_rng(0)
    parameters = [
        Parameter(f"p{i}", kind, rng.normal(size=(3, 4)).astype(np.float32))
        for i, kind in enumerate(["scale", "norm"])
    ]
    expected = [p.value.astype(float) for p in parameters]
    moments = [[np.zeros((3, 4)), np.zeros((3, 4))] for _ in parameters]
    optimizer = AdamW(parameters, {"scale": 0.01, "norm": 0.03}, decay=0.1, clip=2.0)
    for step in range(1, 6):
        gradients = [rng.normal(size=(3, 4)).astype(np.float32) for _ in parameters]
        for p, g in zip(parameters, gradients, strict=True):
            p.gradient[:] = g
        norm = math.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in gradients))
        assert optimizer.step(0.5) == pytest.approx(norm, rel=1e-6)
        for i, (g, rate) in enumerate(zip(gradients, (0.01, 0.03), strict=True)):
            g = g * min(1, 2 / norm)
            first, second = moments[i]
            first[:] = 0.9 * first + 0.1 * g
            second[:] = 0.95 * second + 0.05 * g**2
            hat = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
            expected[i] -= 0.5 * rate * (hat + 0.1 * expected[i])
        assert not any(p.gradient.any() for p in parameters)
    for p, value in zip(parameters, expected, strict=True):
        assert np.allclose(p.value, value, atol=1e-6)
