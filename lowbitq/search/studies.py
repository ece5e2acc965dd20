"""search(): the parameters of a quantized model's copies, found by Optuna."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.calibration import Progress, Statistics, reporter
from lowbitq.checkpoints.archives import digest
from lowbitq.compression import compress
from lowbitq.encoding import layer_digest
from lowbitq.formats import Format
from lowbitq.linears import QuantizedLinear
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.tokens import check_count, token_array
from lowbitq.plans import Plan
from lowbitq.search.objectives import Objective, Seen, Spec
from lowbitq.search.spaces import CLIPS, Point, Space, Values
from lowbitq.texts import Text, windows

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("gaussian", "grid", "random", "tpe", "cmaes", "nsga2")


@dataclass(frozen=True, eq=False)
class Found:
    """What `search` found. Its str is a short table.

    Attributes
    ----------
    model : QuantizedModel
        With the best parameters; the model that was searched if none are better. With several
        objectives, the best by the first one.
    value : float
        Its objective.
    before : float
        The objective of the model that was searched.
    parameters : dict of str to float
        The best ones, ``"PATTERN NAME"``; empty if none are better.
    study : optuna.Study
        All trials, for Optuna's plots and frames.
    objective : str
    """

    model: QuantizedModel
    value: float
    before: float
    parameters: dict[str, float]
    study: optuna.Study
    objective: str

    @property
    def history(self) -> list[float]:
        """The best value after each finished trial, in the order of their numbers."""
        values = [one.values[0] for one in self.study.trials if one.values is not None]
        best: list[float] = np.minimum.accumulate(values).tolist() if values else []
        return best

    def to_dict(self) -> dict[str, Any]:
        """Return values, parameters and the course of the search as plain numbers, for JSON."""
        return {
            "objective": self.objective,
            "before": self.before,
            "value": self.value,
            "parameters": self.parameters,
            "trials": len(self.history),
            "history": self.history,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count = len(self.history)
        yield f"{self.objective} {self.before:.6g} -> {self.value:.6g} in {count} trials"
        width = max(map(len, self.parameters), default=0)
        for name, value in self.parameters.items():
            yield f"  {name:{width}} {value:.6g}"


def search(
    model: Model,
    plan: QuantizedModel | Plan | Format | str,
    data: Statistics | Text,
    space: Mapping[str, Mapping[str, Values]] = CLIPS,
    *,
    objective: Spec | Sequence[Spec] = "kl",
    trials: int = 50,
    sampler: str | optuna.samplers.BaseSampler = "gaussian",
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    study: str = "lowbitq",
    pruner: optuna.pruners.BasePruner | None = None,
    start: Sequence[Point] = (),
    measure: int = 4,
    window: int = 512,
    seed: int = 0,
    progress: bool | Progress = False,
) -> Found:
    """Search for the best parameters of the copies of a quantized model; its codes stay.

    Parameters
    ----------
    model : Model
        In float32, not rotated: what the quantized model should do.
    plan : QuantizedModel, or Plan, Format or str
        The model whose parameters are searched, or how to make it: ``compress(model, plan, data)``.
    data : Statistics, or text as for `calibrate`
        Its first windows are run in every trial.
    space : mapping of str to mapping of str to tuple or list
        Parameters by patterns of layer names; see `lowbitq.search.Space`. The default is one clip
        for each kind of layer. `lowbitq.search.GRID` has the 225 points of two copies.
    objective : str, mapping of str to float, callable, or a sequence of them
        What to make small: ``"kl"``, ``"perplexity"``, ``"block"``, ``"diversity"``,
        ``"orthogonality"``, a weighted sum such as ``{"kl": 1, "diversity": 0.01}``, or a function
        of the model; see `lowbitq.search.Objective`. A sequence gives a study of several
        objectives.
    trials : int, default=50
        Number of trials of the study; those that it has already count, and those of other workers.
        When workers share a study, each of the others may finish one more.
    sampler : str or optuna sampler, default="gaussian"
        ``"gaussian"``: a Gaussian process and expected improvement; ``"grid"``: all points of lists
        of values, each once; ``"random"``, ``"tpe"``, ``"cmaes"`` (ranges only) and ``"nsga2"``:
        Optuna's.
    storage : str, path or optuna storage, default=None
        Where the study is kept: a path that ends in ``.log`` (a journal) or ``.db`` (SQLite), a
        database URL, or any storage of Optuna. Several processes and machines may work on one
        study. A second call goes on with it. None: in memory.
    study : str, default="lowbitq"
        Its name in the storage.
    pruner : optuna pruner, default=None
        Stops a trial early, window by window. None: every trial runs to its end.
    start : sequence of mappings, default=()
        Points to try first, nested like the space: ``[{"*": symmetric()}]``.
    measure, window : int
        Number of windows to run, and tokens of each if `data` is a text.
    seed : int, default=0
        Workers of one study need different seeds, except for ``"gaussian"`` and ``"grid"``.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the numbers of finished
        trials and of all trials.

    Returns
    -------
    Found

    Raises
    ------
    ImportError
        If Optuna is not installed.
    ValueError
        If the space does not fit the model, an argument is out of range, or the storage has a study
        of this name of another model, space, objective or text.

    References
    ----------
    T. Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", 2019.

    Examples
    --------
    >>> found = search(model, "int4g64 a4", text, trials=30)  # doctest: +SKIP
    >>> found.model.save("searched")  # doctest: +SKIP
    """
    optuna = _optuna()
    check_count("trials", trials, 1)
    check_count("seed", seed, 0)
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        expected = f"{', '.join(map(repr, SAMPLERS))} or a sampler of Optuna"
        raise ValueError(f"sampler is {sampler!r}, expected {expected}")
    place = _storage(storage)
    tokens = _tokens(model, data, measure, window, seed)
    quantized = plan
    if not isinstance(quantized, QuantizedModel):
        given = {"stats": data} if isinstance(data, Statistics) else {"text": data}
        quantized = compress(model, quantized, **given)
    asked = Space(quantized, space)
    single = isinstance(objective, (str, Mapping)) or callable(objective)
    specs: Sequence[Any] = [objective] if single else list(objective)  # type: ignore[arg-type]
    seen = Seen(model, tokens, asked.layers)
    objectives = [Objective(spec, seen) for spec in specs]
    if not objectives:
        raise ValueError("objective is empty, expected at least one")
    if len(objectives) > 1 and sampler in ("gaussian", "cmaes"):
        raise ValueError(
            f"sampler is {sampler!r}, which has one objective, found {len(objectives)}"
        )
    with _quiet():
        made = optuna.create_study(
            storage=place,
            pruner=pruner or optuna.pruners.NopPruner(),
            study_name=study,
            load_if_exists=True,
            directions=["minimize"] * len(objectives),
        )
        _claim(made, quantized, asked, [one.text for one in objectives], tokens)
        made.sampler = _sampler(sampler, asked, seed, len(made.trials))
        for point in start:
            made.enqueue_trial(asked.key_values(point), skip_if_exists=True)
        before = objectives[0](quantized)
        _run(made, asked, objectives, trials, progress)
        return _found(made, asked, quantized, before, " and ".join(one.text for one in objectives))


def _run(
    study: Any,
    space: Space,
    objectives: list[Objective],
    trials: int,
    progress: bool | Progress,
) -> None:
    """Add trials until the study has as many as asked for."""
    optuna = _optuna()
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    report = reporter(progress, trials, title="search", unit="trial")
    may_prune = len(objectives) == 1 and not isinstance(study.pruner, optuna.pruners.NopPruner)

    def finished() -> int:
        return len(study.get_trials(deepcopy=False, states=done))

    def run(trial: Any) -> Any:
        values = {one.key: _suggest(trial, one.key, one.values) for one in space.parameters}
        student = space.apply(values)
        if len(objectives) > 1:
            return [one(student) for one in objectives]
        return objectives[0](student, _pruning(trial) if may_prune else None)

    def tell(*_: Any) -> None:
        report(min(finished(), trials), trials)

    enough = optuna.study.MaxTrialsCallback(trials, states=done)
    if (left := trials - finished()) > 0:
        study.optimize(run, n_trials=left, callbacks=[enough, tell])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from printing a line for each trial."""
    optuna = _optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ImportError(
            'search needs optuna; get it with: pip install "lowbitq[search]"'
        ) from error
    return optuna


