"""distill(): train what quantization left free, so that a model predicts as the float model does.

Scales, offsets, norm gains and the like learn from the difference between the model's predictions
and the teacher's on calibration text; codes stay as they are unless weights learn, too.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.checkpoints.archives import digest, load_arrays, save_arrays
from lowbitq.checkpoints.blocks import differences
from lowbitq.gradients import Pass, linear_sink
from lowbitq.losses import Loss
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.stored import LayerWriter
from lowbitq.models.tokens import check_count
from lowbitq.roundings import LearnedRounding, Progress
from lowbitq.students import KINDS, Parameter, Student
from lowbitq.texts import Text, check_positions, tokenize
from lowbitq.version import __version__

Array = NDArray[np.float32]

# Learning rates of dimensionless parameters, see lowbitq.students. SmolLM2 in int2g64, 40 steps of
# 512 tokens: scale, offset, norm at 2e-3, 4e-3, 2e-3 took the held-back KL from 1.287 to 0.907; at
# 1e-3, 4e-3, 1e-3 to 0.910; at 6e-3, 12e-3, 6e-3 to 1.045. The others are orders of magnitude.
RATES = {
    "scale": 2.5e-3,
    "offset": 5e-3,
    "level": 4e-3,
    "norm": 2.5e-3,
    "row": 2e-3,
    "bias": 1e-3,
    "adapter": 1e-3,
    "weight": 2e-3,
}
BETAS, EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Round:
    """What is known after a step of training.

    Attributes
    ----------
    step, steps : int
        Steps done, and in all.
    loss : float
        Mean per token of the step's windows, nats.
    validation : float or None
        Divergence from the teacher on held-back windows, nats per token; None: not measured now.
    norm : float
        Of the gradient, before it was clipped.
    seconds : float
        Since the start.
    """

    step: int
    steps: int
    loss: float
    validation: float | None
    norm: float
    seconds: float


class AdamW:
    """Adam with decoupled weight decay, on parameters of several learning rates.

    Parameters
    ----------
    parameters : list of Parameter
    rates : mapping of str to float
        Learning rate of each kind.
    decay : float, default=0.0
        Weight decay towards zero; parameters that start at 1 should have none.
    clip : float, default=1.0
        Largest norm of all gradients together; longer ones are scaled down. inf: never.

    References
    ----------
    I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        rates: Mapping[str, float],
        *,
        decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.parameters = parameters
        self.steps = 0
        self._rates, self._decay, self._clip = rates, decay, clip
        self._moments = [(np.zeros_like(p.value), np.zeros_like(p.value)) for p in parameters]

    def step(self, factor: float, frozen: frozenset[str] = frozenset()) -> float:
        """Move the parameters, with learning rates times `factor`; return the gradient's norm.

        Parameters of the kinds in `frozen` stay, and so do their moments.
        """
        self.steps += 1
        for parameter in self.parameters:
            if parameter.kind in frozen:
                parameter.gradient[:] = 0
        norm = math.sqrt(sum(_core.square_sum(p.gradient.reshape(-1)) for p in self.parameters))
        short = min(1.0, self._clip / norm) if norm else 1.0
        for parameter, (first, second) in zip(self.parameters, self._moments, strict=True):
            if parameter.kind in frozen:
                continue
            gradient = parameter.gradient
            gradient *= np.float32(short)
            _core.adamw(
                *(a.reshape(-1) for a in (parameter.value, gradient, first, second)),
                lr=factor * parameter.pace * self._rates[parameter.kind],
                beta1=BETAS[0],
                beta2=BETAS[1],
                epsilon=EPSILON,
                decay=self._decay,
                step=self.steps,
            )
            gradient[:] = 0
        return norm

    def state(self) -> dict[str, Array]:
        """Return the arrays that a later `restore` needs."""
        state = {f"value/{i}": p.value for i, p in enumerate(self.parameters)}
        for i, (first, second) in enumerate(self._moments):
            state |= {f"first/{i}": first, f"second/{i}": second}
        return state

    def restore(self, state: Mapping[str, Array], steps: int) -> None:
        """Continue where `state` was taken, after `steps` steps."""
        self.steps = steps
        for i, (parameter, moments) in enumerate(zip(self.parameters, self._moments, strict=True)):
            parameter.value[:] = state[f"value/{i}"]
            for name, moment in zip(("first", "second"), moments, strict=True):
                moment[:] = state[f"{name}/{i}"]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate in step 1, 2, ..., `steps`.

    It rises from 1 / (warmup + 1) and then falls along half a cosine to a tenth.

    Examples
    --------
    >>> [round(cosine(step, 10, 1), 2) for step in (1, 2, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - warmup - 1) / max(steps - warmup - 1, 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class _Options:
    """What a run can be resumed with."""

    learn: tuple[str, ...]
    rounding: str
    loss: str
    steps: int
    batch: int
    window: int
    validation: int
    rates: tuple[tuple[str, float], ...]
    warmup: int
    clip: float
    decay: float
    regularization: float
    seed: int
    every: int


def distill(
    model: QuantizedModel,
    teacher: Model,
    text: Text,
    *,
    learn: Iterable[str] = ("scale", "offset", "norm"),
    rounding: LearnedRounding | str = "nearest",
    loss: Loss | str = "kl",
    steps: int = 240,
    batch: int = 2,
    window: int = 512,
    validation: int = 8,
    every: int = 10,
    patience: int | None = None,
    rates: Mapping[str, float] | None = None,
    warmup: int = 10,
    clip: float = 1.0,
    decay: float = 0.0,
    regularization: float = 0.0,
    seed: int = 0,
    seconds: float | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[Round], object] = False,
) -> QuantizedModel:
    """Train scales, offsets, gains and adapters of a quantized model on a teacher's predictions.

    Parameters
    ----------
    model : QuantizedModel
        Of layers of one copy. Left unchanged.
    teacher : Model
        The float model, with the same vocabulary.
    text : str, path, sequence of str or of paths, or array_like of int
        Calibration text, as for `lowbitq.texts.windows`. Its last windows are held back.
    learn : iterable of str, default=("scale", "offset", "norm")
        Kinds of parameters, see `lowbitq.students`. ``"row"`` alone is cheapest. ``"weight"`` needs
        thousands of steps; `reconstruct` has cheaper ones.
    rounding : LearnedRounding or str, default="nearest"
        How the codes learn, if ``"weight"`` does; see `lowbitq.roundings`.
    loss : Loss or str, default="kl"
    steps, batch, window : int
        Steps of AdamW, windows per step, tokens per window.
    validation : int, default=8
        Windows that are held back for validation.
    every : int, default=10
        Steps between two validations. The parameters that validate best are returned.
    patience : int or None, default=None
        Validations without an improvement after which training stops; None: it does not.
    rates : mapping of str to float, default=None
        Learning rates of some kinds; the others have those of `RATES`.
    warmup : int, default=10
        Steps in which the learning rate rises.
    clip : float, default=1.0
        Largest norm of the gradient.
    decay, regularization : float, default=0.0
        Weight decay towards zero (of Adam), and the weight of the squared distance from the start.
    seed : int, default=0
        Of the order of the windows. The same seed gives the same model.
    seconds : float or None, default=None
        Time after which no further step begins.
    work_dir : path, default=None
        Folder for the state after each validation. A second call with the same arguments resumes
        and gives the same model as without an interruption.
    progress : bool or callable, default=False
        True: a bar with loss, validation and remaining time. A function is called with a `Round`
        after each step.

    Returns
    -------
    QuantizedModel
        With as many bits as before; ``provenance["distillation"]`` has options and curve.

    Raises
    ------
    ValueError
        If an option is out of range, text and `window` do not fit, the vocabularies differ, a layer
        has several copies, or `work_dir` belongs to other arguments.

    References
    ----------
    M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
    2024. D. Du et al., "BitDistiller: Unleashing the Potential of Sub-4-Bit LLMs via
    Self-Distillation", 2024.

    Examples
    --------
    >>> small = distill(small, model, "train.txt", steps=200)  # doctest: +SKIP
    >>> small.provenance["distillation"]["validation"]  # doctest: +SKIP
    """
    at_least_one = {"steps": steps, "batch": batch, "validation": validation, "every": every}
    for name, count in at_least_one.items():
        check_count(name, count, 1)
    check_count("window", window, 2)
    check_count("warmup", warmup, 0)
    check_count("seed", seed, 0)
    if teacher.config.vocab_size != model.config.vocab_size:
        found, expected = teacher.config.vocab_size, model.config.vocab_size
        raise ValueError(f"teacher has a vocabulary of {found}, the model of {expected}")
    if unknown := set(rates or ()) - set(KINDS):
        raise ValueError(f"rates has {sorted(unknown)}, expected some of {', '.join(KINDS)}")
    if patience is not None:
        check_count("patience", patience, 1)
    rows = training_rows(model, text, window, validation + batch)
    window = rows.shape[1]
    check_positions(window, model.config)
    check_positions(window, teacher.config, of="teacher")
    options = _Options(
        tuple(sorted(set(learn))),
        str(LearnedRounding.parse(rounding)),
        str(Loss.parse(loss)),
        steps,
        batch,
        window,
        validation,
        tuple(sorted((RATES | dict(rates or {})).items())),
        warmup,
        clip,
        decay,
        regularization,
        seed,
        every,
    )
    run = _Run(model, teacher, options, rows)
    folder = None if work_dir is None else Path(work_dir)
    fingerprint = {}
    if folder is not None:
        fingerprint = _fingerprint(model, teacher, options, rows)
        run.resume(folder, fingerprint)
    with _Reporting(progress, steps, run.done) as report:
        while run.done < steps and not run.exhausted(patience, seconds):
            done = run.step()
            if folder is not None and done.validation is not None:
                run.save(folder, fingerprint)
            report(done)
    return run.finish()


def training_rows(model: Model, text: Text, window: int, least: int) -> NDArray[np.int32]:
    """Cut a text into windows, one after the other; windows that were given stay.

    Returns
    -------
    ndarray of shape (windows, window), int32

    Raises
    ------
    ValueError
        If there are fewer than `least`.
    """
    tokens = tokenize(model.tokenizer, text, model.config.vocab_size, axes=(1, 2))
    if tokens.ndim == 1:
        count = len(tokens) // window
        tokens = tokens[: count * window].reshape(count, window)
    if len(tokens) < least:
        raise ValueError(
            f"text has {len(tokens)} windows of {tokens.shape[1]} tokens, expected at least {least}"
        )
    return np.ascontiguousarray(tokens)


def _fingerprint(
    model: QuantizedModel, teacher: Model, options: _Options, rows: NDArray[np.int32]
) -> dict[str, Any]:
    """Everything that determines the result, as JSON reads it back."""
    known = {
        "version": __version__,
        "instruction set": _core.config()["isa"],
        "options": asdict(options),
        "text": digest({"rows": rows}),
        "model": digest(_arrays(model)),
        "teacher": digest(_arrays(teacher)),
    }
    return dict(json.loads(json.dumps(known)))


def _arrays(model: Model) -> dict[str, NDArray[Any]]:
    """The arrays of a model, by name."""
    writer = LayerWriter()
    entries = {name: writer.layer(name, linear) for name, linear in model.matrices()}
    arrays = writer.arrays | {"final_norm": model.final_norm}
    for index, block in enumerate(model.blocks):
        gains = {f"{index}.{i}": gain for i, gain in enumerate(block.norms) if gain is not None}
        arrays |= gains
    about = [entries, repr(model.config), repr(model.residual_rotation)]
    return arrays | {"about": np.array(json.dumps(about))}


class _Run:
    """The state of a training run between two steps."""

    def __init__(
        self, model: QuantizedModel, teacher: Model, options: _Options, rows: NDArray[np.int32]
    ) -> None:
        self.options, self.teacher = options, teacher
        self.student = Student(model, options.learn, rounding=options.rounding, teacher=teacher)
        self.loss = Loss.parse(options.loss)
        self.optimizer = AdamW(
            self.student.parameters, dict(options.rates), decay=options.decay, clip=options.clip
        )
        self.train, self.held_back = rows[: -options.validation], rows[-options.validation :]
        self.history: list[dict[str, float]] = []
        self.validations: list[tuple[int, float]] = []
        self.best: list[Array] = []
        self.started, self.before = time.monotonic(), 0.0
        self._teacher_hidden: dict[int, Array] = {}

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.optimizer.steps

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def exhausted(self, patience: int | None, seconds: float | None) -> bool:
        """Whether time is up, or validation has long stopped improving."""
        if seconds is not None and self.seconds >= seconds:
            return True
        if patience is None or not self.validations:
            return False
        values = [value for _, value in self.validations]
        return len(values) - 1 - int(np.argmin(values)) >= patience

    def step(self) -> Round:
        """One step of AdamW; before the first one, validation of the start."""
        if not self.validations:
            self._validate()
        options, step = self.options, self.done + 1
        at = Progress(step, options.steps, options.seed)
        self.student.compose(at=at)
        weight = np.full(options.window, 1 / (options.batch * options.window), np.float32)
        total = 0.0
        runs = []
        teacher = self.teacher if self.loss.needs_teacher else None
        for tokens in self._batch(step):
            run = Pass(self.student.model, tokens)
            losses = run.loss(
                self.loss,
                targets=np.append(tokens[1:], np.int32(-1)) if self.loss.needs_targets else None,
                teacher=teacher,
                teacher_hidden=None if teacher is None else teacher.hidden(tokens),
                weights=weight,
                final_norm=self.student.final_norm_gradient,
            )
            total += float(losses.mean()) / options.batch
            runs.append(run)
        self.student.backward(runs)
        for p in self.student.parameters if options.regularization else ():
            p.gradient += np.float32(2 * options.regularization) * (p.value - p.start)
        factor = cosine(step, options.steps, options.warmup)
        norm = self.optimizer.step(factor, self.student.frozen(at))
        validation = None
        if self.done % options.every == 0 or self.done == options.steps:
            validation = self._validate()
        self.history.append({"step": step, "loss": total, "norm": norm})
        return Round(step, options.steps, total, validation, norm, self.seconds)

    def _batch(self, step: int) -> Iterator[NDArray[np.int32]]:
        """The windows of a step: all in random order, then all again in another."""
        count = len(self.train)
        for at in range((step - 1) * self.options.batch, step * self.options.batch):
            epoch, place = divmod(at, count)
            order = np.random.default_rng([self.options.seed, epoch]).permutation(count)
            yield self.train[order[place]]

    def _validate(self) -> float:
        """Divergence on the held-back windows; keeps the parameters if it is the least."""
        self.student.compose()
        kl = Loss.parse("kl")
        total = 0.0
        for i, tokens in enumerate(self.held_back):
            if i not in self._teacher_hidden:
                self._teacher_hidden[i] = self.teacher.hidden(tokens)
            losses = np.empty(len(tokens))
            _core.head_backward(
                self.student.model.handle,
                self.student.model.hidden(tokens),
                self.teacher.handle,
                self._teacher_hidden[i],
                None,
                None,
                None,
                linear_sink(),
                losses,
                None,
                **vars(kl),
            )
            total += float(losses.mean()) / len(self.held_back)
        if not self.validations or total < min(value for _, value in self.validations):
            self.best = [p.value.copy() for p in self.student.parameters]
        self.validations.append((self.done, total))
        return total

    def finish(self) -> QuantizedModel:
        """The quantized model with the best parameters, the present ones among them."""
        if not self.validations or self.validations[-1][0] < self.done:
            self._validate()
        for parameter, value in zip(self.student.parameters, self.best, strict=True):
            parameter.value[:] = value
        result = self.student.finish()
        curve = {"options": vars(self.options), "steps": self.history}
        known = {**curve, "validation": self.validations, "seconds": round(self.seconds, 1)}
        return replace(result, provenance=result.provenance | {"distillation": known})

    def save(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Write everything that `resume` needs, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        known = {
            "fingerprint": fingerprint,
            "steps": self.done,
            "history": self.history,
            "validations": self.validations,
            "seconds": self.seconds,
        }
        best = {f"best/{i}": value for i, value in enumerate(self.best)}
        text = np.frombuffer(json.dumps(known).encode(), np.uint8)
        save_arrays(folder / "training.npz", {"known": text, **self.optimizer.state(), **best})

    def resume(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Continue from the state in a folder, if there is one."""
        path = folder / "training.npz"
        if not path.exists():
            return
        arrays = load_arrays(path)
        known = json.loads(arrays["known"].tobytes())
        if different := differences(known["fingerprint"], fingerprint):
            raise ValueError(
                f"{path} is from another run, with different {' and '.join(different)}; "
                "remove it or choose another work_dir"
            )
        self.optimizer.restore(arrays, known["steps"])
        self.history, self.before = known["history"], known["seconds"]
        self.validations = [(int(step), float(value)) for step, value in known["validations"]]
        self.best = [arrays[f"best/{i}"] for i in range(len(self.student.parameters))]


class _Reporting:
    """Context of the function that reports a step to `progress`."""

    def __init__(self, progress: bool | Callable[[Round], object], steps: int, done: int) -> None:
        self._progress, self._bar = progress, None
        self._seen = ""
        if progress is True:
            from tqdm.auto import tqdm  # here, because it takes a tenth of the import time

            self._bar = tqdm(total=steps, initial=done, unit="step", desc="distill")

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
