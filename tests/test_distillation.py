"""distill(): what learns, what stays, and what is left after an interruption."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_model import random_tokens
from student_models import TEXT, content, pair, tensors_of, with_activations, with_copies

import lowbitq as lq
from lowbitq.distillation import distill, options_of
from lowbitq.encoding import layer_digest
from lowbitq.losses import Loss
from lowbitq.models.loading import load
from lowbitq.optimizers import AdamW, cosine
from lowbitq.parameters import Parameter
from lowbitq.students import KINDS, Student
from lowbitq.teachers import Teacher
from lowbitq.training import Training

ROOT = Path(__file__).parents[1]

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


# Which stored parts a kind changes. Rows go into scales and offsets; columns are rows of another
# layer, with its bias and adapter.
TOUCHES = {kind: {"grid"} for kind in ("scale", "offset", "level", "row")}
TOUCHES |= {kind: {kind} for kind in ("norm", "bias", "adapter", "activation", "rotation")}
TOUCHES |= {"fusion": {"grid", "weight"}, "column": {"grid", "bias", "adapter"}}


@pytest.mark.parametrize("kind", TOUCHES)
def test_each_kind_learns_alone(kind):
    formats = {"level": "kmeans2g32 a32", "activation": "int4g32 a4"}
    format = formats.get(kind, "int2g32 a32 + rank2")
    small, teacher = pair(format, **{"rotation": "none"} if kind == "column" else {})
    if kind in ("fusion", "rotation"):
        small = with_copies(small)
    before = content(small)
    learned = distill(small, teacher, WINDOWS, learn=[kind], rates=FAST, **QUICK)
    few = {"level", "fusion", "column", "activation", "rotation"}  # parameters
    assert improvement(learned) < (1 if kind in few else 0.97)
    changed = {part for part, now in content(learned).items() if now != before[part]}
    assert changed == TOUCHES[kind]
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


def test_several_copies_of_rounded_inputs_learn(tmp_path):
    small, teacher = pair("int2g32 + rank2")
    small = with_copies(with_activations(small, 8))
    rates = FAST | {"activation": 1e-3, "rotation": 1e-4}
    learned = distill(small, teacher, WINDOWS, learn=KINDS, rates=rates, **QUICK)
    assert improvement(learned) < 0.97
    assert content(learned)["codes"] == content(small)["codes"]
    assert len(tensors_of(learned)) == len(tensors_of(small))
    learned.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert len(tensors_of(loaded)) == len(tensors_of(small))
    assert np.array_equal(loaded.logits(TEXT[0]), learned.logits(TEXT[0]))


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
    monkeypatch.setattr("lowbitq.training.time.monotonic", lambda: next(left))
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


def test_temperatures_are_exact_at_the_ends_of_phases():
    small, teacher = pair()
    changes = {"loss": "kl + 0.5 ce", "temperatures": (5, 3, 1), "steps": 21}
    options, _ = options_for(small, teacher, **changes)
    assert [options.loss_at(step).temperature for step in (1, 11, 21)] == [5, 3, 1]
    assert options.loss_at(6) == Loss(forward=1, cross_entropy=0.5, temperature=4)
    back = replace(options, temperatures=(3.0, 5.0, 3.0))
    assert [back.loss_at(step).temperature for step in (1, 11, 21)] == [3, 5, 3]


def test_a_temperature_that_does_not_change_is_that_of_the_loss():
    small, teacher = pair()
    options = {"learn": ["norm"], **QUICK}
    one = distill(small, teacher, WINDOWS, loss="kl, temperature 2", **options)
    assert_same(one, distill(small, teacher, WINDOWS, temperatures=(2, 2), **options))


def test_regularization_holds_parameters_near_the_start():
    small, teacher = pair("int8g32 a32")
    options = {"learn": ["norm"], "rates": FAST, **QUICK}
    plain = distill(small, teacher, WINDOWS, **options)
    assert_same(plain, distill(small, teacher, WINDOWS, regularization=0.0, **options))
    run = []
    for strength in (0.0, 30.0, 1e6):
        student = Student(small, ["norm"])
        optimizer = AdamW(student.parameters, FAST, pull=strength)
        random = np.random.default_rng(0)
        for _ in range(20):
            for p in student.parameters:
                p.gradient[:] = random.normal(1, 1, p.value.shape)
            optimizer.step(1.0)
        run.append(max(abs(p.value - p.start).max() for p in student.parameters))
    assert run[0] > 2 * run[1] > 1000 * run[2]
    assert run[2] < 1.2e-6  # the float32 next to 1 is 1.2e-7 away


def test_accumulated_gradients_are_those_of_the_batch():
    small, teacher = pair()
    options, rows = options_for(small, teacher, batch=7)
    sums = []
    for at_once in (7, 3, 1):
        run = Training(small, Teacher(teacher, rows), options, rows)
        run.at_once = at_once
        terms = run._gradient(list(range(7)), options.loss_at(1))
        sums.append([p.gradient.copy() for p in run.student.parameters] + [terms["predictions"]])
    for other in sums[1:]:
        for one, two in zip(sums[0], other, strict=True):
            assert np.allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(one).max())


def options_for(small, teacher, **changes):
    arguments = {
        "learn": ["norm", "scale"],
        "rounding": "nearest",
        "loss": "kl",
        "hints": None,
        "window": 48,
        "memory": None,
        "rates": None,
        "top_k": None,
        "temperatures": (),
        "keep": 1,
        "clip": 1.0,
        "decay": 0.0,
        "diversity": 0.0,
        "paces": None,
        "regularization": 0.0,
        "seed": 0,
    }
    return options_of(small, teacher, WINDOWS, **arguments | QUICK | changes)


MEMORY_PROGRAM = """
import sys
sys.path.insert(0, "tests")
import numpy as np
from random_model import random_model, random_tokens
import lowbitq as lq
from lowbitq.memory import peak_of
from lowbitq.training import Training

