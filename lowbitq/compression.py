"""compress(): quantize a float model as planned, block by block."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.calibration import Statistics
from lowbitq.checkpoints.archives import Arrays, digest
from lowbitq.checkpoints.blocks import Blocks, differences, read_fingerprint
from lowbitq.copies import LayerInputs, Record
from lowbitq.encoding import check_plan, encode
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.decoder import Model
from lowbitq.models.finite import check_finite
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import EMBEDDING, HEAD, NORMS, SLOTS, name_in_block
from lowbitq.models.stored import LayerReader, LayerWriter
from lowbitq.models.tokens import token_array
from lowbitq.plans import PRESETS, Plan
from lowbitq.rotations import Rotation
from lowbitq.texts import FALLBACK, Text, fallback_texts, windows
from lowbitq.version import __version__
from lowbitq.walks import Behind, Drifting, Known, Walk, WithoutInputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowbitq.plans import PlanOptions


@dataclass(frozen=True)
class Step:
    """Argument of a progress callback of `compress`.

    Attributes
    ----------
    done, total : int
        Number of matrices.
    layer : str
        Name of the matrix just finished.
    record : dict
        Its entry in the report.
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
    preset: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[Step], object] = False,
    **options: Unpack[PlanOptions],
) -> QuantizedModel:
    """Quantize the linear layers of a model, its embedding and its head.

    The model is rotated. Embedding and head are rounded to nearest. The calibration text then runs
    through the model block by block: the layers of a block are rounded to change their outputs
    least, given the outputs of all quantized layers before, whose errors they also repay (see
    `lowbitq.drift`); or with ``drift=False`` given those of the quantized blocks before. Memory
    holds the activations of one block: ``4 samples window hidden`` bytes; with drift those of both
    models and of one layer's inputs.

    Parameters
    ----------
    model : Model
        In float32. Left unchanged.
    plan : Plan, Format or str
        A format or layer plan, such as ``"int2g64 + rank16"``, stands for
        ``Plan.uniform(names, format, **options)``.
    stats : Statistics, default=None
        From `calibrate`. If it has Hessians and the plan no ``drift=True``, they are used as they
        are: nothing is run, and layers are rounded for their inputs in the float model. Otherwise
        its tokens are the calibration text, weighted by its `token_weights` if it has them, each
        layer's by its own.
    text : str, path, sequence of str or of paths, or array_like of int, default=None
        Calibration text, as for `lowbitq.texts.windows`. None, with a warning: half of Python's own
        ``pydoc_data.topics``, English about Python that every machine has, enough for about 30
        windows of 2048 tokens. Text like that of the intended use gives a better model.
    samples, window : int
        Number of windows to take from the text, fewer if it is short, and tokens per window.
    preset : {"fast", "balanced"}, default=None
        The best chain known for its time; only if `plan` is a format. ``"fast"``: one pass of error
        feedback. ``"balanced"``: with drift correction. None: balanced where that is possible, that
        is, layers are rounded with feedback and there are two windows of text. `options` go before
        it.
    work_dir : path, default=None
        Folder for finished blocks. A second call with the same arguments, version and instruction
        set resumes from them; the result is the same as without an interruption.
    progress : bool or callable, default=False
        True: a bar with the remaining time and the last relative error. A function is called with a
        `Step` after each layer.
    **options
        Fields of Plan, such as ``rotation="none"``, ``method="rtn"``, ``seed=1``, and
        ``overrides``; only if `plan` is a format.

    Returns
    -------
    QuantizedModel
        With a record of each matrix: ``format``; ``relative_error`` of the layer's outputs on the
        calibration text (of its weights if it is rounded to nearest); the ``damping`` added to the
        diagonal and the ``retries`` it took; ``dead`` inputs; ``rank`` of the adapter, if there is
        one; ``seconds``; ``sha256`` of the packed codes and scales, and the adapter.

    Raises
    ------
    ValueError
        If the plan does not fit the model, the model has a NaN or an infinity, text and `window` do
        not fit the model (as for `lowbitq.texts.windows`), or `work_dir` belongs to another model,
        plan, text, version or instruction set.
    TypeError
        If options are given together with a Plan.

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
    automatic = False
    if not isinstance(plan, Plan):
        automatic = preset is None and "drift" not in options
        chosen: dict[str, Any] = {**_preset(preset), **options}
        plan = Plan.uniform(dict(model.linears()), plan, **chosen)
    elif options or preset:
        name = next(iter(options), "preset")
        raise TypeError(f"{name!r} is given beside a plan; set it in the plan")
    _check(model, plan)
    known = isinstance(stats, Statistics) and bool(stats.hessians)
    tokens = None
    if plan.needs_text:
        tokens = _tokens(model, plan, stats, text, samples, window)
        if automatic and not known:
            plan = replace(plan, drift=len(tokens) > 1)

    source = rotate(model, plan.rotation, plan.seed)
    result = _unfinished(source, plan)
    store = None
    if work_dir is not None:
        store = Blocks(work_dir, _fingerprint(model, plan, tokens, stats))

    outer = _outer(source, plan)
    with _reporting(progress, len(outer) + len(plan.layers)) as report:

        def finish(
            name: str, layer: QuantizedLinear, record: Record, *, restored: bool = False
        ) -> None:
            result.replace_linear(name, layer)
            result.records[name] = record
            report(name, record, restored)

        for name, linear in outer:
            finish(name, *_encode_outer(linear, source.residual_rotation, plan))
        walk = _walk(model, source, result, tokens, stats)
        for index in range(len(source.blocks)):
            names = [name_in_block(index, slot) for slot in SLOTS]
            found = store.load(index, names) if store else None
            if found is None:
                writer, about = LayerWriter(narrow=np.asarray), {}
                for task in walk.tasks(index):
                    name = name_in_block(index, task.slot)
                    layer, record = encode(task.linear, task.inputs, plan.layers[name], plan.seed)
                    record |= task.about
                    about[name] = {"layer": writer.layer(name, layer), "record": record}
                    finish(name, layer, record)
                if store:
                    store.save(index, writer.arrays, about)
            else:
                arrays, about = found
                reader = LayerReader(Arrays(arrays))
                for name, item in about.items():
                    again = reader.layer(name, item["layer"])
                    assert isinstance(again, QuantizedLinear)
                    finish(name, again, item["record"], restored=True)
            walk.leave(index)
    return result


def _preset(name: str | None) -> dict[str, Any]:
    if name is not None and name not in PRESETS:
        expected = ", ".join(map(repr, PRESETS))
        raise ValueError(f"preset is {name!r}, expected one of {expected}")
    return PRESETS[name] if name is not None else {}


def _check(model: Model, plan: Plan) -> None:
    names = [name for name, _ in model.linears()]
    if set(names) != set(plan.layers):
        missing = sorted(set(names) - set(plan.layers)) or sorted(set(plan.layers) - set(names))
        raise ValueError(f"the plan is for another model: {missing[0]!r} is in only one of them")
    for name, linear in [*_outer(model, plan), *model.linears()]:
        if not isinstance(linear, Linear):
            raise ValueError("model is quantized already; compress the float original")
        layer_plan = plan.layers.get(name, plan.embedding)
        assert layer_plan is not None
        check_plan(layer_plan, linear.shape, name)
    check_finite(model)


def _tokens(
    model: Model,
    plan: Plan,
    stats: Statistics | None,
    text: Text | None,
    samples: int,
    window: int,
) -> NDArray[np.int32]:
    if stats is not None:
        if not isinstance(stats, Statistics):
            raise TypeError(f"stats is {type(stats).__name__}, expected Statistics (or use text=)")
        if text is not None:
            raise TypeError("text and stats are both given, expected only one of them")
        vocab_size = model.config.vocab_size
        text = token_array(stats.tokens, vocab_size, name="stats.tokens", axes=(2,))
    elif text is None:
        warnings.warn(FALLBACK, stacklevel=3)
        text = fallback_texts().calibration
    return windows(
        model.tokenizer,
        text,
        samples=samples,
        window=window,
        seed=plan.seed,
        config=model.config,
    )


def _walk(
    model: Model,
    source: Model,
    result: QuantizedModel,
    tokens: NDArray[np.int32] | None,
    stats: Statistics | None,
) -> Walk:
    assert result.plan is not None
    if tokens is None:
        return WithoutInputs(source)
    if stats is not None and stats.hessians and not result.plan.drift:
        return Known(model, source, stats, result.plan.seed)
    kind = Drifting if result.plan.drift else Behind
    return kind(source, result, tokens, stats.token_weights if stats else {})


def _unfinished(source: Model, plan: Plan) -> QuantizedModel:
    """Copy a float model; its layers are then replaced one by one."""
    copy = source.copy()
    values = {f.name: getattr(copy, f.name) for f in fields(copy) if f.init}
    return QuantizedModel(**values, plan=plan)


def leftovers(
    work_dir: str | os.PathLike[str],
    format: Format | str,
    *,
    samples: int,
    window: int,
    preset: str | None = None,
    **options: Any,
) -> str | None:
    """Say why `compress` would refuse the blocks in a folder, as far as known without the model.

    Parameters
    ----------
    work_dir : path
        Missing, or left by an earlier run.
    format, samples, window, preset, **options
        As for `compress`.

    Returns
    -------
    str or None
        The differences, such as ``"plan (seed)"``; None if there are none, or no blocks.

    Raises
    ------
    FormatError
        If the folder's fingerprint is damaged.
    """
    found = read_fingerprint(work_dir)
    if found is None:
        return None
    plan = Plan.uniform(["any"], format, **_preset(preset) | options)
    if preset is None and "drift" not in options and plan.needs_text:
        one = isinstance(windows := found.get("windows"), list) and windows[:1] == [1]
        plan = replace(plan, drift=not one)
    asked = str(plan.layers["any"])
    layers = found.get("layers")
    formats = sorted(set(map(str, layers.values()))) if isinstance(layers, dict) else []
    reasons = [] if formats == [asked] else [f"format ({', '.join(formats)}, not {asked})"]
    expected = _settings(plan)
    reasons += differences({key: found.get(key) for key in expected}, expected)
    match found.get("windows"):
        case None if not plan.needs_text:
            pass
        case [int(count), int(length)] if plan.needs_text and length == window:
            if count > samples:  # fewer may be due to a short text
                reasons.append("samples")
        case _:
            reasons.append("windows")
    return " and ".join(reasons) or None


def _settings(plan: Plan) -> dict[str, Any]:
    """Return the settings that all layers share."""
    used = _core.config()
    return {
        "version": __version__,
        "instruction set": {name: used[name] for name in ("isa", "blas", "blas_core")},
        "plan": {name: value for name, value in plan.to_dict().items() if name != "layers"},
    }


def _fingerprint(
    model: Model, plan: Plan, tokens: NDArray[np.int32] | None, stats: Statistics | None
) -> dict[str, Any]:
    """Return everything that determines the quantized blocks of a model."""
    arrays = {"final_norm": model.final_norm}
    for index, block in enumerate(model.blocks):
        for norm in NORMS:
            if (gain := getattr(block, norm.name)) is not None:
                arrays[name_in_block(index, norm)] = gain
    for name, linear in model.matrices():
        assert isinstance(linear, Linear)
        arrays[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            arrays[f"{name}.bias"] = linear.bias
    return _settings(plan) | {
        "windows": None if tokens is None else list(tokens.shape),
        "layers": plan.to_dict()["layers"],
        "configuration": asdict(model.config),
        "scales": [[block.attention_scale, block.mlp_scale] for block in model.blocks],
        "rope": [block.rope for block in model.blocks],
        "weights": digest(arrays),
        "tokens": None if tokens is None else digest({"tokens": tokens}),
        "hessians": digest(stats.hessians) if stats and stats.hessians else None,
        "token weights": digest(stats.token_weights) if stats and stats.token_weights else None,
    }


# --- embedding and head ---------------------------------------------------------------------------


def _outer(model: Model, plan: Plan) -> list[tuple[str, Any]]:
    """Return the matrices outside the blocks that the plan quantizes."""
    if plan.embedding is None:
        return []
    return [(name, linear) for name, linear in model.matrices() if name in (EMBEDDING, HEAD)]


def _encode_outer(
    linear: Linear, rotation: Rotation | None, plan: Plan
) -> tuple[QuantizedLinear, Record]:
    """Pack W as W R^T; R, the residual rotation, is applied to its input.

    This helps the head: on SmolLM2, the KL divergence due to packing it and rounding its input to
    8 bits falls from 1.2e-3 to 4e-4 nats. Looking up a row costs one transform more.
    """
    assert plan.embedding is not None
    if rotation is not None and linear.rotation is None:
        linear = linear.replace(weight=rotation.apply(linear.weight), rotation=rotation)
    return encode(linear, LayerInputs(), plan.embedding)


# --- progress -------------------------------------------------------------------------------------


@contextmanager
def _reporting(
    progress: bool | Callable[[Step], object], total: int
) -> Iterator[Callable[[str, Record, bool], None]]:
    """Yield the function that reports a matrix to `progress`, and whether it is of an earlier run.

    All blocks take the same time, so the bar tells the remaining time by the mean rate of those
    that this run has finished.
    """
    done = 0
    bar = None
    if progress is True:
        from tqdm.auto import tqdm  # here, because it takes a tenth of the package's import time

        bar = tqdm(total=total, unit="layer", desc="compress", smoothing=0)

    def report(name: str, record: Record, restored: bool) -> None:
        nonlocal done
        done += 1
        if bar is not None:
            bar.initial += restored
            bar.set_postfix_str(f"error {record['relative_error']:.2e}", refresh=False)
            bar.update()
        if callable(progress):
            progress(Step(done, total, name, record))

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()