def _tokens(
    model: Model, data: Statistics | Text, measure: int, window: int, seed: int
) -> NDArray[np.int32]:
    check_count("measure", measure, 1)
    if not isinstance(data, Statistics):
        return windows(
            model.tokenizer, data, samples=measure, window=window, seed=seed, config=model.config
        )
    if measure > len(data.tokens):
        raise ValueError(f"measure is {measure}, but data has only {len(data.tokens)} windows")
    return token_array(data.tokens[:measure], model.config.vocab_size, axes=(2,))


def _storage(storage: Any) -> Any:
    optuna = _optuna()
    if storage is None or isinstance(storage, optuna.storages.BaseStorage):
        return storage
    text = os.fspath(storage)
    if text.endswith(".log") and "://" not in text:
        journal = optuna.storages.journal
        return journal.JournalStorage(journal.JournalFileBackend(text))
    if text.endswith(".db") and "://" not in text:
        text = f"sqlite:///{text}"
    if "://" not in text:
        raise ValueError(f"storage is {text!r}, expected a path ending in .log or .db, or a URL")
    return _database(text)


def _database(url: str) -> Any:
    """Open a database; the second of two processes that create its tables at once tries again."""
    from sqlalchemy.exc import SQLAlchemyError  # a dependency of Optuna

    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {}
    for pause in (0.1, 0.3, 1.0):
        with suppress(SQLAlchemyError):
            return _optuna().storages.RDBStorage(url, engine_kwargs=waiting)
        time.sleep(pause)
    return _optuna().storages.RDBStorage(url, engine_kwargs=waiting)


