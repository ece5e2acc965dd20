"""compress(): a float model and a plan become a quantized model, block by block."""

from __future__ import annotations

import hashlib
import json
import os
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
    Stream,
    load_arrays,
    save_arrays,
)
from lowbitq.encoding import LayerInputs, Record, encode
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.decoder import EMBEDDING, HEAD, Block, Model
from lowbitq.models.finite import check_finite
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.tokens import token_array
from lowbitq.plans import Plan
from lowbitq.rotations import Rotation, rotate
from lowbitq.tensors import QuantizedTensor
from lowbitq.texts import Text, fallback_texts, windows


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
    text : str, path, sequence of str or of paths, or array_like of int, default=None
        Calibration text, as for `lowbitq.texts.windows`. None: half of Python's own
        ``pydoc_data.topics``, English about Python of which every machine has a copy; it has room
        for about 30 windows of 2048 tokens. Text like the one that matters gives a better model.
    samples, window : int
        How many windows of how many tokens to take from the text, if it has room for them.
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
        If the plan does not fit the model, a number of the model is a NaN or an infinity, text and
        `window` do not fit the model (as for `lowbitq.texts.windows`), or `work_dir` belongs to
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
        plan = Plan.uniform(dict(model.linears()), plan, **options)
    elif options:
        raise TypeError(f"{next(iter(options))!r} belongs into the plan that is given")
    _check(model, plan)
    tokens = None
    if plan.needs_text:
        tokens = _tokens(model, plan, stats, text, samples, window)

    source = rotate(model, plan.rotation, plan.seed)
    result = _unfinished(source, plan)
    store = None if work_dir is None else _Store(Path(work_dir), model, plan, tokens)

    outer = _outer(source, plan)
    with _reporting(progress, len(outer) + len(plan.layers)) as report:

        def finish(name: str, layer: QuantizedLinear, record: Record) -> None:
            result.replace_linear(name, layer)
            result.records[name] = record
            report(name, record)

        for name, linear in outer:
            finish(name, *_encode_outer(linear, source.residual_rotation, plan))
        prefix = source.copy()
        prefix.embedding = result.embedding
        stream = None if tokens is None else Stream(prefix, tokens)
        for index in range(len(source.blocks)) if stream is None else stream:
            block = source.blocks[index]
            found = store.load(index, block, plan) if store else None
            if found is None:
                inputs = None if stream is None else _inputs(stream, plan)
                found = {}
                for name, layer, record in _encode_block(index, block, inputs, plan):
                    found[name] = layer, record
                    finish(name, layer, record)
                if store:
                    store.save(index, found)
            else:
                for name, (layer, record) in found.items():
                    finish(name, layer, record)
            if stream is not None and index + 1 < len(source.blocks):
                _advance(stream, result)
    return result


def _check(model: Model, plan: Plan) -> None:
    names = [name for name, _ in model.linears()]
    if set(names) != set(plan.layers):
        missing = sorted(set(names) - set(plan.layers)) or sorted(set(plan.layers) - set(names))
        raise ValueError(f"the plan is for another model: {missing[0]!r} is in only one of them")
    for _, linear in [*_outer(model, plan), *model.linears()]:
        if not isinstance(linear, Linear):
            raise ValueError("model is quantized already; compress the float original")
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
            raise TypeError(f"stats is {type(stats).__name__}, expected Statistics; is it text=?")
        if text is not None:
            raise TypeError("text and stats are both given; the tokens of stats would be used")
        vocab_size = model.config.vocab_size
        text = token_array(stats.tokens, vocab_size, name="stats.tokens", axes=(2,))
    return windows(
        model.tokenizer,
        fallback_texts().calibration if text is None else text,
        samples=samples,
        window=window,
        seed=plan.seed,
        config=model.config,
    )


def _unfinished(source: Model, plan: Plan) -> QuantizedModel:
    """Copy a float model into one whose layers are to be replaced."""
    copy = source.copy()
    values = {f.name: getattr(copy, f.name) for f in fields(copy) if f.init}
    return QuantizedModel(**values, plan=plan)


# --- embedding and head ---------------------------------------------------------------------------


