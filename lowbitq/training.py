"""A run of training on a teacher's predictions: its options, and its state between two steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.checkpoints.archives import digest, load_arrays, save_arrays
from lowbitq.checkpoints.blocks import differences
from lowbitq.encoding import trained_records
from lowbitq.gradients import Pass, linear_sink
from lowbitq.hints import Hints
from lowbitq.losses import Loss, l2_to_start
from lowbitq.memory import peak_of
from lowbitq.models.quantized import QuantizedModel
from lowbitq.optimizers import AdamW, cosine
from lowbitq.roundings import Progress
from lowbitq.student_diversity import Diversity
from lowbitq.students import Student
from lowbitq.teachers import KeptTeacher, Seen, Teacher, arrays_of
from lowbitq.top_k import top_k_backward
from lowbitq.version import __version__

Array = NDArray[np.float32]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Round:
    """What is known after a step of training.

    Attributes
    ----------
    step, steps : int
        Steps done, and in all.
    loss : float
        The sum of `terms`, each with its weight.
    validation : float or None
        Divergence from the teacher on held-back windows, nats per token; None: not measured now.
    norm : float
        Of the gradient, before it was clipped.
    seconds : float
        Since the start.
    terms : dict of str to float
        Means over the step's windows: ``"predictions"``, nats per token, and what else has a
        weight: ``"features"``, ``"relations"``, ``"attention"``, ``"diversity"``,
        ``"regularization"``.
    """

    step: int
    steps: int
    loss: float
    validation: float | None
    norm: float
    seconds: float
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What a run can be resumed with; see `lowbitq.distillation.distill`."""

    learn: tuple[str, ...]
    rounding: str
    loss: str
    steps: int
    batch: int | str
    window: int
    validation: int
    rates: tuple[tuple[str, float], ...]
    paces: tuple[tuple[str, float], ...]
    hints: Hints
    temperatures: tuple[float, ...]
    warmup: int
    clip: float
    decay: float
    diversity: float
    regularization: float
    seed: int
    every: int
    keep: int

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        others = {"diversity": self.diversity, "regularization": self.regularization}
        found = {name: w for name, w in (self.hints.weights | others).items() if w}
        return {"predictions": 1.0} | found

    def loss_at(self, step: int) -> Loss:
        """The loss of predictions at a step, with its temperature."""
        loss = Loss.parse(self.loss)
        if not self.temperatures:
            return loss
        ends = np.linspace(1, max(self.steps, 2), len(self.temperatures))
        return replace(loss, temperature=float(np.interp(step, ends, self.temperatures)))


@dataclass(frozen=True)
class Checkpoint:
    """Parameters that have been validated.

    Attributes
    ----------
    step : int
    validation : float
    values : list of ndarray, float32
        Of the student's parameters, in their order.
    """

    step: int
    validation: float
    values: list[Array]