def _sampler(sampler: Any, space: Space, seed: int, trials: int) -> Any:
    """Return the sampler for a study that has some trials already."""
    optuna = _optuna()
    lists = {one.key: one.values for one in space.parameters if isinstance(one.values, list)}
    if not isinstance(sampler, str):
        return sampler
    if sampler == "grid":
        if len(lists) < len(space.parameters):
            ranges = [one.key for one in space.parameters if one.key not in lists]
            raise ValueError(f"{ranges[0]!r} is a range, but a grid needs lists of values")
        return optuna.samplers.GridSampler(lists, seed=seed)
    if sampler == "gaussian":
        try:
            from lowbitq.search.gaussian import GaussianSampler
        except ModuleNotFoundError as error:
            raise ImportError(
                'sampler "gaussian" needs scikit-learn; get it with: pip install "lowbitq[search]"'
            ) from error
        return GaussianSampler(seed)
    # With the same seed, a study that goes on would draw the same points again.
    seed = (seed + 1000003 * trials) % (1 << 32)
    if sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    if sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if sampler == "cmaes":
        if lists:
            raise ValueError(f"{next(iter(lists))!r} is a list, but cmaes needs ranges")
        return optuna.samplers.CmaEsSampler(seed=seed)
    return optuna.samplers.NSGAIISampler(seed=seed)


def _suggest(trial: Any, key: str, values: Values) -> float:
    if isinstance(values, list):
        return float(trial.suggest_categorical(key, values))
    return float(trial.suggest_float(key, *values))


def _pruning(trial: Any) -> Callable[[int, float], None]:
    optuna = _optuna()

    def report(step: int, value: float) -> None:
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    return report


def _claim(
    study: Any,
    model: QuantizedModel,
    space: Space,
    objectives: list[str],
    tokens: NDArray[np.int32],
) -> None:
    """Refuse a study of something else."""
    total = sha256()
    for name, linear in model.linears():
        if isinstance(linear, QuantizedLinear):
            about = [(copy.activation, copy.rotation) for copy in linear.copies]
            factors = [b"" if c.weight is None else c.weight.tobytes() for c in linear.copies]
            total.update(f"{name} {about} {layer_digest(linear)}".encode() + b"".join(factors))
    mine = {
        "model": total.hexdigest(),
        "space": space.describe(),
        "objective": objectives,
        "text": digest({"tokens": tokens}),
    }
    known = study.user_attrs.get("lowbitq")
    if known is None:
        study.set_user_attr("lowbitq", mine)
        return
    if different := [name for name, value in mine.items() if known.get(name) != value]:
        raise ValueError(
            f"study {study.study_name!r} is of another search, with different "
            f"{' and '.join(different)}; choose another name or storage"
        )


def _found(study: Any, space: Space, model: QuantizedModel, before: float, objective: str) -> Found:
    complete = [one for one in study.trials if one.state.name == "COMPLETE"]
    best = min(complete, key=lambda one: one.values[0], default=None)
    if best is None or not best.values[0] < before:
        return Found(model, before, before, {}, study, objective)
    values = {name: float(value) for name, value in best.params.items()}
    return Found(space.apply(values), best.values[0], before, values, study, objective)
