"""search(): every sampler and storage, resumed and shared; the grid of the chapter."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import optuna
import pytest
from searched_models import TOKENS, search_in, two_copies

import lowbitq as lq
from lowbitq.calibration import calibrate
from lowbitq.search import GRID, Objective, Seen, Space, search, symmetric

RANGES = {"*": {"clip1": (0.3, 1.0), "clip2": (0.3, 1.0), "weight1": (0.8, 1.2)}}
LISTS = {"*": {"clip1": [0.5, 0.7, 1.0], "clip2": [0.5, 1.0]}}
small_search = partial(search, window=64)


@pytest.fixture(scope="module")
def models():
    return two_copies()


@pytest.fixture(scope="module")
def grid(models):
    """The chapter's grid, all of it."""
    return small_search(*models, TOKENS, GRID, sampler="grid", trials=1000)


def test_the_grid_has_each_point_once(models, grid):
    assert len(grid.study.trials) == 225
    points = {tuple(sorted(trial.params.items())) for trial in grid.study.trials}
    assert len(points) == 225
    assert tuple(sorted((f"* {k}", v) for k, v in symmetric().items())) in points
    values = [trial.value for trial in grid.study.trials]
    assert grid.value == min(values) == grid.history[-1]
    model, small = models
    space = Space(small, GRID)
    objective = Objective("kl", Seen(model, TOKENS, space.layers))
    assert objective(grid.model) == grid.value  # the winner can be made again
    assert objective(space.apply(grid.parameters)) == grid.value
    assert objective(small) == grid.before


@pytest.mark.parametrize("seed", range(2))
def test_bayesian_search_finds_the_best_of_the_grid(models, grid, seed):
    """In 50 of its 225 evaluations."""
    found = small_search(*models, TOKENS, GRID, trials=50, seed=seed)
    assert len(found.study.trials) == 50
    assert found.value <= grid.value


@pytest.mark.parametrize("sampler", ["gaussian", "grid", "random", "tpe", "cmaes", "nsga2"])
def test_every_sampler(models, sampler):
    space = LISTS if sampler == "grid" else RANGES
    found = [
        small_search(*models, TOKENS, space, sampler=sampler, trials=6, seed=3) for _ in range(2)
    ]
    runs = [[trial.params for trial in one.study.trials] for one in found]
    assert len(runs[0]) == 6
    assert runs[0] == runs[1]
    assert found[0].value <= found[0].before
    assert found[0].history == sorted(found[0].history, reverse=True)


def test_a_sampler_of_optuna(models):
    sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=1)
    found = small_search(*models, TOKENS, RANGES, sampler=sampler, trials=3)
    assert found.study.sampler is sampler


@pytest.mark.parametrize(
    ("ending", "sampler"),
    [("log", "gaussian"), ("db", "random"), ("url", "grid"), ("object", "gaussian")],
)
def test_a_study_goes_on_where_it_ended(models, tmp_path, ending, sampler):
    storage = {
        "log": tmp_path / "study.log",
        "db": str(tmp_path / "study.db"),
        "url": f"sqlite:///{tmp_path / 'study.db'}",
        "object": optuna.storages.InMemoryStorage(),
    }[ending]
    one = partial(small_search, *models, TOKENS, LISTS, sampler=sampler, storage=storage, seed=2)
    assert len(one(trials=3).study.trials) == 3
    found = one(trials=6)
    assert len(found.study.trials) == 6
    again = one(trials=6)
    assert len(again.study.trials) == 6
    assert (again.value, again.parameters) == (found.value, found.parameters)
    if sampler == "grid":
        points = {tuple(sorted(trial.params.items())) for trial in found.study.trials}
        assert len(points) == 6
    if sampler == "gaussian":
        whole = small_search(*models, TOKENS, LISTS, trials=6, seed=2)
        assert [t.params for t in whole.study.trials] == [t.params for t in found.study.trials]


def test_two_workers_share_a_study(models, tmp_path):
    path = str(tmp_path / "study.db")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        values = list(workers.map(search_in, [path] * 2, [0, 0], [12, 12]))
    found = small_search(*models, TOKENS, GRID, storage=path, trials=12)
    trials = found.study.trials
    assert 12 <= len(trials) <= 13
    assert [trial.number for trial in trials] == list(range(len(trials)))
    points = {tuple(sorted(trial.params.items())) for trial in trials}
    assert len(points) > 9
    assert found.value == min(trial.value for trial in trials)
    assert found.value <= min(values)