class Training:
    """The state of a run between two steps.

    Parameters
    ----------
    model : QuantizedModel
    teacher : Teacher or KeptTeacher
        Of `rows`.
    options : Options
    rows : ndarray of shape (windows, window), int32
        The last ones are held back.

    Attributes
    ----------
    batch, at_once : int
        Windows per step, and how many of them are in memory at a time; see `fit`.
    history : list of dict
        Of each step: ``step``, ``loss``, ``norm``, and the terms if there are several.
    validations : list of (int, float)
        Steps and divergences.
    best : list of Checkpoint
        The best first, at most `options.keep`.
    """

    def __init__(
        self,
        model: QuantizedModel,
        teacher: Teacher | KeptTeacher,
        options: Options,
        rows: Tokens,
    ) -> None:
        self.options, self.teacher, self.rows = options, teacher, rows
        self.student = Student(
            model, options.learn, rounding=options.rounding, teacher=teacher.model
        )
        self.student.set_paces(dict(options.paces))
        self.optimizer = AdamW(
            self.student.parameters,
            dict(options.rates),
            decay=options.decay,
            pull=options.regularization,
            clip=options.clip,
        )
        self._diversity = None
        if options.diversity:
            self._diversity = Diversity(self.student, model, teacher.model, options.diversity)
        self.batch = self.at_once = options.batch if isinstance(options.batch, int) else 0
        self.history: list[dict[str, float]] = []
        self.validations: list[tuple[int, float]] = []
        self.best: list[Checkpoint] = []
        self._model = model
        self._trained = len(rows) - options.validation
        self._started, self._before = time.monotonic(), 0.0

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.optimizer.steps

    @property
    def seconds(self) -> float:
        """Time that it has taken, over all runs that were resumed."""
        return self._before + time.monotonic() - self._started

    def exhausted(self, patience: int | None, seconds: float | None) -> bool:
        """Whether time is up, or validation has long stopped improving."""
        if seconds is not None and self.seconds >= seconds:
            return True
        if patience is None or not self.validations:
            return False
        values = [value for _, value in self.validations]
        return len(values) - 1 - int(np.argmin(values)) >= patience

    def fit(self, memory: int) -> None:
        """Choose how many windows are in memory at once, and the batch if it is ``"auto"``.

        One window goes there and back; what the process held at most meanwhile, and what each
        further window adds, say how many fit.

        Raises
        ------
        ValueError
            If not even one does.
        """
        sizes: list[int] = []

        def one_window() -> None:
            self.student.compose()
            run, _ = self._pass(0, 1.0, self.options.loss_at(1))
            sizes.append(run.nbytes)
            self._back([run], 1.0)

        self.validate()  # so that its memory is held, too
        held = peak_of(one_window)
        for parameter in self.student.parameters:
            parameter.gradient[:] = 0
        if held > memory:
            raise ValueError(f"memory is {memory}, but one window takes {held} bytes in all")
        room = 1 + (memory - held) // sizes[0]
        if self.options.batch == "auto":
            self.batch = min(room, self._trained)
        self.at_once = min(room, self.batch)

    def step(self, factor: float | None = None) -> Round:
        """One step of AdamW; before the first one, validation of the start.

        Parameters
        ----------
        factor : float or None, default=None
            Of the learning rates; None: `cosine`.
        """
        if not self.validations:
            self.validate()
        options, step = self.options, self.done + 1
        at = Progress(step, options.steps, options.seed)
        terms = self._gradient(list(self._chosen(step)), options.loss_at(step), at)
        total = sum(weight * terms[name] for name, weight in options.weights.items())
        usual = cosine(step, options.steps, options.warmup)
        norm = self.optimizer.step(usual if factor is None else factor, self.student.frozen(at))
        validation = None
        if self.done % options.every == 0 or self.done == options.steps:
            validation = self.validate()
        several = terms if len(terms) > 1 else {}
        self.history.append({"step": step, "loss": total, "norm": norm, **several})
        return Round(step, options.steps, total, validation, norm, self.seconds, terms)

    def _gradient(
        self, windows: list[int], loss: Loss, at: Progress | None = None
    ) -> dict[str, float]:
        """Add the gradients of the mean loss over windows; return the mean of each term."""
        self.student.compose(at=at)
        share = 1 / len(windows)
        terms = dict.fromkeys(self.options.weights, 0.0)
        for start in range(0, len(windows), self.at_once):
            runs = []
            for window in windows[start : start + self.at_once]:
                run, found = self._pass(window, share, loss)
                runs.append(run)
                for name, value in found.items():
                    terms[name] += share * value
            terms |= {name: terms[name] + x for name, x in self._back(runs, share).items()}
        if self.options.regularization:  # its gradient is the optimizer's pull
            for p in self.student.parameters:
                terms["regularization"] += l2_to_start(p.value, p.start)[0]
        return terms

    def _back(self, runs: list[Pass], share: float) -> dict[str, float]:
        """Take windows back through the student; return the terms that are known only now."""
        if self._diversity is None:
            self.student.backward(runs)
            return {}
        pull = partial(self._diversity.pull, share=share)
        return {"diversity": share * self.student.backward(runs, pull)}

    def _pass(self, window: int, share: float, loss: Loss) -> tuple[Pass, dict[str, float]]:
        """Take a window through the student and compare it with the teacher."""
        tokens, hints = self.rows[window], self.options.hints
        run = Pass(self.student.model, tokens)
        seen = self.teacher.see(window) if loss.needs_teacher or hints else Seen(None)
        weights = np.full(len(tokens), share / len(tokens), np.float32)
        targets = np.append(tokens[1:], np.int32(-1)) if loss.needs_targets else None
        gains = self.student.final_norm_gradient
        if seen.top is None:
            known = loss.needs_teacher
            losses = run.loss(
                loss,
                targets=targets,
                teacher=self.teacher.model if known else None,
                teacher_hidden=seen.hidden if known else None,
                weights=weights,
                final_norm=gains,
            )
        else:
            losses, dy = top_k_backward(
                self.student.model, run.hidden, loss, seen.top, targets=targets, weights=weights
            )
            run.begin(dy, gains)
        found = {"predictions": float(losses.mean())}
        if hints:
            found |= hints.add(run, self.teacher.model, seen.states, share)
        return run, found

    def _chosen(self, step: int) -> Iterator[int]:
        """The windows of a step: all in random order, then all again in another."""
        for at in range((step - 1) * self.batch, step * self.batch):
            epoch, place = divmod(at, self._trained)
            order = np.random.default_rng([self.options.seed, epoch]).permutation(self._trained)
            yield int(order[place])

    def validate(self) -> float:
        """Divergence on the held-back windows; keeps the parameters if it is among the least."""
        self.student.compose()
        kl, model = Loss.parse("kl"), self.student.model
        total = 0.0
        for window in range(self._trained, len(self.rows)):
            seen, hidden = self.teacher.see(window), model.hidden(self.rows[window])
            if seen.top is None:
                losses = np.empty(len(hidden))
                nothing = [None, None, None, linear_sink(), losses, None]
                teacher = self.teacher.model.handle
                _core.head_backward(
                    model.handle, hidden, teacher, seen.hidden, *nothing, **vars(kl)
                )
            else:
                losses, _ = top_k_backward(model, hidden, kl, seen.top)
            total += float(losses.mean()) / self.options.validation
        self.validations.append((self.done, total))
        if len(self.best) < self.options.keep or total < self.best[-1].validation:
            values = [p.value.copy() for p in self.student.parameters]
            self.best.append(Checkpoint(self.done, total, values))
            self.best.sort(key=lambda found: (found.validation, found.step))
            del self.best[self.options.keep :]
        return total

    def finish(self) -> list[tuple[Checkpoint, QuantizedModel]]:
        """The quantized models of the best parameters, the present ones among them."""
        if not self.validations or self.validations[-1][0] < self.done:
            self.validate()
        known = {
            "options": asdict(self.options) | {"batch": self.batch},
            "steps": self.history,
            "validation": self.validations,
            "seconds": round(self.seconds, 1),
        }
        return [(found, self._finished(found, known)) for found in self.best]

    def _finished(self, found: Checkpoint, known: dict[str, Any]) -> QuantizedModel:
        for parameter, value in zip(self.student.parameters, found.values, strict=True):
            parameter.value[:] = value
        result = self.student.finish()
        return replace(
            result,
            records=trained_records(self._model, result),
            provenance=result.provenance | {"distillation": known | {"best": found.step}},
        )

    def save(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Write everything that `resume` needs, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        known = {
            "fingerprint": fingerprint,
            "steps": self.done,
            "batch": [self.batch, self.at_once],
            "history": self.history,
            "validations": self.validations,
            "best": [[found.step, found.validation] for found in self.best],
            "seconds": self.seconds,
        }
        arrays = {
            f"best/{k}/{i}": value
            for k, found in enumerate(self.best)
            for i, value in enumerate(found.values)
        }
        text = np.frombuffer(json.dumps(known).encode(), np.uint8)
        save_arrays(folder / "training.npz", {"known": text, **self.optimizer.state(), **arrays})

    def resume(self, folder: Path, fingerprint: dict[str, Any]) -> bool:
        """Continue from the state in a folder; False if there is none.

        Raises
        ------
        ValueError
            If it is of another run.
        FormatError
            If it is damaged.
        """
        path = folder / "training.npz"
        if not path.exists():
            return False
        arrays = load_arrays(path)
        known = json.loads(arrays["known"].tobytes())
        if different := differences(known["fingerprint"], fingerprint):
            raise ValueError(
                f"{path} is from another run, with different {' and '.join(different)}; "
                "remove it or choose another work_dir"
            )
        self.optimizer.restore(arrays, known["steps"])
        self.history, self._before = known["history"], known["seconds"]
        self.batch, self.at_once = known["batch"]
        self.validations = [(int(step), float(value)) for step, value in known["validations"]]
        count = len(self.student.parameters)
        self.best = [
            Checkpoint(int(step), float(value), [arrays[f"best/{k}/{i}"] for i in range(count)])
            for k, (step, value) in enumerate(known["best"])
        ]
        return True


def fingerprint_of(
    model: QuantizedModel, teacher: Teacher | KeptTeacher, options: Options
) -> dict[str, Any]:
    """Return everything that determines the result of a run, as JSON reads it back."""
    known = {
        "version": __version__,
        "instruction set": _core.config()["isa"],
        "options": asdict(options),
        "text": digest({"rows": teacher.rows}),
        "model": digest(arrays_of(model)),
        "teacher": digest(arrays_of(teacher.model)),
    }
    return dict(json.loads(json.dumps(known)))


class Reporting:
    """Context of the function that reports a step to `progress`: a bar, a function, or nothing."""

    def __init__(
        self, progress: bool | Callable[[Round], object], steps: int, done: int, title: str
    ) -> None:
        self._progress, self._bar = progress, None
        self._seen = ""
        if progress is True:
            from tqdm.auto import tqdm  # here, because it takes a tenth of the import time

            self._bar = tqdm(total=steps, initial=done, unit="step", desc=title)

    def __enter__(self) -> Callable[[Round], None]:
        return self._report

    def _report(self, found: Round) -> None:
        if found.validation is not None:
            self._seen = f", held back {found.validation:.4f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {found.loss:.4f}{self._seen}", refresh=False)
            self._bar.update()
        if callable(self._progress):
            self._progress(found)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
