"""compress(): a float model and a plan become a quantized model, block by block."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.calibration import (
    READERS,
    Hessian,
    Statistics,
    Text,
    load_arrays,
    save_arrays,
    windows,
)
from lowbitq.formats import Format
from lowbitq.gptq import Feedback, feedback, gptq
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.decoder import EMBEDDING, HEAD, AnyLinear, Block, Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.plans import Plan
from lowbitq.quantizers import quantize, relative_error
from lowbitq.rotations import Rotation, rotate
from lowbitq.tensors import QuantizedTensor

Array = NDArray[np.float32]
Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What a progress callback of `compress` is told.

    Attributes
    ----------
    done, total : int
        Matrices.
    layer : str
        The one just finished.
    record : dict
        What the report will say about it.
    """

    done: int
    total: int
    layer: str
    record: Record


def compress(
    model: Model,
    plan: Plan | Format | str,
    stats: Statistics | None = None,
    *,
    text: Text | None = None,
    samples: int = 128,
    window: int = 2048,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[Step], object] = False,
    **options: Any,
) -> QuantizedModel:
    """Quantize the linear layers of a model, its embedding and its head.

    The model is rotated. Embedding and head are rounded to nearest; then each block sees what all
    before it, quantized already, makes of the calibration text, and its layers are rounded such
    that their outputs change least. Memory holds the activations of one block: ``4 samples window
    hidden`` bytes.

    Parameters
    ----------
    model : Model
        In float32. Left unchanged.
    plan : Plan, Format or str
        A format stands for ``Plan.uniform(model, format, **options)``.
    stats : Statistics, default=None
        From `calibrate`: its tokens are used.
    text : str, path, sequence of str or ndarray of int, default=None
        Calibration text, as for `lowbitq.calibration.windows`. None: Python's own
        ``pydoc_data.topics``, English about Python of which every machine has a copy. Text like
        the one that matters gives a better model.
    samples, window : int
        Windows of how many tokens to take from the text.
    work_dir : path, default=None
        A folder to keep finished blocks in. A second call with the same arguments goes on from
        there; the result is the same as without an interruption.
    progress : bool or callable, default=False
        True: a bar with the time that is left and the last relative error. A function is called
        with a `Step` after each layer.
    **options
        Fields of Plan, such as ``rotation="none"``, ``method="rtn"``, ``seed=1``, and
        ``overrides``; only if `plan` is a format.

    Returns
    -------
    QuantizedModel
        With a record of each matrix: ``format``; ``relative_error``, of the layer's outputs on the
        calibration text (of its weights where it is rounded to nearest); ``damping`` as added to
        the diagonal and the ``retries`` it took; ``dead`` inputs; ``seconds``; ``sha256`` of the
        packed codes and scales.

    Raises
    ------
    ValueError
        If the plan does not fit the model, the text has too few tokens, or `work_dir` belongs to
        another model, plan or text.
    TypeError
        If options are given beside a Plan.

    References
    ----------
    E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2023. S. Ashkboos et al., "QuaRot: Outlier-free 4-bit inference in rotated
    LLMs", 2024.

    Examples
    --------
    >>> small = compress(model, "int4g64", text="train.txt", samples=32)  # doctest: +SKIP
    >>> compress(model, "int4g64sym", method="rtn", rotation="none")  # doctest: +SKIP
    """
    if not isinstance(plan, Plan):
        plan = Plan.uniform(model, plan, **options)
    elif options:
        raise TypeError(f"{next(iter(options))!r} belongs into the plan that is given")
    _check(model, plan)
    tokens = None
    if plan.method == "gptq":
        tokens = _tokens(model, plan, stats, text, samples, window)

    source = rotate(model, plan.rotation, plan.seed)
    prefix = source.copy()
    result = _unfinished(source, plan)
    store = None if work_dir is None else _Store(Path(work_dir), model, plan, tokens)

    outer = _outer(source, plan)
    with _reporting(progress, plan.method, len(outer) + len(plan.layers)) as report:
        for name, linear in outer:
            packed, record = _quantize_outer(linear, source.residual_rotation, plan)
            result.replace_linear(name, packed)
            result.records[name] = record
            report(name, record)
        residual = None if tokens is None else np.stack([result.embed(row) for row in tokens])
        for index, block in enumerate(source.blocks):
            finished = store.load(index) if store else None
            if finished is None:
                hessians = None
                if residual is not None:
                    hessians = _hessians(source, index, residual, plan)
                finished = {}
                for name, tensor, record in _quantize_block(index, block, hessians, plan):
                    finished[name] = tensor, record
                    report(name, record)
                if store:
                    store.save(index, finished)
            else:
                for name, (_, record) in finished.items():
                    report(name, record)
            for name, (tensor, record) in finished.items():
                linear = block.linears[name.rpartition(".")[2]]
                result.replace_linear(name, _packed(tensor, linear, plan))
                result.records[name] = record
            if residual is not None and index + 1 < len(source.blocks):
                _advance(prefix, index, finished, residual)
    return result