def test_another_search_is_refused_the_study(models, tmp_path):
    model, small = models
    one = partial(small_search, storage=tmp_path / "study.log", trials=1)
    one(model, small, TOKENS, LISTS)
    others = [
        ("space", lambda: one(model, small, TOKENS, RANGES)),
        ("objective", lambda: one(model, small, TOKENS, LISTS, objective="block")),
        ("text", lambda: one(model, small, TOKENS[::-1].copy(), LISTS)),
        ("model", lambda: one(*two_copies(bits=8), TOKENS, LISTS)),
    ]
    for name, run in others:
        with pytest.raises(ValueError, match=f"is of another search, with different {name}"):
            run()
    assert len(one(model, small, TOKENS, RANGES, study="another").study.trials) == 1


def test_points_to_start_with_are_tried_first(models):
    start = [{"*": symmetric()}, {"*": {"scale1": 1.0}}]
    found = small_search(*models, TOKENS, GRID, start=start, trials=3)
    first, second, _ = found.study.trials
    assert first.params == {f"* {name}": value for name, value in symmetric().items()}
    assert second.params["* scale1"] == 1.0


def test_a_plan_is_compressed_and_clips_are_searched(models):
    model, _ = models
    stats = calibrate(model, TOKENS, hessians=True)
    found = lq.search(model, "int2g32 a4", stats, trials=4, measure=1)
    assert found.value <= found.before
    assert str(found.model.plan.layers["model.layers.0.mlp.up_proj"]) == "int2g32 a4"
    plain = lq.compress(model, "int2g32 a4", stats)
    for (_, one), (_, other) in zip(found.model.linears(), plain.linears(), strict=True):
        assert np.array_equal(one.tensor.codes, other.tensor.codes)
    if found.parameters:
        clips = {name: layer.copies[0].activation.clip for name, layer in found.model.linears()}
        assert clips["model.layers.1.mlp.up_proj"] == found.parameters["*.up_proj clip"]


def test_what_is_worse_is_not_taken(models):
    model, small = models
    found = small_search(model, small, TOKENS, {"*": {"weight": [0.1, 0.2]}}, trials=2)
    assert found.model is small
    assert (found.value, found.parameters) == (found.before, {})
    assert "2 trials" in str(found)


def test_several_objectives(models):
    found = small_search(
        *models, TOKENS, GRID, objective=["kl", {"diversity": 0.1}], sampler="nsga2", trials=6
    )
    assert all(len(trial.values) == 2 for trial in found.study.trials)
    assert found.objective == "kl and 0.1 diversity"
    assert found.value <= found.before
    assert 1 <= len(found.study.best_trials) <= 6


def test_trials_can_be_pruned(models):
    pruner = optuna.pruners.ThresholdPruner(upper=1e-9)
    found = small_search(*models, TOKENS, LISTS, pruner=pruner, trials=3, sampler="random")
    assert [trial.state.name for trial in found.study.trials] == ["PRUNED"] * 3
    assert found.parameters == {}


def test_progress_and_result(models, capsys):
    done = []
    found = small_search(
        *models, TOKENS, LISTS, sampler="grid", progress=lambda *c: done.append(c), trials=6
    )
    assert done == [(n + 1, 6) for n in range(6)]
    assert capsys.readouterr() == ("", "")
    result = json.loads(json.dumps(found.to_dict()))
    assert result["trials"] == 6
    assert result["parameters"] == found.parameters
    assert str(found).startswith(f"kl {found.before:.6g} -> {found.value:.6g} in 6 trials")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "bayes"}, "sampler is 'bayes', expected 'gaussian', 'grid'"),
        ({"sampler": "grid"}, r"'\* clip1' is a range, but a grid needs lists"),
        ({"sampler": "cmaes", "space": LISTS}, r"'\* clip1' is a list, but cmaes needs ranges"),
        ({"storage": "study.sql"}, r"storage is 'study.sql', expected a path ending in .log or"),
        ({"trials": 0}, "trials is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"measure": 0}, "measure is 0, expected at least 1"),
        ({"objective": []}, "objective is empty"),
        ({"objective": ["kl", "block"]}, "sampler is 'gaussian', which has one objective, found 2"),
        ({"objective": "loss"}, "objective has 'loss'"),
    ],
)
def test_what_does_not_fit_is_refused(models, options, said):
    options = {"space": RANGES, "data": TOKENS, **options}
    with pytest.raises(ValueError, match=said):
        small_search(*models, **options)


@pytest.mark.parametrize(
    ("module", "said"), [("optuna", "search needs optuna"), ("sklearn", "needs scikit-learn")]
)
def test_a_missing_package_names_the_extra(models, monkeypatch, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "sklearn":
        monkeypatch.setitem(sys.modules, "lowbitq.search.gaussian", None)
    with pytest.raises(ImportError, match=said) as found:
        small_search(*models, TOKENS, LISTS, trials=1)
    assert 'pip install "lowbitq[search]"' in str(found.value)


def test_nothing_is_imported_before_a_search():
    code = "import sys, lowbitq; print({'optuna', 'sklearn', 'scipy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
