"""reconstruct(): train a quantized model block by block, each towards its float block's output.

The first of two stages; `lowbitq.distillation` is the second. A block is a thirtieth of a network
and needs no head, so its steps are cheap, and what is wrong in one is mended before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.distillation import training_rows
from lowbitq.encoding import trained_records
from lowbitq.gradients import BlockPass
from lowbitq.hints import check_alike, turned
from lowbitq.losses import feature_loss
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.tokens import check_count
from lowbitq.optimizers import RATES, AdamW, cosine
from lowbitq.roundings import LearnedRounding, Progress
from lowbitq.students import Student
from lowbitq.texts import Text

Array = NDArray[np.float32]

INPUTS = ("quantized", "float")


@dataclass(frozen=True)
class Rebuilt:
    """What is known of a block after its training.

    Attributes
    ----------
    block, blocks : int
        Its index, and the number of all.
    before, after : float
        Relative error of its output: mean over tokens of ``||x - target||^2 / ||target||^2``.
    """

    block: int
    blocks: int
    before: float
    after: float


def reconstruct(
    model: QuantizedModel,
    teacher: Model,
    text: Text,
    *,
    learn: Iterable[str] = ("scale", "offset", "norm"),
    rounding: LearnedRounding | str = "nearest",
    steps: int = 16,
    batch: int = 2,
    samples: int = 16,
    window: int = 1024,
    inputs: str = "quantized",
    rates: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[Rebuilt], object] | None = None,
) -> QuantizedModel:
    """Train each block of a quantized model to give what the float model's gives.

    Parameters
    ----------
    model : QuantizedModel
        Left unchanged.
    teacher : Model
        The float model, of the same shape.
    text : str, path, sequence of str or of paths, or array_like of int
        Calibration text, as for `lowbitq.texts.windows`.
    learn : iterable of str
        Kinds of parameters, see `lowbitq.students`; ``("weight", "scale")`` is EfficientQAT's
        Block-AP. Short runs lose by it what error feedback has won: after 40 steps of 8 windows of
        256 tokens, the first block of SmolLM2 in int2g64 erred by 0.035 of its held-back output
        with scales, offsets and norms alone, by 0.043 or more with weights, by 0.042 untrained.
    rounding : LearnedRounding or str, default="nearest"
        How the codes learn, if ``"weight"`` does; see `lowbitq.roundings`.
    steps, batch : int
        Steps of AdamW for each block, and windows per step.
    samples, window : int
        Windows of the text that are used, and tokens per window.
    inputs : {"quantized", "float"}, default="quantized"
        What enters a block: the output of the trained blocks before it, whose errors it then mends
        as well, or of the float blocks.
    rates : mapping of str to float, default=None
        Learning rates of some kinds; see `lowbitq.optimizers.RATES`.
    seed : int, default=0
        Of the choice of windows.
    progress : callable, default=None
        Called with a `Rebuilt` after each block.

    Returns
    -------
    QuantizedModel
        With as many bits as before; ``provenance["reconstruction"]`` has options and errors.

    Raises
    ------
    ValueError
        If an option is out of range, or models and text do not fit.

    References
    ----------
    M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
    2024, section 3.2. Y. Li et al., "BRECQ: Pushing the limit of post-training quantization by
    block reconstruction", 2021.

    Examples
    --------
    >>> small = reconstruct(small, model, "train.txt")  # doctest: +SKIP
    """
    learn = sorted(set(learn))
    for name, count in {"steps": steps, "batch": batch, "samples": samples}.items():
        check_count(name, count, 1)
    if inputs not in INPUTS:
        raise ValueError(f"inputs is {inputs!r}, expected 'quantized' or 'float'")
    check_alike(model, teacher)
    rows = training_rows(model, text, window, 1)
    random = np.random.default_rng(seed)
    rows = rows[np.sort(random.permutation(len(rows))[:samples])]
    used = RATES | dict(rates or {})
    student = Student(model, learn, rounding=rounding, teacher=teacher)
    streams = [student.model.embed(row) for row in rows]
    plain = [teacher.embed(row) for row in rows]
    found: list[Rebuilt] = []
    for index in range(len(model.blocks)):
        if inputs == "float":
            streams = [turned(student.model, x) for x in plain]
        for x in plain:
            teacher.block_forward(index, x)
        targets = [turned(student.model, x) for x in plain]
        optimizer = AdamW(student.block_parameters(index), used)
        errors = []
        for step in range(1, steps + 1):
            at = Progress(step, steps, seed)
            student.compose(index, at)
            chosen = random.choice(len(rows), min(batch, len(rows)), replace=False)
            errors.append(_step(student, index, [(streams[i], targets[i]) for i in chosen]))
            optimizer.step(cosine(step, steps, 2), student.frozen(at))
        student.compose(index)
        ends = []
        for x, target in zip(streams, targets, strict=True):
            student.model.block_forward(index, x)
            ends.append(feature_loss(x, target, normalize="token")[0])
        found.append(Rebuilt(index, len(model.blocks), errors[0], float(np.mean(ends))))
        if progress is not None:
            progress(found[-1])
    result = student.finish()
    options: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "windows": len(rows),
        "window": rows.shape[1],
    }
    options |= {"learn": learn, "inputs": inputs, "rates": used, "seed": seed}
    known = {"options": options, "blocks": [vars(one) for one in found]}
    return replace(
        result,
        records=trained_records(model, result),
        provenance=result.provenance | {"reconstruction": known},
    )


def _step(student: Student, index: int, pairs: list[tuple[Array, Array]]) -> float:
    """Add the gradients of the mean error over some windows; return that error."""
    total = 0.0
    with student.collecting(index) as sink:
        for x, target in pairs:
            y = x.copy()
            run = BlockPass(student.model, index, y)
            error, dy = feature_loss(y, target, normalize="token")
            total += error / len(pairs)
            run.back(sink, dy / np.float32(len(pairs)))
    return total
