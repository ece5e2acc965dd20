"""lowbitq.roundings: words that learn, from where they start to the model that is stored."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from random_model import random_tokens
from student_models import content, pair

from lowbitq import quantize
from lowbitq.distillation import distill
from lowbitq.evaluation import kl_divergence
from lowbitq.gradients import Pass
from lowbitq.losses import Loss
from lowbitq.models.loading import load
from lowbitq.models.rotating import rotate
from lowbitq.optimizers import AdamW
from lowbitq.parameters import Parameter
from lowbitq.reconstruction import reconstruct
from lowbitq.roundings import METHODS, Latents, LearnedRounding, Progress, two_sided
from lowbitq.students import Student
from lowbitq.tensors import QuantizedTensor, code_of

GOLDEN = np.load(Path(__file__).parent / "golden" / "rounding.npz")
WINDOWS = random_tokens(20 * 48, seed=9).reshape(20, 48)
TEXT = random_tokens(64 * 40, seed=7).reshape(-1, 64)
HELD_BACK = random_tokens(64 * 20, seed=5)
SCALAR = ["int2g32", "int4g32sym", "int2g16s4", "ternaryg32", "binary", "kmeans2g32", "nf4g32"]
SCALAR += ["int4tensor", "int4tensorsym"]
BLOCKS = {"window": 64, "samples": 40, "steps": 30, "batch": 8, "rates": {"weight": 0.02}}
# Words that are soft until the end need time to decide.
LONGER = {"window": 64, "samples": 40, "steps": 80, "batch": 16, "rates": {"weight": 0.04}}


def divergence(model, teacher, tokens):
    """Mean over tokens in nats, in float64 from float32 logits."""
    log_p, log_q = (
        x - np.log(np.exp(x).sum(1, keepdims=True))
        for x in (m.logits(tokens).astype(np.float64) for m in (teacher, model))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(1).mean()


def student_of(format, rounding="nearest", learn=("weight",), **options):
    small, teacher = pair(f"{format} a32", **options)
    return small, teacher, Student(small, learn, rounding=rounding, teacher=teacher)


@pytest.mark.parametrize("rounding", METHODS)
@pytest.mark.parametrize("format", SCALAR)
def test_a_student_ends_as_the_quantized_model_unless_it_learns(format, rounding):
    small, _, student = student_of(format, rounding)
    student.compose()
    expected = small.logits(WINDOWS[0])
    assert np.allclose(student.model.logits(WINDOWS[0]), expected, atol=2e-5 * abs(expected).max())
    assert content(student.finish()) == content(small)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("adapter", ["", " + rank2"])
def test_latent_weights_start_as_the_float_weights(rotation, adapter):
    """But for those that error feedback did not round to nearest, or that nearly were not."""
    small, teacher = pair(f"int3g32 a32{adapter}", rotation=rotation, layers=1)
    student = Student(small, ["weight"], teacher=teacher)
    floats = dict(rotate(teacher, rotation, small.plan.seed).linears())
    for (name, linear), p in zip(small.linears(), student.parameters, strict=True):
        tensor = linear.tensor
        scale = np.repeat(tensor.scale, 32, axis=1)
        offset = np.repeat(tensor.offset, 32, axis=1)
        expected = floats[name].weight
        if linear.adapter is not None:
            U, V = linear.adapter
            expected = expected - U @ floats[name].rotate_input(np.ascontiguousarray(V.T))
        nearest = np.clip(np.rint((expected - offset) / scale), 0, 7)
        same = nearest == tensor.codes
        same &= abs(expected - offset - nearest * scale) < 0.39 * scale
        assert same.mean() > 0.5
        assert np.allclose((p.value * scale)[same], expected[same], atol=1e-5)


@pytest.mark.parametrize(("name", "format"), [("lsq", "int3g32sym"), ("lsq_plus", "int2g32")])
def test_a_step_of_straight_through_rounding_is_that_of_torch(name, format):
    golden = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{name}/")}
    w, x, scale = (golden[key] for key in ("w", "x", "scale"))
    offset = golden["offset"] if "doffset" in golden else None
    tensor = QuantizedTensor.pack(format, np.zeros(w.shape, np.uint8), scale, offset)
    code = code_of(tensor.format, None, tensor.unit, tensor.zero)
    latents = Latents(name, tensor, code, LearnedRounding(lsq=True))
    unit = np.repeat(scale, 32, axis=1)
    latents.value[:] = w / unit
    rounded, gradient = np.empty_like(w), np.zeros_like(w)
    latents.compose(scale, offset, rounded, None)
    y = x @ rounded.T
    dweight = 2 / y.size * (y - golden["target"]).T @ x
    dscale, doffset = np.empty_like(scale), None if offset is None else np.empty_like(scale)
    latents.pull(scale, offset, dweight, gradient, dscale, doffset, None)
    found = {"rounded": rounded, "dw": gradient / unit, "dscale": dscale, "doffset": doffset}
    for key, array in found.items():
        if array is not None:
            assert abs(array - golden[key]).max() <= 1e-5 * abs(golden[key]).max(), key


def test_soft_students_begin_as_the_float_model():
    small, teacher, student = student_of("int4g32", "soft", layers=1, method="rtn")
    student.compose(at=Progress(1, 10))
    started, quantized = (divergence(m, teacher, WINDOWS[0]) for m in (student.model, small))
    assert started < quantized / 2


@pytest.mark.parametrize("rounding", METHODS)
def test_blocks_come_nearer_than_by_scales_alone(rounding):
    small, teacher = pair("int2g32 a32")
    ends = []
    for learn in (("scale",), ("weight", "scale")):
        found = []
        options = {"learn": learn, "rounding": rounding, "progress": found.append}
        options |= LONGER if rounding in ("soft", "gumbel") else BLOCKS
        better = reconstruct(small, teacher, TEXT, **options)
        ends.append(found[-1].after)
    assert ends[1] < ends[0]
    assert content(better)["codes"] != content(small)["codes"]
    assert better.bits_per_weight == small.bits_per_weight
    before, after = (kl_divergence(m, teacher, HELD_BACK, window=64) for m in (small, better))
    assert after < before


def test_what_does_not_learn_keeps_its_hash():
    small, teacher = pair("int2g32 a32 + rank2")
    before = {kind: hashlib.sha256(parts).digest() for kind, parts in content(small).items()}
    better = reconstruct(small, teacher, TEXT, learn=["weight"], **BLOCKS)
    after = {kind: hashlib.sha256(parts).digest() for kind, parts in content(better).items()}
    assert {kind for kind in after if after[kind] != before[kind]} == {"codes"}


@pytest.mark.parametrize("format", SCALAR)
def test_every_code_of_levels_learns_and_is_stored(format, tmp_path):
    small, teacher = pair(f"{format} a32")
    found = []
    options = BLOCKS | {"learn": ("weight", "scale", "offset", "level"), "progress": found.append}
    learned = reconstruct(small, teacher, TEXT, **options)
    assert found[0].after < found[0].before
    assert content(learned)["codes"] != content(small)["codes"]
    learned.save(tmp_path / "model")
    assert content(load(tmp_path / "model")) == content(learned)


@pytest.mark.parametrize("rounding", METHODS)
def test_a_finished_student_is_what_was_trained(rounding):
    small, _, student = student_of("int2g32", rounding, ("weight", "scale", "offset"))
    rng = np.random.default_rng(0)
    for p in student.parameters:
        p.value += np.float32(p.pace) * rng.uniform(-0.2, 0.2, p.value.shape).astype(np.float32)
    student.compose()
    finished = student.finish()
    assert content(finished)["codes"] != content(small)["codes"]
    for (_, layer), (_, linear) in zip(student.model.linears(), finished.linears(), strict=True):
        error = np.linalg.norm(linear.tensor.dequantize() - layer.tensors[0].weight)
        assert error < 2.0**-9 * np.linalg.norm(layer.tensors[0].weight)


@pytest.mark.parametrize("rounding", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_model(rounding, tmp_path):
    small, teacher = pair("int2g32 a32")
    options = {"learn": ("weight", "scale"), "rounding": rounding, "steps": 12, "batch": 4}
    options |= {"validation": 4, "every": 4, "warmup": 2}
    whole = distill(small, teacher, WINDOWS, **options)

    class StopError(Exception):
        pass

    def stop(found):
        if found.step == 6:
            raise StopError

    with pytest.raises(StopError):
        distill(small, teacher, WINDOWS, work_dir=tmp_path, progress=stop, **options)
    resumed = distill(small, teacher, WINDOWS, work_dir=tmp_path, **options)
    assert content(resumed) == content(whole)
    known = [m.provenance["distillation"] for m in (resumed, whole)]
    assert known[0]["steps"] == known[1]["steps"]
    assert known[0]["validation"] == known[1]["validation"]
    with pytest.raises(ValueError, match=r"options \(rounding\)"):
        distill(small, teacher, WINDOWS, work_dir=tmp_path, **options | {"rounding": "nearest lsq"})


def test_gradients_of_soft_weights_are_those_of_central_differences():
    """Soft rounding is smooth, so a model's loss falls along its gradient as it should."""
    _, teacher, student = student_of("int2g32", "soft", ("weight", "scale"))
    at, tokens = Progress(1, 10), WINDOWS[0]
    for p in student.parameters:  # away from the ends of the sigmoid
        p.value[:] = np.clip(p.value, -2, 2)
    student.compose(at=at)
    run = Pass(student.model, tokens)
    weights = np.full(len(tokens), 1 / len(tokens), np.float32)
    hidden = teacher.hidden(tokens)
    run.loss(Loss.parse("kl"), teacher=teacher, teacher_hidden=hidden, weights=weights)
    student.backward([run])
    for p in student.parameters[:6]:
        size, start = np.linalg.norm(p.gradient), p.value.copy()
        step = 0.02 * np.linalg.norm(start)
        losses = []
        for sign in (1, -1):
            p.value[:] = start + np.float32(sign * step / size) * p.gradient
            student.compose(at=at)
            losses.append(divergence(student.model, teacher, tokens))
        p.value[:] = start
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(size, rel=0.1), p.name


