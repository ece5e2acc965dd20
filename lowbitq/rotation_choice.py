"""A rotation for each input of a model's layers, chosen by the error that it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.calibration import Progress, Stream, reporter
from lowbitq.copies import LayerInputs
from lowbitq.encoding import check_plan, encode
from lowbitq.formats import Format
from lowbitq.linears import Activation, Linear
from lowbitq.models.decoder import Model
from lowbitq.models.finite import check_finite
from lowbitq.models.rotating import rotate_inputs
from lowbitq.models.slots import TAPS, name_in_block
from lowbitq.models.tokens import check_count
from lowbitq.plans import LayerPlan
from lowbitq.procrustes import optimize_rotation
from lowbitq.rotations import Rotation
from lowbitq.texts import Text, windows

Array = NDArray[np.float32]

KINDS = ("none", "hadamard", "orthogonal", "optimized")
_NORMS = {"qkv": "attention_norm", "mlp": "mlp_norm"}


def residual_inputs(
    model: Model,
    text: Text,
    *,
    samples: int = 8,
    window: int = 512,
    seed: int = 0,
    most: int = 16384,
) -> Array:
    """Sample the normalised residual stream, which a model's rotation turns.

    Parameters
    ----------
    model : Model
        In float32, not rotated.
    text, samples, window, seed
        As for `lowbitq.texts.windows`; `seed` also draws the tokens.
    most : int, default=16384
        Expected number of tokens to return, drawn evenly from all blocks and windows.

    Returns
    -------
    ndarray of shape (about most, hidden), float32
        Inputs of q, k, v and of gate and up, before the gains of the norms: what
        `optimize_rotation` takes to find a rotation for `rotate`.

    Raises
    ------
    ValueError
        If the model is not finite or is rotated, a gain is 0, or text and `window` do not fit.

    Examples
    --------
    >>> found = optimize_rotation(residual_inputs(model, "text.txt"))  # doctest: +SKIP
    >>> turned = rotate(model, found.rotation)  # doctest: +SKIP
    >>> small = compress(turned, "int4g64 a4", rotation="none")  # doctest: +SKIP
    """
    check_count("most", most, 1)
    check_finite(model)
    if model.residual_rotation is not None:
        raise ValueError("model is rotated already, expected the original")
    tokens = windows(
        model.tokenizer, text, samples=samples, window=window, seed=seed, config=model.config
    )
    rng = np.random.default_rng(seed)
    share = most / (2 * len(model.blocks) * tokens.size)
    kept = []
    stream = Stream(model, tokens)
    for index in stream:
        for taps in stream.taps(advance=True):
            for tap, norm in _NORMS.items():
                gain = getattr(model.blocks[index], norm)
                if gain is not None and not gain.all():
                    raise ValueError(f"{norm} of block {index} has gains of 0")
                rows = taps[tap][rng.random(tokens.shape[1]) < share]
                kept.append(rows if gain is None else rows / gain)
    return np.concatenate(kept)


@dataclass(frozen=True, eq=False)
class ChosenRotations:
    """What `choose_rotations` found.

    Attributes
    ----------
    rotations : dict of str to Rotation or None
        The best one by layer, for `rotate_inputs`.
    kinds : dict of str to str
        Its kind by layer.
    errors : dict of str to dict of str to float
        Squared error of a layer's outputs over their squares, by layer and kind.
    """

    rotations: dict[str, Rotation | None]
    kinds: dict[str, str]
    errors: dict[str, dict[str, float]]

    def apply(self, model: Model) -> Model:
        """Return the model with these rotations; `compress` it with ``rotation="none"``."""
        return rotate_inputs(model, self.rotations)

    def __str__(self) -> str:
        """The sum of all errors: by kind, and as chosen."""
        lines = ["sum over layers of relative squared errors of outputs"]
        for kind in next(iter(self.errors.values())):
            lines.append(f"{kind:10} {sum(found[kind] for found in self.errors.values()):.4g}")
        chosen = sum(self.errors[name][kind] for name, kind in self.kinds.items())
        return "\n".join([*lines, f"{'chosen':10} {chosen:.4g}"])


def choose_rotations(
    model: Model,
    text: Text,
    plan: LayerPlan | Format | str | Mapping[str, LayerPlan | Format | str],
    *,
    kinds: Sequence[str] = ("none", "hadamard"),
    samples: int = 8,
    window: int = 512,
    seed: int = 0,
    progress: bool | Progress = False,
) -> ChosenRotations:
    """Choose how the inputs of each layer are rotated as the model runs, by measured errors.

    For each input of a block, each kind of rotation is tried: the layers that read it are quantized
    in that rotation and run on the inputs, rounded as the plan says. The kind with the smallest sum
    of relative squared errors of their outputs is chosen; layers with the same input share it.

    Parameters
    ----------
    model : Model
        In float32; its layers do not rotate their inputs yet.
    text, samples, window, seed
        As for `lowbitq.texts.windows`; `seed` is also that of the rotations.
    plan : LayerPlan, Format or str, or mapping from layer names to these
        How layers are quantized, such as ``"int3g64 a4"``.
    kinds : sequence of {"none", "hadamard", "orthogonal", "optimized"}
        What is tried; default: none and Hadamard. The last two store n^2 numbers for an input of n
        columns and multiply by them.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the number of finished blocks
        and of all blocks.

    Returns
    -------
    ChosenRotations

    Raises
    ------
    ValueError
        If a kind is unknown, the plan does not fit a layer, a layer rotates its input already or is
        quantized, or the model or text does not fit, as for `calibrate`.

    Examples
    --------
    >>> found = choose_rotations(model, "text.txt", "int3g64 a4")  # doctest: +SKIP
    >>> small = compress(found.apply(model), "int3g64 a4", rotation="none")  # doctest: +SKIP
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds is {list(kinds)}, expected one or several different ones")
    plans = _plans(model, plan)
    check_finite(model)
    tokens = windows(
        model.tokenizer, text, samples=samples, window=window, seed=seed, config=model.config
    )
    result = ChosenRotations({}, {}, {})
    report = reporter(progress, len(model.blocks), title="rotations", unit="block")
    stream = Stream(model, tokens)
    for index in range(len(model.blocks)):
        inputs = _inputs(stream)
        for number, (tap, slots) in enumerate(TAPS.items()):
            names = [name_in_block(index, slot) for slot in slots]
            layers = [model.blocks[index].linears[slot.name] for slot in slots]
            made: dict[str, Rotation | None] = {}
            errors: dict[str, list[float]] = {}
            for kind in kinds:
                how = plans[names[0]].copies[0]
                stream_number = len(TAPS) * index + number
                made[kind] = _rotation(kind, inputs[tap], how, seed, stream_number)
                errors[kind] = [
                    _error(linear, made[kind], inputs[tap], plans[name])
                    for name, linear in zip(names, layers, strict=True)
                ]
            best = min(kinds, key=lambda kind: sum(errors[kind]))
            for place, name in enumerate(names):
                result.rotations[name], result.kinds[name] = made[best], best
                result.errors[name] = {kind: errors[kind][place] for kind in kinds}
        report(index + 1, len(model.blocks))
    return result