model = random_model(layers=12)
text = random_tokens(72 * 512).reshape(72, 512)
small = lq.compress(model, "int2g32", method="rtn", embedding=None)
batch = int(sys.argv[1]) if sys.argv[1] != "auto" else "auto"
memory = int(sys.argv[2]) or None
chosen = []
step = Training.step
Training.step = lambda run: chosen.append((run.batch, run.at_once)) or step(run)
options = {"steps": 2, "validation": 2, "learn": ["norm", "scale"]}
held = peak_of(lambda: lq.distill(small, model, text, batch=batch, memory=memory, **options))
print(held, *chosen[0])
"""


def measured(batch, memory):
    """Peak bytes of a fresh process that trains, the batch and the windows at once."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(batch), str(memory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return map(int, run.stdout.split())


def test_a_batch_fits_the_memory():
    least, *_ = measured(1, 0)
    memory = least + 150_000_000
    held, batch, at_once = measured("auto", memory)
    assert 10 < batch < 70, "the test is of a batch that memory decides"
    assert at_once == batch
    assert held <= memory
    more, *_ = measured(batch + 2, 0)
    assert more > memory, "more would have fitted"
    held, batch, at_once = measured(60, memory)
    assert (batch, 10 < at_once < 60) == (60, True)
    assert held <= memory


def test_too_little_memory_is_said():
    small, teacher = pair()
    with pytest.raises(ValueError, match=r"memory is 1000, but one window takes \d+ bytes in all"):
        distill(small, teacher, WINDOWS, memory=1000, **QUICK)


@pytest.mark.parametrize("steps", [4, 7])
def test_an_automatic_batch_is_kept_when_a_run_goes_on(tmp_path, steps):
    small, teacher = pair()
    options = {"learn": ["norm"], "work_dir": tmp_path, "memory": 1 << 40, **QUICK}
    options |= {"batch": "auto"}
    with pytest.raises(StopError):
        distill(small, teacher, WINDOWS, progress=stopping_after(steps), **options)
    resumed = distill(small, teacher, WINDOWS, **options | {"memory": 1})
    assert resumed.provenance["distillation"]["options"]["batch"] == 16


def test_the_best_checkpoints_are_kept(tmp_path):
    small, teacher = pair()
    options = {"learn": ["scale"], "rates": {"scale": 0.05}, "work_dir": tmp_path, **QUICK}
    with pytest.raises(StopError):
        distill(small, teacher, WINDOWS, keep=2, progress=stopping_after(9), **options)
    learned = distill(small, teacher, WINDOWS, keep=2, **options)
    best = sorted((value, step) for step, value in validations(learned))[:2]
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {f"step_{step}" for _, step in best}
    assert learned.provenance["distillation"]["best"] == best[0][1]
    tokens = TEXT[0]
    for value, step in best:
        found = load(tmp_path / f"step_{step}")
        assert held_back_kl(found, teacher) == pytest.approx(value, rel=0.05)
    first = load(tmp_path / f"step_{best[0][1]}")
    assert np.array_equal(first.logits(tokens), learned.logits(tokens))


def test_records_are_of_the_trained_arrays(tmp_path):
    small, teacher = pair()
    learned = distill(small, teacher, WINDOWS, learn=["scale"], rates=FAST, **QUICK)
    for name, linear in learned.linears():
        record, before = learned.records[name], small.records[name]
        assert record["sha256"] == layer_digest(linear) != before["sha256"]
        assert "relative_error" in before
        assert record == {k: v for k, v in before.items() if k != "relative_error"} | {
            "sha256": record["sha256"],
            "trained": True,
        }
    name = "model.embed_tokens"
    assert learned.records[name] == small.records[name]
    learned.save(tmp_path / "m")
    for name, record in load(tmp_path / "m").records.items():
        assert learned.records[name].items() <= record.items()
    levels, teacher = pair("kmeans2g32 a32")
    learned = distill(levels, teacher, WINDOWS, learn=["level"], rates=FAST, **QUICK)
    assert all(learned.records[name]["trained"] for name, _ in learned.linears())


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
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"keep": 2}, "keep is 2, but there is no work_dir"),
        ({"batch": "all"}, "batch is 'all', expected a number or 'auto'"),
        ({"batch": "auto"}, "memory is None, expected a number of bytes with batch = 'auto'"),
        ({"temperatures": (5, 0)}, "temperature is 0, expected 0.001 to 1000"),
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