def _check(model: Model, plan: Plan) -> None:
    names = [name for name, _ in model.linears()]
    if set(names) != set(plan.layers):
        missing = sorted(set(names) - set(plan.layers)) or sorted(set(plan.layers) - set(names))
        raise ValueError(f"the plan is for another model: {missing[0]!r} is in only one of them")
    for name, linear in [*_outer(model, plan), *model.linears()]:
        if not isinstance(linear, Linear):
            raise ValueError("model is quantized already; compress the float original")
        if not (finite := np.isfinite(linear.weight)).all():
            row, column = np.argwhere(~finite)[0]
            raise ValueError(f"{name} has a NaN or an infinity at [{row}, {column}]")


def _tokens(
    model: Model,
    plan: Plan,
    stats: Statistics | None,
    text: Text | None,
    samples: int,
    window: int,
) -> NDArray[np.int32]:
    if stats is not None:
        if text is not None:
            raise TypeError("text and stats are both given; the tokens of stats would be used")
        return stats.tokens
    return windows(
        model.tokenizer,
        default_text() if text is None else text,
        samples=samples,
        window=window,
        seed=plan.seed,
    )


def default_text() -> str:
    """Return the calibration text for want of any other: the topics of Python's own help.

    Returns
    -------
    str
        About 700 kB of English and code.
    """
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def _unfinished(source: Model, plan: Plan) -> QuantizedModel:
    """Copy a float model into one whose layers are to be replaced."""
    copy = source.copy()
    values = {f.name: getattr(copy, f.name) for f in fields(copy) if f.init}
    return QuantizedModel(**values, plan=plan)


def _packed(tensor: QuantizedTensor, linear: Any, plan: Plan) -> QuantizedLinear:
    return QuantizedLinear(tensor, linear.bias, linear.rotation, plan.activation_bits)


# --- embedding and head ---------------------------------------------------------------------------


def _outer(model: Model, plan: Plan) -> list[tuple[str, AnyLinear]]:
    """The matrices outside the blocks that the plan quantizes."""
    if plan.embedding is None:
        return []
    return [(name, linear) for name, linear in model.matrices() if name in (EMBEDDING, HEAD)]


def _quantize_outer(
    linear: AnyLinear, rotation: Rotation | None, plan: Plan
) -> tuple[QuantizedLinear, Record]:
    """Pack W as W R^T, with R, the residual rotation, on its input.

    For the sake of the head: on SmolLM2 the KL divergence that packing it and rounding its input to
    8 bits cause falls from 1.2e-3 to 4e-4 nats. Looking up a row costs a transform more.
    """
    assert isinstance(linear, Linear)
    assert plan.embedding is not None
    started = time.perf_counter()
    turned = linear
    if rotation is not None and linear.rotation is None:
        turned = linear.replace(weight=rotation.apply(linear.weight), rotation=rotation)
    # The search of "mse" takes ten times as long, 4 s for SmolLM2, for a sixth less error.
    tensor, error = _round(turned, plan.embedding, range="minmax")
    activation_bits = None if plan.activation_bits is None else 8
    packed = QuantizedLinear(tensor, turned.bias, turned.rotation, activation_bits)
    return packed, {"format": plan.embedding} | _outcome(tensor, error, started)


