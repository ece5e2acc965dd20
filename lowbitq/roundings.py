"""Roundings that learn: numbers that training moves choose the words of a layer.

| method | a weight in training | what learns |
| --- | --- | --- |
| nearest | the level nearest to its latent weight | the latent weight, in steps of the grid |
| gradual | the same, in a share that rises from 0 to 1 | the same |
| soft | between two levels, by AdaRound's sigmoid | V, which decides for one of them |
| gumbel | the same, by a random sample of low temperature | V |

In the end each weight has the word of a level, for which only codes whose words are levels will do.
Training starts where a float model is rounded to the words that the quantized model has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gptq import product
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.rotating import rotate
from lowbitq.tensors import QuantizedTensor

Array = NDArray[np.float32]

METHODS = ("nearest", "gradual", "soft", "gumbel")
TWO_SIDED = "kmeans2"  # the code of four levels that learn
GRIDS = frozenset(("scale", "offset", "level"))  # kinds of parameters that make up a quantizer

# Parts of a run at which the rounded share begins to rise, is 1, and quantizers freeze.
GRADUAL_FROM, GRADUAL_TO, FROZEN_FROM = 0.1, 0.5, 0.9
# As csrc/gptq/adaround.c: without penalty at first; then the exponent falls, and stays.
FREE_PART, FALLING_PART, HIGH_BETA, LOW_BETA = 0.2, 0.7, 20.0, 2.0
HOT = 1.0  # the first temperature
# Two levels are one step apart, and V by some 5. A random model of three blocks in int2g32 came
# nearest to its blocks at rates of 0.02 steps for latent weights, and 0.2 to 0.4 for V.
PACE_OF_V = 10.0
# Options of _core.soft_compose that leave nothing soft.
_SETTLED: dict[str, Any] = {"sampled": True, "temperature": 0.0, "noise": 0.0}
_SETTLED |= {"seed": 0, "stream": 0}


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes
    ----------
    step, steps : int
        The step that comes now, from 1 on, and the number of all.
    seed : int
        Of random roundings.
    """

    step: int
    steps: int
    seed: int = 0

    @property
    def part(self) -> float:
        """Part of the run that is done, from 0 in the first step to 1 in the last."""
        return (self.step - 1) / max(self.steps - 1, 1)


@dataclass(frozen=True)
class LearnedRounding:
    """How words follow from what is learned, and how gradients find their way back.

    Parameters
    ----------
    method : {"nearest", "gradual", "soft", "gumbel"}, default="nearest"
        ``"nearest"``: forward the nearest level; backward, rounding is the identity.
        ``"gradual"``: that in a share of the weight which is 0 in the first tenth of the run and 1
        from half of it on; scales, offsets and levels stay as they are in the last tenth.
        ``"soft"``: AdaRound. ``"gumbel"``: Gumbel-softmax over the two levels around the weight.
    clipped : bool, default=True
        For the first two: weights more than half a step beyond the outer levels, which rounding
        clips, get no gradient, as in LSQ and EfficientQAT. False: they do.
    lsq : bool, default=False
        For the first two: multiply gradients of scales by ``1 / sqrt(N Q)``, N the weights of a
        scale, Q half the width of the grid in steps. Adam's steps do not depend on such factors,
        except where the gradient's norm is clipped.
    strength : float, default=10.0
        For ``"soft"``: the penalty on undecided weights, in units of the root mean square gradient
        of each layer's V.
    temperature : float, default=0.1
        For ``"gumbel"``: the last one; the first is 1, and they fall in proportion.

    Raises
    ------
    ValueError
        If a field is out of range.

    References
    ----------
    S. Esser et al., "Learned Step Size Quantization", 2020, section 2.2. M. Chen et al.,
    "EfficientQAT", 2024, section 3.2. M. Nagel et al., "Up or down?", 2020. E. Jang, S. Gu,
    B. Poole, "Categorical reparameterization with Gumbel-softmax", 2017.

    Examples
    --------
    >>> LearnedRounding.parse("soft strength 2")
    LearnedRounding(method='soft', clipped=True, lsq=False, strength=2.0, temperature=0.1)
    >>> str(LearnedRounding("nearest", clipped=False))
    'nearest unclipped'
    """

    method: str = "nearest"
    clipped: bool = True
    lsq: bool = False
    strength: float = 10.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"rounding is {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 0 <= self.strength <= 1e6:
            raise ValueError(f"strength is {self.strength}, expected 0 to 1e6")
        if not 0 < self.temperature <= HOT:
            raise ValueError(f"temperature is {self.temperature}, expected above 0, at most {HOT}")

    @classmethod
    def parse(cls, text: LearnedRounding | str) -> LearnedRounding:
        """Read a rounding from its text: a method, then options; see the examples."""
        if isinstance(text, LearnedRounding):
            return text
        method, *words = text.split() or [""]
        options: dict[str, Any] = {}
        while words:
            word = words.pop(0)
            if word in ("unclipped", "lsq"):
                options |= {"clipped": False} if word == "unclipped" else {"lsq": True}
                continue
            try:
                options[{"strength": "strength", "temperature": "temperature"}[word]] = float(
                    words.pop(0)
                )
            except (KeyError, IndexError, ValueError):
                raise ValueError(
                    f"rounding is {text!r}, expected one of {', '.join(METHODS)}, then "
                    "'unclipped', 'lsq', 'strength' or 'temperature' and a number"
                ) from None
        return cls(method, **options)

    def __str__(self) -> str:
        words = [self.method]
        words += [] if self.clipped else ["unclipped"]
        words += ["lsq"] if self.lsq else []
        for name in ("strength", "temperature"):
            value = getattr(self, name)
            words += [] if value == getattr(type(self), name) else [f"{name} {value!r}"]
        return " ".join(words)

    @property
    def softens(self) -> bool:
        """Whether weights lie between two levels until the end."""
        return self.method in ("soft", "gumbel")

    def share(self, at: Progress | None) -> float:
        """Return the share of the rounded weight."""
        if at is None or self.method != "gradual":
            return 1.0
        return min(max((at.part - GRADUAL_FROM) / (GRADUAL_TO - GRADUAL_FROM), 0.0), 1.0)

    def frozen(self, at: Progress) -> frozenset[str]:
        """Return the kinds of parameters that do not learn now."""
        return GRIDS if self.method == "gradual" and at.part >= FROZEN_FROM else frozenset()

    def beta(self, at: Progress) -> float | None:
        """Return the exponent of the penalty; None: no penalty yet."""
        if self.method != "soft" or at.part < FREE_PART:
            return None
        part = min((at.part - FREE_PART) / (1 - FREE_PART) / FALLING_PART, 1.0)
        return LOW_BETA + (HIGH_BETA - LOW_BETA) * (1 - part)

    def softness(self, at: Progress | None, layer: int) -> dict[str, Any]:
        """Return the options of `_core.soft_compose` for a layer, by its number."""
        if at is None:
            return _SETTLED
        if self.method == "soft":
            return _SETTLED | {"sampled": False}
        hot = HOT * (self.temperature / HOT) ** at.part
        stream = at.step << 20 | layer
        return _SETTLED | {"temperature": hot, "noise": 1.0, "seed": at.seed, "stream": stream}