def _plans(model: Model, plan: Any) -> dict[str, LayerPlan]:
    given = plan if isinstance(plan, Mapping) else dict.fromkeys(dict(model.linears()), plan)
    plans = {}
    for name, linear in model.linears():
        if not isinstance(linear, Linear) or linear.rotation is not None:
            raise ValueError(f"{name} is quantized or rotates its input already")
        if name not in given:
            raise ValueError(f"plan has no layer {name!r}")
        plans[name] = LayerPlan.parse(given[name])
        check_plan(plans[name], linear.shape, name)
    return plans


def _inputs(stream: Stream) -> dict[str, Array]:
    """Take the windows past a block; return the inputs of its layers by tap."""
    kept: dict[str, list[Array]] = {tap: [] for tap in TAPS}
    for taps in stream.taps(advance=True):
        for tap, x in taps.items():
            kept[tap].append(x.copy())
    return {tap: np.concatenate(parts) for tap, parts in kept.items()}


def _rotation(kind: str, inputs: Array, how: Any, seed: int, stream: int) -> Rotation | None:
    n = inputs.shape[1]
    if kind == "none":
        return None
    if kind != "optimized":
        return Rotation(n, kind, seed, stream=stream)
    start, bits = Rotation(n, seed=seed, stream=stream), how.activation_bits or 4
    cut = len(inputs) * 3 // 4
    found = optimize_rotation(
        inputs[:cut],
        start=start,
        activation=Activation(bits),
        group=Format.parse(how.format).group,
        rounds=20,
        held_out=inputs[cut:],
    )
    return found.rotation


def _error(linear: Any, rotation: Rotation | None, inputs: Array, plan: LayerPlan) -> float:
    """Return the relative squared error of a quantized layer's outputs on some inputs."""
    turned, seen = linear, inputs
    if rotation is not None:
        turned = linear.replace(weight=rotation.apply(linear.weight), rotation=rotation)
        seen = np.ascontiguousarray(rotation.apply(inputs))
    hessian = np.zeros((inputs.shape[1], inputs.shape[1]))
    if plan.rounding.method != "rtn":
        _core.hessian_add(seen, None, hessian)
    layer, _ = encode(turned, LayerInputs(hessian), plan)
    y = linear.forward(inputs).astype(np.float64)
    whole = np.square(y).sum()
    return float(np.square(layer.forward(inputs) - y).sum() / whole) if whole else 0.0