def _round(linear: Linear, format: Format | str, **options: Any) -> tuple[QuantizedTensor, float]:
    """Round to nearest; also the relative error of the weights."""
    tensor = quantize(linear.weight, format, **options)
    if not linear.weight.any():
        return tensor, 0.0
    return tensor, float(relative_error(linear.weight, tensor.dequantize()))


def _outcome(tensor: QuantizedTensor, error: float, started: float) -> Record:
    return {
        "relative_error": error,
        "seconds": round(time.perf_counter() - started, 4),
        "sha256": hashlib.sha256(tensor.panels.data).hexdigest(),
    }


# --- one block ------------------------------------------------------------------------------------


def _hessians(
    source: Model, index: int, residual: Array, plan: Plan
) -> dict[str, NDArray[np.float64]]:
    """Hessians of the four inputs of a float block, by tap; `residual` is left unchanged."""
    linears = source.blocks[index].linears
    readers = {tap: linears[names[0].rpartition(".")[2]] for tap, names in READERS.items()}
    window = residual.shape[1]
    sums = {
        tap: Hessian(linear.shape[1], window, plan.first_tokens, plan.first_weight)
        for tap, linear in readers.items()
    }
    taps: dict[str, Array] = {}
    scratch = np.empty_like(residual[0])
    for hidden in residual:
        scratch[:] = hidden
        source.block_forward(index, scratch, taps)
        for tap, total in sums.items():
            total.add(readers[tap].rotate_input(taps[tap]))
    return {tap: total.total for tap, total in sums.items()}


def _advance(
    prefix: Model, index: int, finished: dict[str, tuple[QuantizedTensor, Record]], residual: Array
) -> None:
    """Run a finished block on all windows, in place.

    Its weights are decoded once and multiplied in float32: exact where the packed path rounds
    activations to 8 bits, and for long windows not slower.
    """
    block = prefix.blocks[index]
    floats = dict(block.linears)
    for name, (tensor, _) in finished.items():
        short = name.rpartition(".")[2]
        block.linears[short] = floats[short].replace(weight=tensor.dequantize())
    for hidden in residual:
        prefix.block_forward(index, hidden)
    block.linears = floats


def _quantize_block(
    index: int, block: Block, hessians: dict[str, NDArray[np.float64]] | None, plan: Plan
) -> Iterator[tuple[str, QuantizedTensor, Record]]:
    for tap, names in READERS.items():
        inputs: dict[tuple[int | None, int], Feedback] = {}  # the order depends on these
        for short in names:
            started = time.perf_counter()
            name = f"model.layers.{index}.{short}"
            linear = block.linears[short.rpartition(".")[2]]
            assert isinstance(linear, Linear)
            format = Format.parse(plan.layers[name])
            record: Record = {"format": str(format)}
            if hessians is None:
                tensor, error = _round(linear, format, range=plan.range, norm=plan.norm)
            else:
                kept = format.group, format.run
                if kept not in inputs:
                    inputs[kept] = feedback(
                        hessians[tap],
                        group=format.group,
                        run=format.run,
                        order=plan.order,
                        damping=plan.damping,
                        damping_by=plan.damping_by,
                        arithmetic=plan.arithmetic,
                    )
                known = inputs[kept]
                tensor, error = gptq(
                    linear.weight,
                    known,
                    format,
                    range=plan.range,
                    norm=plan.norm,
                    importance=plan.importance,
                    sweeps=plan.sweeps_of(name),
                )
                record |= {"damping": known.damping, "retries": known.retries}
                record["dead"] = int(known.dead.sum())
            yield name, tensor, record | _outcome(tensor, error, started)