def _outer(model: Model, plan: Plan) -> list[tuple[str, Any]]:
    """The matrices outside the blocks that the plan quantizes."""
    if plan.embedding is None:
        return []
    return [(name, linear) for name, linear in model.matrices() if name in (EMBEDDING, HEAD)]


def _encode_outer(
    linear: Linear, rotation: Rotation | None, plan: Plan
) -> tuple[QuantizedLinear, Record]:
    """Pack W as W R^T, with R, the residual rotation, on its input.

    For the sake of the head: on SmolLM2 the KL divergence that packing it and rounding its input to
    8 bits cause falls from 1.2e-3 to 4e-4 nats. Looking up a row costs a transform more.
    """
    assert plan.embedding is not None
    if rotation is not None and linear.rotation is None:
        linear = linear.replace(weight=rotation.apply(linear.weight), rotation=rotation)
    return encode(linear, LayerInputs(), plan.embedding)


# --- one block ------------------------------------------------------------------------------------


def _inputs(stream: Stream, plan: Plan) -> dict[str, LayerInputs]:
    """Hessians of the four inputs of the block at whose entrance the stream is, by tap."""
    linears = stream.model.blocks[stream.index].linears
    readers = {tap: linears[names[0].rpartition(".")[2]] for tap, names in READERS.items()}
    window, sampling = stream.hidden.shape[1], plan.sampling
    sums = {
        tap: Hessian(linear.shape[1], window, sampling.first_tokens, sampling.first_weight)
        for tap, linear in readers.items()
    }
    for taps in stream.taps():
        for tap, total in sums.items():
            total.add(readers[tap].rotate_input(taps[tap]))
    return {tap: LayerInputs(total.total) for tap, total in sums.items()}


def _encode_block(
    index: int, block: Block, inputs: dict[str, LayerInputs] | None, plan: Plan
) -> Iterator[tuple[str, QuantizedLinear, Record]]:
    for tap, names in READERS.items():
        for short in names:
            name = f"model.layers.{index}.{short}"
            linear = block.linears[short.rpartition(".")[2]]
            assert isinstance(linear, Linear)
            known = LayerInputs() if inputs is None else inputs[tap]
            yield name, *encode(linear, known, plan.layers[name])


def _advance(stream: Stream, result: QuantizedModel) -> None:
    """Take the windows through the block as it is in `result`.

    Its weights are decoded once and multiplied in float32: exact where the packed path rounds
    activations to 8 bits, and for long windows not slower.
    """
    block = stream.model.blocks[stream.index]
    floats = block.linears
    block.linears = dict(floats)
    for name, linear in result.blocks[stream.index].linears.items():
        assert isinstance(linear, QuantizedLinear)
        block.linears[name] = floats[name].replace(weight=linear.tensor.dequantize())
    stream.advance()
    block.linears = floats


# --- progress -------------------------------------------------------------------------------------


@contextmanager
def _reporting(
    progress: bool | Callable[[Step], object], total: int
) -> Iterator[Callable[[str, Record], None]]:
    """What reports a finished matrix, as the caller of `compress` wants it reported."""
    done = 0
    bar = None
    if progress is True:
        from tqdm import tqdm  # only now: it costs a tenth of the import of the package

        bar = tqdm(total=total, unit="layer", desc="compress")

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
            "plan": plan.to_dict(),
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

    def save(self, index: int, finished: dict[str, tuple[QuantizedLinear, Record]]) -> None:
        arrays: dict[str, Any] = {}
        about: dict[str, Any] = {}
        for name, (layer, record) in finished.items():
            parts, metadata = layer.tensor.to_arrays()
            arrays |= {f"{name}/{part}": array for part, array in parts.items()}
            about[name] = {"metadata": metadata, "record": record}
        arrays["about"] = np.array(json.dumps(about))
        save_arrays(self.path(index), arrays)

    def load(
        self, index: int, block: Block, plan: Plan
    ) -> dict[str, tuple[QuantizedLinear, Record]] | None:
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
                linear = block.linears[name.rpartition(".")[2]]
                bits = plan.layers[name].copies[0].activation_bits
                layer = QuantizedLinear(tensor, linear.bias, linear.rotation, bits)
                finished[name] = layer, item["record"]
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
