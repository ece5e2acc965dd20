"""distill(): train what quantization left free, so that a model predicts as the float model does.

Scales, offsets, norm gains and the like learn, and codes if weights do, from the difference between
the model's predictions and the teacher's on calibration text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.hints import Hints, check_alike
from lowbitq.losses import Loss
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.tokens import check_count
from lowbitq.optimizers import RATES
from lowbitq.roundings import LearnedRounding
from lowbitq.student_diversity import check_diversity
from lowbitq.students import KINDS
from lowbitq.teachers import KeptTeacher, Teacher
from lowbitq.texts import Text, check_positions, tokenize
from lowbitq.training import Options, Reporting, Round, Training, fingerprint_of


def distill(
    model: QuantizedModel,
    teacher: Model,
    text: Text,
    *,
    learn: Iterable[str] = ("scale", "offset", "norm"),
    rounding: LearnedRounding | str = "nearest",
    loss: Loss | str = "kl",
    hints: Hints | None = None,
    temperatures: Sequence[float] = (),
    steps: int = 240,
    batch: int | str = 2,
    window: int = 512,
    memory: int | None = None,
    validation: int = 8,
    every: int = 10,
    patience: int | None = None,
    rates: Mapping[str, float] | None = None,
    paces: Mapping[str, float] | None = None,
    warmup: int = 10,
    clip: float = 1.0,
    decay: float = 0.0,
    diversity: float = 0.0,
    regularization: float = 0.0,
    seed: int = 0,
    seconds: float | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    keep: int = 1,
    teacher_dir: str | os.PathLike[str] | None = None,
    top_k: int | None = None,
    progress: bool | Callable[[Round], object] = False,
) -> QuantizedModel:
    """Train scales, offsets, gains and adapters of a quantized model on a teacher's predictions.

    What is made small is a mean over windows of::

        loss + hints.features L_features + hints.relations L_relations
             + hints.attention L_attention + diversity L_diversity
             + regularization ||parameters - start||^2 / 2

    Parameters
    ----------
    model : QuantizedModel
        Left unchanged.
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
        Of predictions.
    hints : Hints, default=None
        Losses of some blocks' states and attention; the teacher has the model's shape then.
    temperatures : sequence of float, default=()
        Of the loss, instead of its own: the first at the first step, the last at the last, the
        others evenly between, linear from one to the next. ``(5, 3, 1)`` begins with soft targets.
    steps, window : int
        Steps of AdamW, and tokens per window.
    batch : int or "auto", default=2
        Windows per step; ``"auto"``: as many as `memory` holds at once.
    memory : int, default=None
        Bytes of RAM that the process may hold. Where a batch would take more, its gradients are
        accumulated over parts of it. None: the whole batch at once.
    validation : int, default=8
        Windows that are held back for validation.
    every : int, default=10
        Steps between two validations. The parameters that validate best are returned.
    patience : int or None, default=None
        Validations without an improvement after which training stops; None: it does not.
    rates : mapping of str to float, default=None
        Learning rates of some kinds; the others have those of `lowbitq.optimizers.RATES`. See
        also `lowbitq.range_test`.
    paces : mapping of str to float, default=None
        Factors of the learning rates of some layers, by patterns of names or formats, see
        `lowbitq.students.Student.set_paces`: ``{"int2*": 2.0}``. Adam's steps do not depend on the
        size of a gradient, so that a factor of the gradients would change nothing.
    warmup : int, default=10
        Steps in which the learning rate rises.
    clip : float, default=1.0
        Largest norm of the gradient.
    diversity : float, default=0.0
        Weight of how alike the errors of averaged copies are, see `lowbitq.student_diversity`. A
        step then runs the blocks that have such layers once more.
    decay, regularization : float, default=0.0
        Weight decay towards zero (of Adam), and the weight of half the squared distance of the
        parameters from the start.
    seed : int, default=0
        Of the order of the windows. The same seed gives the same model.
    seconds : float or None, default=None
        Time after which no further step begins.
    work_dir : path, default=None
        Folder for the state after each validation. A second call with the same arguments resumes
        and gives the same model as without an interruption.
    keep : int, default=1
        Number of best checkpoints. Above 1, all of them are saved at the end, for choice by another
        measure, as ``work_dir/step_40`` and the like.
    teacher_dir : path, default=None
        Folder where what the teacher says about all windows is kept: run once, for every later
        call. None: it is run for each window.
    top_k : int, default=None
        Keep this many of the most probable tokens in `teacher_dir`, and as many others, instead of
        the exact input of the head: right on average, for `loss` of kl and ce; see `lowbitq.top_k`.
    progress : bool or callable, default=False
        True: a bar with loss, validation and remaining time. A function is called with a `Round`
        after each step.

    Returns
    -------
    QuantizedModel
        With as many bits as before; ``provenance["distillation"]`` has options and curves, and
        `lowbitq.plots.training` draws them. Records of matrices that have changed say so.

    Raises
    ------
    ValueError
        If an option is out of range, text and `window` do not fit, the vocabularies differ,
        `memory` does not hold a window, or `work_dir` or `teacher_dir` belongs to other arguments.

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
    if keep > 1 and work_dir is None:
        raise ValueError(f"keep is {keep}, but there is no work_dir to save checkpoints in")
    if patience is not None:
        check_count("patience", patience, 1)
    options, rows = options_of(
        model,
        teacher,
        text,
        learn=learn,
        rounding=rounding,
        loss=loss,
        hints=hints,
        temperatures=temperatures,
        steps=steps,
        batch=batch,
        window=window,
        memory=memory,
        validation=validation,
        every=every,
        rates=rates,
        paces=paces,
        warmup=warmup,
        clip=clip,
        decay=decay,
        diversity=diversity,
        regularization=regularization,
        seed=seed,
        keep=keep,
        top_k=top_k,
    )
    if top_k is not None and teacher_dir is None:
        raise ValueError(f"top_k is {top_k}, but there is no teacher_dir to keep tokens in")
    run = Training(model, _teacher(teacher, rows, options, teacher_dir, top_k), options, rows)
    folder = None if work_dir is None else Path(work_dir)
    fingerprint = {} if folder is None else fingerprint_of(model, run.teacher, options)
    resumed = folder is not None and run.resume(folder, fingerprint)
    if memory is not None and not resumed:
        run.fit(memory)
    with Reporting(progress, steps, run.done, "distill") as report:
        while run.done < steps and not run.exhausted(patience, seconds):
            done = run.step()
            if folder is not None and done.validation is not None:
                run.save(folder, fingerprint)
            report(done)
    finished = run.finish()
    if folder is not None and keep > 1:
        for found, small in finished:
            small.save(folder / f"step_{found.step}")
    return finished[0][1]