class Latents:
    """What learns in place of a layer's words.

    Parameters
    ----------
    name : str
        Of the layer, for messages.
    tensor : QuantizedTensor
        Its words, scales and offsets at the start.
    code : capsule
        Of `tensor`, with the levels as they are at the time of a call.
    rounding : LearnedRounding
    weight : ndarray of shape (rows, cols), float32, or None, default=None
        What was rounded to these words; None: what they stand for.
    number : int, default=0
        Of the layer, for random numbers of its own.

    Attributes
    ----------
    value : ndarray of shape (rows, cols), float32
        Latent weights in steps of their group's grid at the start; or V.
    pace : float
        How much faster it learns than a latent weight.

    Raises
    ------
    ValueError
        If the words of the tensor's code are not levels.
    """

    def __init__(
        self,
        name: str,
        tensor: QuantizedTensor,
        code: Any,
        rounding: LearnedRounding,
        weight: Array | None = None,
        *,
        number: int = 0,
    ) -> None:
        format = tensor.format
        if not format.ordered:
            raise ValueError(
                f"{name} has format {format}, whose words are chosen together: weights learn only "
                "in codes of one level a word, such as int, ternary or kmeans"
            )
        self.rounding, self._code, self._number = rounding, code, number
        self.pace = PACE_OF_V if rounding.softens else 1.0
        self._group = format.group or max(tensor.cols, 1)
        self._count = min(self._group, tensor.cols) * (tensor.rows if format.per_tensor else 1)
        self._width = format.level_count - 1
        span = self._width if tensor.levels is None else float(np.ptp(tensor.levels))
        scale, offset = tensor.scale, tensor.offset if format.has_offsets else None
        self._unit = scale * np.float32(span / self._width)
        self.value = np.empty(tensor.shape, np.float32)
        self._lower = np.empty(tensor.shape, np.uint8) if rounding.softens else None
        start = tensor.dequantize() if weight is None else np.ascontiguousarray(weight, np.float32)
        words, group = tensor.codes, self._group
        if self._lower is None:
            unit = self._unit
            _core.latent_start(code, start, words, scale, offset, unit, self.value, group=group)
        else:
            arrays = (start, words, scale, offset, self.value, self._lower)
            _core.soft_bracket(code, *arrays, group=group, sampled=rounding.method == "gumbel")
        self._at: Progress | None = None

    def compose(
        self, scale: Array, offset: Array | None, weight: Array, at: Progress | None
    ) -> None:
        """Write the weights (rows, cols) as they are now; None: as they are in the end."""
        self._at = at
        if self._lower is None:
            share = self.rounding.share(at)
            self._call("latent_compose", scale, offset, weight, share=share)
        else:
            soft = self.rounding.softness(at, self._number)
            self._call("soft_compose", scale, offset, weight, **soft)

    def pull(
        self,
        scale: Array,
        offset: Array | None,
        dweight: Array,
        gradient: Array,
        dscale: Array,
        doffset: Array | None,
        dlevels: Array | None,
    ) -> None:
        """Take the gradient by what `compose` wrote last to `gradient`, which is added to, and to
        scales, offsets (rows, groups) and levels, which are set."""
        rounding, at = self.rounding, self._at
        found = (dweight, gradient, dscale, doffset, dlevels)
        if self._lower is not None:
            soft = rounding.softness(at, self._number)
            self._call("soft_gradient", scale, offset, *found, **soft)
            beta = None if at is None else rounding.beta(at)
            if beta is not None:
                _core.soft_penalty(self.value, gradient, strength=rounding.strength, beta=beta)
            return
        options = {"share": rounding.share(at), "clipped": rounding.clipped}
        self._call("latent_gradient", scale, offset, *found, **options)
        if rounding.lsq:
            dscale *= np.float32((self._count * self._width / 2) ** -0.5)

    def words(self, scale: Array, offset: Array | None) -> NDArray[np.uint8]:
        """Return the words (rows, cols) that the weights have in the end."""
        words = np.empty(self.value.shape, np.uint8)
        if self._lower is None:
            self._call("latent_words", scale, offset, words)
        else:
            _core.soft_words(self.value, self._lower, words)
        return words

    def _call(
        self, name: str, scale: Array, offset: Array | None, *arrays: Any, **options: Any
    ) -> None:
        """Call a function of _core on these weights."""
        given: list[Any] = [self._code, self.value, scale, offset, self._unit]
        if self._lower is not None:
            given = [self._code, self.value, self._lower, scale, offset]
        getattr(_core, name)(*given, *arrays, group=self._group, **options)