# --- progress -------------------------------------------------------------------------------------


@contextmanager
def _reporting(
    progress: bool | Callable[[Step], object], method: str, total: int
) -> Iterator[Callable[[str, Record], None]]:
    """What reports a finished matrix, as the caller of `compress` wants it reported."""
    done = 0
    bar = None
    if progress is True:
        from tqdm import tqdm  # only now: it costs a tenth of the import of the package

        bar = tqdm(total=total, unit="layer", desc=method)

    def report(name: str, record: Record) -> None:
        nonlocal done
        done += 1
        if bar is not None:
            bar.set_postfix_str(f"error {record['relative_error']:.2e}", refresh=False)
            bar.update()
        if callable(progress):
            progress(Step(done, total, name, record))

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


# --- finished blocks on disk ----------------------------------------------------------------------


class _Store:
    """Finished blocks in a folder, each written whole or not at all."""

    def __init__(
        self, folder: Path, model: Model, plan: Plan, tokens: NDArray[np.int32] | None
    ) -> None:
        self.folder = folder
        mark = {
            "weights": _hash_weights(model),
            "plan": json.loads(plan.to_json()),
            "tokens": None if tokens is None else hashlib.sha256(tokens.data).hexdigest(),
        }
        path = folder / "fingerprint.json"
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = _read_json(path)
            if different := [key for key in mark if found.get(key) != mark[key]]:
                raise ValueError(
                    f"work_dir {folder} holds blocks made with other {' and '.join(different)}; "
                    "remove it or choose another"
                )
        else:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(mark, indent=2))
            os.replace(partial, path)

    def path(self, index: int) -> Path:
        return self.folder / f"block_{index:04}.npz"

    def save(self, index: int, finished: dict[str, tuple[QuantizedTensor, Record]]) -> None:
        arrays: dict[str, Any] = {}
        about: dict[str, Any] = {}
        for name, (tensor, record) in finished.items():
            parts, metadata = tensor.to_arrays()
            arrays |= {f"{name}/{part}": array for part, array in parts.items()}
            about[name] = {"metadata": metadata, "record": record}
        arrays["about"] = np.array(json.dumps(about))
        save_arrays(self.path(index), arrays)

    def load(self, index: int) -> dict[str, tuple[QuantizedTensor, Record]] | None:
        path = self.path(index)
        if not path.exists():
            return None
        arrays = load_arrays(path)
        try:
            about = json.loads(str(arrays.pop("about")))
            names = [f"model.layers.{index}.{short}" for tap in READERS for short in READERS[tap]]
            if list(about) != names:
                raise FormatError(f"{path}: holds {list(about)}, expected {names}")
            finished = {}
            for name, item in about.items():
                parts = {
                    key.rpartition("/")[2]: array
                    for key, array in arrays.items()
                    if key.rpartition("/")[0] == name
                }
                tensor = QuantizedTensor.from_arrays(parts, item["metadata"])
                if hashlib.sha256(tensor.panels.data).hexdigest() != item["record"]["sha256"]:
                    raise FormatError(f"{path}: the codes of {name} are damaged")
                finished[name] = tensor, item["record"]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path}: not a finished block: {error}") from error
        return finished


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    return found if isinstance(found, dict) else {}


def _hash_weights(model: Model) -> str:
    digest = hashlib.sha256()
    for block in model.blocks:
        for gain in (block.attention_norm, block.mlp_norm, block.query_norm, block.key_norm):
            if gain is not None:
                digest.update(gain.data)
    for _, linear in model.matrices():
        assert isinstance(linear, Linear)
        digest.update(linear.weight.data)
        if linear.bias is not None:
            digest.update(linear.bias.data)
    return digest.hexdigest()