def test_lsq_scales_the_gradient_of_scales():
    found = []
    for rounding in ("nearest", "nearest lsq"):
        _, teacher, student = student_of("int2g32", rounding, ("weight", "scale"), layers=1)
        student.compose(at=Progress(1, 10))
        run = Pass(student.model, WINDOWS[0])
        run.loss(Loss.parse("kl"), teacher=teacher, teacher_hidden=teacher.hidden(WINDOWS[0]))
        student.backward([run])
        found.append({p.kind: p.gradient for p in student.parameters})
    assert np.allclose(found[1]["scale"] * np.sqrt(32 * 1.5), found[0]["scale"], rtol=1e-5)
    assert (found[1]["weight"] == found[0]["weight"]).all()


def test_the_phases_of_gradual_rounding():
    gradual = LearnedRounding("gradual")
    steps = [Progress(step, 101) for step in range(1, 102)]
    shares = [gradual.share(at) for at in steps]
    assert shares[:11] == [0] * 11
    assert shares[30] == pytest.approx(0.5)
    assert shares[50:] == [1] * 51
    assert (np.diff(shares[10:51]) > 0).all()
    frozen = [gradual.frozen(at) for at in steps]
    assert frozen[:90] == [frozenset()] * 90
    assert frozen[90:] == [{"scale", "offset", "level"}] * 11
    assert gradual.share(None) == 1