def options_of(
    model: QuantizedModel,
    teacher: Model,
    text: Text,
    *,
    learn: Iterable[str],
    rounding: LearnedRounding | str,
    loss: Loss | str,
    hints: Hints | None,
    temperatures: Sequence[float],
    batch: int | str,
    window: int,
    memory: int | None,
    validation: int,
    rates: Mapping[str, float] | None,
    paces: Mapping[str, float] | None,
    top_k: int | None,
    diversity: float,
    **others: Any,
) -> tuple[Options, NDArray[np.int32]]:
    """Check the arguments of a run; return its options and the windows of its text.

    Parameters
    ----------
    model, teacher, text, ...
        As for `distill`.

    Raises
    ------
    ValueError
        As `distill` does.
    """
    for name in ("steps", "every", "keep"):
        check_count(name, others[name], 1)
    for name in ("warmup", "seed"):
        check_count(name, others[name], 0)
    check_count("validation", validation, 1)
    check_count("window", window, 2)
    if batch == "auto":
        if memory is None:
            raise ValueError("memory is None, expected a number of bytes with batch = 'auto'")
    elif isinstance(batch, str):
        raise ValueError(f"batch is {batch!r}, expected a number or 'auto'")
    else:
        check_count("batch", batch, 1)
    for name, count in {"memory": memory, "top_k": top_k}.items():
        if count is not None:
            check_count(name, count, 1)
    check_diversity(model, diversity)
    if teacher.config.vocab_size != model.config.vocab_size:
        found, expected = teacher.config.vocab_size, model.config.vocab_size
        raise ValueError(f"teacher has a vocabulary of {found}, the model of {expected}")
    if unknown := set(rates or ()) - set(KINDS):
        raise ValueError(f"rates has {sorted(unknown)}, expected some of {', '.join(KINDS)}")
    loss = Loss.parse(loss)
    for temperature in temperatures:
        replace(loss, temperature=temperature)  # checks it
    hints = Hints() if hints is None else hints
    hints.within(len(model.blocks))
    if hints or diversity:
        check_alike(model, teacher)
    if hints.attention and model.config.heads != teacher.config.heads:
        found, expected = teacher.config.heads, model.config.heads
        raise ValueError(f"teacher has {found} heads, the model {expected}: attention differs")
    least = validation + (1 if isinstance(batch, str) else batch)
    rows = training_rows(model, text, window, least)
    check_positions(rows.shape[1], model.config)
    check_positions(rows.shape[1], teacher.config, of="teacher")
    options = Options(
        learn=tuple(sorted(set(learn))),
        rounding=str(LearnedRounding.parse(rounding)),
        loss=str(loss),
        batch=batch,
        window=rows.shape[1],
        validation=validation,
        rates=tuple(sorted((RATES | dict(rates or {})).items())),
        paces=tuple((paces or {}).items()),
        hints=hints,
        temperatures=tuple(map(float, temperatures)),
        diversity=diversity,
        **others,
    )
    return options, rows


def _teacher(
    model: Model,
    rows: NDArray[np.int32],
    options: Options,
    folder: str | os.PathLike[str] | None,
    top_k: int | None,
) -> Teacher | KeptTeacher:
    blocks = options.hints.states(len(model.blocks))
    held_back = range(len(rows) - options.validation, len(rows))
    live = Teacher(model, rows, blocks, remember=held_back)
    return live if folder is None else KeptTeacher(live, folder, top_k=top_k)


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