def float_weights(
    quantized: QuantizedModel, teacher: Model | None
) -> Callable[[str, QuantizedLinear], Array | None]:
    """Return a function that finds the float weights which a layer's words were made for.

    Parameters
    ----------
    quantized : QuantizedModel
        As `compress` makes it: its plan knows the rotations of the model.
    teacher : Model or None
        The float model that it was made of. None: nothing is found.

    Returns
    -------
    callable
        From the name of a layer and the layer to an ndarray of shape (rows, cols), float32: the
        weights as the layer's rotation sees them, less its adapter. None for layers that `compress`
        does not make: with fusion weights, or rotations that the plan does not have.
    """
    if teacher is None or quantized.plan is None:
        return lambda name, layer: None
    plan = quantized.plan
    source = rotate(teacher, plan.rotation, plan.seed)
    if repr(source.residual_rotation) != repr(quantized.residual_rotation):
        return lambda name, layer: None
    floats: dict[str, Any] = dict(source.linears())

    def find(name: str, layer: QuantizedLinear) -> Array | None:
        [copy], known = layer.copies, floats[name]
        assert isinstance(known, Linear)
        if copy.weight is not None or copy.output_rotation is not None:
            return None
        if repr(copy.rotation) != repr(known.rotation) or known.shape != layer.shape:
            return None
        if layer.adapter is None:
            return known.weight
        U, V = layer.adapter
        turned = known.rotate_input(np.ascontiguousarray(V.T)).T
        wide = (np.ascontiguousarray(x, np.float64) for x in (U, turned))
        return np.ascontiguousarray(known.weight - product(*wide), np.float32)

    return find


def two_sided(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return a ternary matrix in the form that can learn two scales, as TTQ does.

    Its words stand for a table -1, 0, 0, 1: training of ``"level"`` moves the outer levels apart
    from each other, and a level of 0 stays. Values and bits per weight are those of `tensor`, but
    for the 16 bytes of the table.

    Parameters
    ----------
    tensor : QuantizedTensor
        Of a code of three levels.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    ValueError
        If the code has not three levels.

    References
    ----------
    C. Zhu, S. Han, H. Mao, W. Dally, "Trained ternary quantization", 2017, equations 6 to 8. Its
    thresholds are a fixed part of the largest weight; here they are halfway between levels.

    Examples
    --------
    >>> from lowbitq import quantize
    >>> ternary = quantize(np.array([[-2.0, 0.1, 2.0]], np.float32), "ternary")
    >>> two_sided(ternary).dequantize()
    array([[-2.,  0.,  2.]], dtype=float32)
    """
    if tensor.format.level_count != 3:
        raise ValueError(f"tensor has format {tensor.format}, expected a ternary one")
    return QuantizedTensor.pack(
        replace(tensor.format, code=TWO_SIDED),
        np.array([0, 1, 3], np.uint8)[tensor.codes],
        None if tensor.format.per_tensor else tensor.scale,
        levels=np.array([-1, 0, 0, 1], np.float32),
        unit=tensor.unit,
        shape=tensor.shape,
    )