def test_what_is_frozen_does_not_move():
    parameters = [Parameter(kind, kind, np.ones(3, np.float32)) for kind in ("scale", "norm")]
    optimizer = AdamW(parameters, {"scale": 0.1, "norm": 0.1})
    for _ in range(2):
        for p in parameters:
            p.gradient[:] = 1
        optimizer.step(1.0)
    before = [p.value.copy() for p in parameters]
    parameters[0].gradient[:] = 7
    optimizer.step(1.0, frozenset(["scale"]))
    assert (parameters[0].value == before[0]).all()
    assert not parameters[0].gradient.any()
    assert (parameters[1].value != before[1]).any()


def test_the_exponent_of_the_penalty_falls():
    soft = LearnedRounding("soft")
    found = [soft.beta(Progress(step, 1001)) for step in range(1, 1002)]
    assert found[:200] == [None] * 200
    assert found[200] == 20
    assert found[480] == pytest.approx(11)
    assert found[760:] == [pytest.approx(2)] * 241
    assert LearnedRounding("gumbel").beta(Progress(900, 1000)) is None


def test_the_temperature_falls():
    gumbel = LearnedRounding("gumbel", temperature=0.01)
    ways = [gumbel.softness(Progress(step, 3, seed=4), 5) for step in (1, 2, 3)]
    assert [how["temperature"] for how in ways] == pytest.approx([1, 0.1, 0.01])
    assert len({how["stream"] for how in ways}) == 3
    assert {how["seed"] for how in ways} == {4}
    assert gumbel.softness(None, 5)["temperature"] == 0


