"""Teachers: the same loss from disk as from the model, and nothing of another teacher or text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_model import random_model, random_tokens
from student_models import content, pair

import lowbitq as lq
from lowbitq.distillation import distill
from lowbitq.hints import Hints
from lowbitq.linears import Linear
from lowbitq.losses import Loss
from lowbitq.teachers import KeptTeacher, Teacher
from lowbitq.top_k import most_probable, top_k_backward

WINDOWS = random_tokens(20 * 48, seed=9).reshape(20, 48)
QUICK = {"steps": 6, "batch": 4, "validation": 4, "every": 3, "warmup": 2, "learn": ["norm"]}


@pytest.mark.parametrize(
    "hints",
    [
        None,
        Hints((0, -1), features=0.5, relations=0.1),
        Hints((0, -1), attention=0.5),
        Hints((1,), features=0.5, attention=0.5),
    ],
)
def test_kept_and_live_give_the_same_bits(tmp_path, hints):
    small, teacher = pair()
    live, first, again = [], [], []
    options = {"hints": hints, **QUICK}
    alive = distill(small, teacher, WINDOWS, progress=live.append, **options)
    for seen in (first, again):
        kept = distill(
            small, teacher, WINDOWS, teacher_dir=tmp_path / "t", progress=seen.append, **options
        )
        assert [one.terms for one in seen] == [one.terms for one in live]
        assert content(kept) == content(alive)
    files = {path.name for path in (tmp_path / "t").iterdir()}
    states = {f"block_{index:04}.npy" for index in hints.states(2)} if hints else set()
    assert files == {"teacher.json", "hidden.npy"} | states


def test_a_kept_teacher_is_not_run(tmp_path, monkeypatch):
    small, teacher = pair()
    options = {"teacher_dir": tmp_path / "t", **QUICK}
    distill(small, teacher, WINDOWS, **options)
    run = lq.Model.hidden

    def hidden(model, tokens):
        assert model is not teacher
        return run(model, tokens)

    monkeypatch.setattr(lq.Model, "hidden", hidden)
    distill(small, teacher, WINDOWS, **options)


def test_another_teacher_or_text_is_refused(tmp_path):
    _, teacher = pair()
    _, other = pair(biases=False)
    folder = tmp_path / "t"
    KeptTeacher(Teacher(teacher, WINDOWS), folder)
    for found, options, said in [
        (Teacher(other, WINDOWS), {}, "teacher"),
        (Teacher(teacher, WINDOWS[::-1].copy()), {}, "text"),
        (Teacher(teacher, WINDOWS, (1,)), {}, "blocks"),
        (Teacher(teacher, WINDOWS), {"top_k": 5}, "top_k"),
    ]:
        with pytest.raises(ValueError, match=f"keeps what another teacher said, .* {said};"):
            KeptTeacher(found, folder, **options)


def test_damaged_folders_are_named(tmp_path):
    _, teacher = pair()
    live, folder = Teacher(teacher, WINDOWS), tmp_path / "t"
    KeptTeacher(live, folder)
    whole = (folder / "hidden.npy").read_bytes()
    (folder / "hidden.npy").write_bytes(whole[:-4])
    with pytest.raises(lq.FormatError, match=r"hidden\.npy"):
        KeptTeacher(live, folder)
    np.save(folder / "hidden.npy", np.zeros(3))
    with pytest.raises(lq.FormatError, match=r"hidden\.npy has float64 of shape \(3,\), expected"):
        KeptTeacher(live, folder)
    (folder / "teacher.json").write_text("[1]")
    with pytest.raises(lq.FormatError, match=r"teacher\.json: expected a JSON object, found list"):
        KeptTeacher(live, folder)
    (folder / "teacher.json").unlink()
    with pytest.raises(ValueError, match="has other files, expected a kept teacher"):
        KeptTeacher(live, folder)


def test_nothing_is_left_of_an_interrupted_run(tmp_path):
    _, teacher = pair()

    def stop(done, total):
        assert total == 20
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KeptTeacher(Teacher(teacher, WINDOWS), tmp_path / "t", progress=stop)
    assert list(tmp_path.iterdir()) == []


# --- the most probable tokens


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def flat(seed):
    """A random model whose predictions are not all sure."""
    model = random_model(seed, layers=2)
    model.embedding = Linear(model.embedding.weight / 5)
    return model


def parts_of(top, log_p, k):
    """p' as an array (t, vocab), from the top's own log-probabilities and counts of its draws."""
    spread = np.zeros_like(log_p)
    first = np.sort(np.argsort(log_p, axis=1)[:, -k:])
    for t, tokens in enumerate(top.tokens):
        assert np.array_equal(np.sort(tokens[:k]), first[t])
        rest = 1 - np.exp(log_p[t, first[t]]).sum()
        for token in tokens[k:]:
            spread[t, token] += rest / k
        spread[t, first[t]] = np.exp(log_p[t, first[t]])
    return spread


@pytest.mark.parametrize("k", [1, 7, 49])
def test_top_k_loss_is_that_of_the_formula(k):
    student, teacher, tokens = flat(0), flat(1), WINDOWS[2]
    log_p, log_q = (log_softmax(model.logits(tokens)) for model in (teacher, student))
    top = most_probable(teacher, teacher.hidden(tokens), k, seed=3)
    spread = parts_of(top, log_p, k)
    assert np.allclose(np.exp(top.logs), np.take_along_axis(spread, top.tokens, 1), atol=1e-6)
    losses, _ = top_k_backward(student, student.hidden(tokens), Loss.parse("kl"), top)
    expected = (np.exp(log_p) * log_p - spread * log_q).sum(1)
    assert np.allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_top_k_is_right_on_average():
    student, teacher, tokens = flat(0), flat(1), WINDOWS[2][:12]
    log_p, log_q = (log_softmax(model.logits(tokens)) for model in (teacher, student))
    table, hidden = student.embedding.weight.astype(float), student.hidden(tokens)
    whole = (np.exp(log_p) * (log_p - log_q)).sum(1), (np.exp(log_q) - np.exp(log_p)) @ table
    runs = [
        top_k_backward(
            student,
            hidden,
            Loss.parse("kl"),
            most_probable(teacher, teacher.hidden(tokens), 3, seed=seed),
        )
        for seed in range(600)
    ]
    for expected, found in zip(whole, zip(*runs, strict=True), strict=True):
        found = np.stack(found)
        error = found.std(0) / np.sqrt(len(found))
        assert (abs(found.mean(0) - expected) < 5 * error + 1e-5).all()


@pytest.mark.parametrize("loss", ["kl", "2 kl + 0.3 ce"])
def test_top_k_gradient_is_that_of_differences(loss):
    student, teacher, tokens = flat(0), flat(1), WINDOWS[2]
    top = most_probable(teacher, teacher.hidden(tokens), 9)
    log_p, hidden = log_softmax(teacher.logits(tokens)), student.hidden(tokens)
    spread, weights = parts_of(top, log_p, 9), np.linspace(0.1, 1, len(tokens), dtype=np.float32)
    loss = Loss.parse(loss)
    targets = np.append(tokens[1:], np.int32(-1)) if loss.needs_targets else None
    losses, gradient = top_k_backward(student, hidden, loss, top, targets=targets, weights=weights)
    table = student.embedding.weight.astype(float)

    def values(x):
        log_q = log_softmax(x @ table.T)
        found = loss.forward * (np.exp(log_p) * log_p - spread * log_q).sum(1)
        if targets is not None:
            found[:-1] -= 0.3 * np.take_along_axis(log_q[:-1], targets[:-1, None], 1)[:, 0]
        return found

    assert np.allclose(losses, values(hidden.astype(float)), rtol=1e-5, atol=1e-5)
    step = np.random.default_rng(0).standard_normal(hidden.shape)
    sides = [(weights * values(hidden + h * step)).sum() for h in (1e-4, -1e-4)]
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx((gradient * step).sum(), rel=1e-4)


def test_top_k_comes_near_the_whole_loss(tmp_path):
    small, teacher = pair()
    live, kept = [], []
    distill(small, teacher, WINDOWS, progress=live.append, **QUICK)
    distill(
        small,
        teacher,
        WINDOWS,
        progress=kept.append,
        teacher_dir=tmp_path / "t",
        top_k=30,
        **QUICK,
    )
    for one, other in zip(live, kept, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-3)
        assert other.norm == pytest.approx(one.norm, rel=0.01)
    assert {p.name for p in (tmp_path / "t").iterdir()} == {
        "teacher.json",
        "top_tokens.npy",
        "top_logs.npy",
        "top_excess.npy",
    }
    assert json.loads((tmp_path / "t" / "teacher.json").read_bytes())["top_k"] == 30


def test_top_k_needs_what_it_needs(tmp_path):
    small, teacher = pair()
    with pytest.raises(ValueError, match="top_k is 5, but there is no teacher_dir"):
        distill(small, teacher, WINDOWS, top_k=5, **QUICK)
    with pytest.raises(ValueError, match="loss is 'kl, temperature 2', expected kl and ce"):
        distill(
            small,
            teacher,
            WINDOWS,
            loss="kl, temperature 2",
            top_k=5,
            teacher_dir=tmp_path / "t",
            **QUICK,
        )
    with pytest.raises(ValueError, match="top_k is 100, expected 1 to 99"):
        most_probable(teacher, teacher.hidden(WINDOWS[0]), 100)
