"""Watching activations as a model runs, and switching copies of layers on when they change."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq.calibration import Progress, reporter
from lowbitq.models.decoder import Cache, Model
from lowbitq.models.finite import check_finite
from lowbitq.models.slots import TAPS, name_in_block
from lowbitq.texts import Text, windows

Float64 = NDArray[np.float64]

# The parts of a moment in memory: see csrc/transformer/moments.h.
_THRESHOLD, _COUNT, _ABOVE, _SUM, _LARGEST = range(5)
FEATURES = ("mean", "largest")
# Spread of a feature, a logarithm, below which changes are rounding.
_LEAST_SPREAD = 1e-3


class Moments:
    """What passes through a model: magnitudes of the inputs of its layers, by block and input.

    The first token of a text is left out: all later ones attend to it by massive activations, which
    would hide others.

    Parameters
    ----------
    blocks : int
        Number of blocks of the model.
    thresholds : array_like of shape (blocks, 4), default=inf
        Magnitudes above them are counted.

    Attributes
    ----------
    values : ndarray of shape (blocks, 4, 5), float64
        What `Model.hidden`, `logits` and `step` add to, given as ``moments=values``: for the inputs
        of q, k, v; o; gate, up; down the threshold, count, count above it, sum and maximum.

    Examples
    --------
    >>> moments = Moments(model.config.layers)  # doctest: +SKIP
    >>> hidden = model.hidden(tokens, moments=moments.values)  # doctest: +SKIP
    >>> moments.ratio.max()  # doctest: +SKIP
    """

    def __init__(self, blocks: int, thresholds: ArrayLike = np.inf) -> None:
        self.values = np.zeros((blocks, len(TAPS), 5))
        self.values[:, :, _THRESHOLD] = thresholds

    def clear(self) -> None:
        """Begin again; thresholds stay."""
        self.values[:, :, _COUNT:] = 0

    def add(self, other: Moments) -> None:
        """Add what another one has counted with the same thresholds."""
        self.values[:, :, _COUNT:_LARGEST] += other.values[:, :, _COUNT:_LARGEST]
        largest = self.values[:, :, _LARGEST]
        np.maximum(largest, other.values[:, :, _LARGEST], out=largest)

    @property
    def count(self) -> NDArray[np.int64]:
        """Numbers seen, (blocks, 4)."""
        return self.values[:, :, _COUNT].astype(np.int64)

    @property
    def above(self) -> NDArray[np.int64]:
        """Numbers whose magnitude exceeds the threshold, (blocks, 4)."""
        return self.values[:, :, _ABOVE].astype(np.int64)

    @property
    def mean(self) -> Float64:
        """Mean magnitude, (blocks, 4); 0 where nothing was seen."""
        return self.values[:, :, _SUM] / np.maximum(self.values[:, :, _COUNT], 1)

    @property
    def largest(self) -> Float64:
        """Maximum magnitude, (blocks, 4)."""
        return self.values[:, :, _LARGEST].copy()

    @property
    def ratio(self) -> Float64:
        """`largest` over `mean`, (blocks, 4); 0 where nothing was seen."""
        return np.divide(self.largest, self.mean, out=np.zeros_like(self.mean), where=self.mean > 0)

    def features(self) -> Float64:
        """Logarithms of `mean` and `largest`, (2, blocks, 4), for a `Detector`."""
        return np.log(np.maximum([self.mean, self.largest], 1e-30))


@dataclass(frozen=True, eq=False)
class Normal:
    """What activations of a model are like on text of the intended use; from `learn_normal`.

    Attributes
    ----------
    tokens : int
        How many tokens are looked at together.
    thresholds : ndarray of shape (blocks, 4), float64
        For `Moments`: magnitudes that count as massive.
    center, spread : ndarray of shape (2, blocks, 4), float64
        Mean and standard deviation of `Moments.features`.
    high, low : float
        Scores at which a `Detector` raises its alarm, and ends it.
    smoothing : float
        Weight of the last look in the moving average.
    """

    tokens: int
    thresholds: Float64 = field(repr=False)
    center: Float64 = field(repr=False)
    spread: Float64 = field(repr=False)
    high: float
    low: float
    smoothing: float


def learn_normal(
    model: Model,
    text: Text,
    *,
    samples: int = 64,
    window: int = 256,
    seed: int = 0,
    massive: float = 100.0,
    smoothing: float = 0.5,
    false_alarms: float = 1e-4,
    progress: bool | Progress = False,
) -> Normal:
    """Run a model on ordinary text and learn what to expect of its activations.

    Parameters
    ----------
    model : Model
    text, samples, window, seed
        As for `lowbitq.texts.windows`. A window is one look of a `Detector`.
    massive : float, default=100
        Magnitudes above this multiple of the mean are counted; see `Moments.above`.
    smoothing : float, default=0.5
        Weight of the last look in the moving average of a `Detector`, above 0 to 1.
    false_alarms : float, default=1e-4
        Share of looks at ordinary text that may raise an alarm. It is extrapolated: the score is
        the largest of many, whose distribution in the tail is Gumbel's, here through its median and
        its 0.9 quantile. The alarm ends at the 0.9 quantile.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the number of finished
        windows and of all windows.

    Returns
    -------
    Normal

    Raises
    ------
    ValueError
        If there are fewer than 8 windows, the model is not finite, text and `window` do not fit the
        model, or an option is out of range.

    Examples
    --------
    >>> normal = learn_normal(model, "text.txt")  # doctest: +SKIP
    """
    for name, value in (("smoothing", smoothing), ("false_alarms", false_alarms)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, expected above 0, at most 1")
    if not massive > 0:
        raise ValueError(f"massive is {massive}, expected a positive number")
    check_finite(model)
    tokens = windows(
        model.tokenizer, text, samples=samples, window=window, seed=seed, config=model.config
    )
    if len(tokens) < 8:
        raise ValueError(f"there are {len(tokens)} windows of text, expected at least 8")
    report = reporter(progress, len(tokens), title="monitor", unit="window")
    seen, whole = [], Moments(len(model.blocks))
    for number, row in enumerate(tokens):
        one = Moments(len(model.blocks))
        model.hidden(row, moments=one.values)
        seen.append(one.features())
        whole.add(one)
        report(number + 1, len(tokens))
    features = np.array(seen)
    middle, high = _levels(features, smoothing, false_alarms)
    center, spread = _center_and_spread(features)
    return Normal(
        tokens.shape[1], massive * whole.mean, center, spread, high, middle, float(smoothing)
    )


def _center_and_spread(features: Float64) -> tuple[Float64, Float64]:
    spread = np.maximum(features.std(axis=0, ddof=1), _LEAST_SPREAD)
    return features.mean(axis=0), np.asarray(spread)


def _levels(features: Float64, smoothing: float, false_alarms: float) -> tuple[float, float]:
    """Return the scores that end and raise an alarm, from looks at ordinary text.

    Each half of the looks is scored by what the other half is like: a sample seems less unusual to
    its own mean and deviation.
    """
    scores: list[float] = []
    halves = np.array_split(features, 2)
    for half, other in (halves, halves[::-1]):
        average, expected = _Average(smoothing), _center_and_spread(other)
        scores += [float(average.update(look, *expected).max()) for look in half]
    median, upper = np.quantile(scores, [0.5, 0.9])
    unit, start = -math.log(-math.log(0.9)), -math.log(math.log(2))
    width = max((upper - median) / (unit - start), 1e-3)
    share = min(false_alarms, 0.5)
    high = median + width * (-math.log(-math.log1p(-share)) - start)
    return float(upper), max(float(high), 1.1 * float(upper))


class _Average:
    """Exponentially weighted moving averages of standardised features, in their own deviations."""

    def __init__(self, smoothing: float) -> None:
        self._weight, self._looks = smoothing, 0
        self._average: Float64 | float = 0.0

    def update(self, features: Float64, center: Float64, spread: Float64) -> Float64:
        """Return scores (2, blocks, 4): deviations of the means to both sides, rises of maxima."""
        a = self._weight
        z = (features - center) / spread
        self._average = self._average + a * (z - self._average)
        self._looks += 1
        variance = a / (2 - a) * (1 - (1 - a) ** (2 * self._looks))
        score = np.asarray(self._average / math.sqrt(variance))
        score[0] = abs(score[0])
        return score


class Detector:
    """Tells when activations are no longer like those of ordinary text.

    Each look standardises mean and maximum of the magnitudes of every input, smooths them over
    looks and scores them in their deviations. An alarm is raised when the largest score exceeds
    `Normal.high`, and ends when it falls below `Normal.low`.

    Parameters
    ----------
    normal : Normal

    Attributes
    ----------
    on : bool
        Whether there is an alarm.
    score : float
        Largest score of the last look; 0 before the first.
    scores : ndarray of shape (2, blocks, 4)
        All scores of the last look, those of mean and of maximum.

    References
    ----------
    S. W. Roberts, "Control Chart Tests Based on Geometric Moving Averages", Technometrics 1, 1959.

    Examples
    --------
    >>> normal = Normal(64, np.ones((1, 4)), np.zeros((2, 1, 4)), np.ones((2, 1, 4)), 4.0, 2.0, 0.5)
    >>> detector = Detector(normal)
    >>> moments = Moments(1)
    >>> moments.values[..., 1:] = 64, 0, 64 * 20, 20  # a mean of 20 instead of 1
    >>> detector.update(moments)
    False
    >>> detector.update(moments)
    True
    """

    def __init__(self, normal: Normal) -> None:
        self.normal, self.on, self.score = normal, False, 0.0
        self.scores = np.zeros_like(normal.center)
        self._average = _Average(normal.smoothing)

    def update(self, moments: Moments, normal: Normal | None = None) -> bool:
        """Take a look; return `on`.

        Parameters
        ----------
        moments : Moments
            Of about ``normal.tokens`` tokens.
        normal : Normal, default=None
            Whose center and spread to expect, if the moments are of another model. None: the
            detector's.
        """
        expected = normal or self.normal
        features = moments.features()
        self.scores = self._average.update(features, expected.center, expected.spread)
        self.score = float(self.scores.max())
        self.on = self.score > (self.normal.low if self.on else self.normal.high)
        return self.on

    def layers(self) -> list[str]:
        """Return the layers whose inputs exceed `Normal.low`, one for each input, worst first."""
        scores = self.scores.max(axis=0)
        taps = list(TAPS.values())
        places = [(b, t) for b, t in np.argwhere(scores > self.normal.low).tolist()]
        places.sort(key=lambda place: -scores[place])
        return [name_in_block(block, taps[tap][0]) for block, tap in places]


@dataclass(frozen=True)
class Look:
    """One look of an `OnlineModel` at its activations.

    Attributes
    ----------
    tokens : int
        How many were run for it.
    score : float
        The detector's.
    on : bool
        Whether copies are on after it.
    """

    tokens: int
    score: float
    on: bool


class OnlineModel:
    """A model that switches copies of its layers on when its activations become unusual.

    It runs one of two models that share all layers they have in common, so nothing is loaded or
    computed to switch; the output while on is that of the second model, bit by bit. Whether copies
    are on changes between calls, never within one. Threads may share an OnlineModel: they run at
    the same time and take looks in turns.

    Parameters
    ----------
    off, on : Model
        Without and with further copies, otherwise equal, such as ``small.with_copies(1)`` and
        ``small``.
    normal, normal_on : Normal
        Of `off` and of `on`, from `learn_normal`; levels and smoothing are those of the first. None
        for the second: the same.

    Attributes
    ----------
    detector : Detector
    looks : list of Look
        All looks so far.

    Raises
    ------
    ValueError
        If the models have different configurations, or `normal` is of another number of blocks.

    Notes
    -----
    SmolLM2 in int4g64 with a residual copy of the same format, rounded to nearest, on a stream of
    windows of 128 tokens, in nats per token. `learn_normal` saw 32 other windows of WikiText. In
    WikiText the copies were on only while an alarm ended:

    ==================  =====  =====  =======  =====  ========
    text                count    off  dynamic     on  share on
    ==================  =====  =====  =======  =====  ========
    WikiText               26  4.558    4.491  3.926      0.12
    Python                  6  4.138    3.725  3.554      0.67
    random tokens           6  14.53    14.20  14.11      0.83
    ==================  =====  =====  =======  =====  ========

    Examples
    --------
    >>> small = compress(model, "int3g64 + int3g64 residual")  # doctest: +SKIP
    >>> pair = small.with_copies(1), small  # doctest: +SKIP
    >>> normals = [learn_normal(one, "text.txt") for one in pair]  # doctest: +SKIP
    >>> online = OnlineModel(*pair, *normals)  # doctest: +SKIP
    >>> online.hidden(tokens), online.is_on  # doctest: +SKIP
    """

    def __init__(
        self, off: Model, on: Model, normal: Normal, normal_on: Normal | None = None
    ) -> None:
        if off.config != on.config:
            raise ValueError("off and on have different configurations, expected equal ones")
        if normal.thresholds.shape[0] != len(off.blocks):
            raise ValueError(
                f"normal is of {normal.thresholds.shape[0]} blocks, the models have "
                f"{len(off.blocks)}"
            )
        self._models, self._normals = (off, on), (normal, normal_on or normal)
        self.detector = Detector(normal)
        self.looks: list[Look] = []
        self._forced: bool | None = None
        self._pending, self._tokens = self._moments(), 0
        self._lock = threading.Lock()
        for model in self._models:
            _ = model.handle  # made here, so that no call pays for it

    def _moments(self) -> Moments:
        normal = self.detector.normal
        return Moments(len(normal.thresholds), normal.thresholds)

    @property
    def is_on(self) -> bool:
        """Whether the next call runs with copies."""
        return self.detector.on if self._forced is None else self._forced

    @property
    def switches(self) -> int:
        """How often the looks switched copies on or off."""
        states = [False, *(look.on for look in self.looks)]
        return sum(a != b for a, b in pairwise(states))

    def force(self, on: bool | None) -> None:
        """Switch copies on or off from now on, or with None by the detector again."""
        with self._lock:
            self._forced = on
            self._pending.clear()
            self._tokens = 0

    @property
    def model(self) -> Model:
        """The model that the next call runs."""
        return self._models[self.is_on]

    @property
    def config(self) -> Any:
        """Configuration of both models."""
        return self._models[0].config

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of both models."""
        return self._models[0].tokenizer

    def hidden(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Return the input of the head; see `Model.hidden`."""
        moments, on = self._moments(), self.is_on
        result = self._models[on].hidden(tokens, moments=moments.values)
        self._look(moments, len(result), on)
        return result

    def logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Run the whole network; see `Model.logits`."""
        moments, on = self._moments(), self.is_on
        result = self._models[on].logits(tokens, moments=moments.values)
        self._look(moments, len(result), on)
        return result

    def head_logits(
        self, hidden: NDArray[np.float32], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return the logits of tokens; see `Model.head_logits`."""
        return self.model.head_logits(hidden, out)

    def new_cache(self, capacity: int, *, bits: int = 32) -> Cache:
        """Return an empty cache, which both models continue; see `Model.new_cache`."""
        return self._models[0].new_cache(capacity, bits=bits)

    def step(self, tokens: ArrayLike, cache: Cache) -> NDArray[np.float32]:
        """Run the network on tokens that follow those in the cache; see `Model.step`."""
        moments, on, before = self._moments(), self.is_on, cache.length
        model = self._models[on]
        cache.decoder = model.handle
        result = model.step(tokens, cache, moments=moments.values)
        self._look(moments, cache.length - before, on)
        return result

    def _look(self, moments: Moments, tokens: int, on: bool) -> None:
        """Add what a call has seen; take a look once there are enough tokens.

        A look is at one model: calls that another thread has overtaken by a switch are left out.
        """
        with self._lock:
            if on != self.is_on:
                return
            self._pending.add(moments)
            self._tokens += tokens
            if self._tokens < self.detector.normal.tokens:
                return
            self.detector.update(self._pending, self._normals[on])
            self.looks.append(Look(self._tokens, self.detector.score, self.is_on))
            self._pending.clear()
            self._tokens = 0