@pytest.mark.parametrize("format", ["ternaryg32", "ternary", "ternarytensor"])
def test_two_sided_ternary_weights_learn_two_levels(format):
    weight = np.random.default_rng(0).standard_normal((48, 64), dtype=np.float32)
    ternary = quantize(weight, format)
    both = two_sided(ternary)
    assert isinstance(both, QuantizedTensor)
    assert np.array_equal(both.dequantize(), ternary.dequantize())
    assert both.nbytes == ternary.nbytes + 16
    small, teacher = pair(f"{format} a32")
    for name, linear in list(small.linears()):
        [copy] = linear.copies
        small.replace_linear(
            name, linear.replace(copies=(type(copy)(two_sided(copy.tensor), copy.rotation),))
        )
    better = reconstruct(small, teacher, TEXT, learn=("weight", "level"), **BLOCKS)
    levels = np.array([linear.tensor.levels for _, linear in better.linears()])
    assert not levels[:, 1:3].any()
    assert (levels[:, 0] != -levels[:, 3]).all()
    before, after = (kl_divergence(m, teacher, HELD_BACK, window=64) for m in (small, better))
    assert after < before
    with pytest.raises(ValueError, match=r"tensor has format kmeans2.*, expected a ternary one"):
        two_sided(both)


@pytest.mark.parametrize("format", ["trellis2g32", "lattice2g32"])
def test_words_that_are_chosen_together_are_refused(format):
    small, teacher = pair(format)
    with pytest.raises(ValueError, match=f"q_proj has format {format}, whose words are chosen"):
        Student(small, ["weight"], teacher=teacher)
    Student(small, ["scale"], teacher=teacher)


@pytest.mark.parametrize(
    "text", ["nearest", "nearest unclipped lsq", "soft strength 2.5", "gumbel temperature 0.5"]
)
def test_roundings_have_a_text(text):
    rounding = LearnedRounding.parse(text)
    assert str(rounding) == text
    assert LearnedRounding.parse(rounding) is rounding


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hard", "rounding is 'hard', expected one of nearest, gradual, soft, gumbel"),
        ("", "rounding is '', expected one of"),
        ("soft strength", "rounding is 'soft strength', expected one of .* and a number"),
        ("soft loud", "rounding is 'soft loud', expected one of"),
        ("soft strength -1", "strength is -1.0, expected 0 to 1e6"),
        ("gumbel temperature 0", "temperature is 0.0, expected above 0, at most 1.0"),
    ],
)
def test_bad_roundings_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        LearnedRounding.parse(text)
