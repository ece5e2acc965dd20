"""enhance(): from a float model to the best quantized one of a size, in one call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.budgets import FORMATS, choose
from lowbitq.checkpoints.archives import digest
from lowbitq.compression import compress
from lowbitq.costs import stored_bytes
from lowbitq.distillation import distill
from lowbitq.divergences import Reference
from lowbitq.formats import Format
from lowbitq.linears import Linear
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.tokens import check_count
from lowbitq.plans import EMBEDDING, LayerPlan, Plan
from lowbitq.prices import Prices, prices
from lowbitq.search import search
from lowbitq.tables import as_html
from lowbitq.texts import Text, windows

# What a stage may fail with on inputs that the others can work with.
_FAILURES = (ArithmeticError, ImportError, MemoryError, OSError, ValueError)


@dataclass(frozen=True)
class Stage:
    """What one stage of `enhance` did.

    Attributes
    ----------
    name : str
    seconds : float
    kl : float
        Divergence of the model after it from the float model on held-back windows, in nats per
        token; NaN while there is no quantized model.
    note : str
        What was found; of a stage that was skipped or whose result was dropped, why.
    """

    name: str
    seconds: float
    kl: float
    note: str


@dataclass(frozen=True, eq=False)
class Enhanced:
    """What `enhance` made. Its str is a table of the stages.

    Attributes
    ----------
    model : QuantizedModel
    stages : tuple of Stage
    """

    model: QuantizedModel = field(repr=False)
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return bits and stages as plain numbers, for JSON."""
        stages = [asdict(one) | {"kl": None if math.isnan(one.kl) else one.kl}
                  for one in self.stages]  # fmt: skip
        return {"bits_per_weight": self.model.bits_per_weight, "stages": stages}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        rows = [{"stage": s.name, "seconds": s.seconds, "held-back KL": s.kl, "": s.note}
                for s in self.stages]  # fmt: skip
        bits = f"{self.model.bits_per_weight:.3f} bits per weight of the linear layers"
        return as_html(list(rows[0]), rows, caption=bits, bars=["seconds"])

    def _lines(self) -> Iterator[str]:
        yield f"{'stage':9} {'seconds':>8} {'held-back KL':>13}  "
        for one in self.stages:
            kl = "" if math.isnan(one.kl) else f"{one.kl:.4f}"
            yield f"{one.name:9} {one.seconds:8.0f} {kl:>13}  {one.note}"
        yield f"{self.model.bits_per_weight:.3f} bits per weight of the linear layers"


def enhance(
    model: Model,
    text: Text,
    *,
    bits: float,
    formats: Sequence[LayerPlan | Format | str] = FORMATS,
    samples: int = 32,
    window: int = 2048,
    held: int = 2,
    trials: int = 0,
    steps: int = 240,
    seconds: float | None = None,
    embedding: LayerPlan | str | None = EMBEDDING,
    seed: int = 0,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[str], object] = False,
) -> Enhanced:
    """Quantize a model as well as is known how, at no more than some bits per weight.

    The stages: price each layer in each format; plan formats, copies and ranks under the budget;
    compress with drift correction; search the parameters of copies; train scales, offsets and norms
    on the float model's predictions. A stage that fails is skipped, and one whose model is worse on
    the held-back windows is dropped; the report says why.

    Parameters
    ----------
    model : Model
        In float32. Left unchanged.
    text : str, path, sequence of str or of paths, or array_like of int
        Calibration text, as for `lowbitq.texts.windows`.
    bits : float
        Maximum of the stored bits per weight of the linear layers, everything counted.
    formats : sequence of LayerPlan, Format or str
        Candidates for every layer, as for `lowbitq.plan`.
    samples, window : int
        Number of windows to take from the text, fewer if it is short, and tokens per window.
    held : int, default=2
        How many of these windows nothing is fitted to; stages are compared on them.
    trials : int, default=0
        Of the search; 0: none.
    steps : int, default=240
        Of training, each on one window of 512 tokens; 0: none.
    seconds : float, default=None
        Time after which no further step of training begins. None: no limit.
    embedding : LayerPlan, str or None, default="int8g64"
        Plan of the embedding and the head; None: they stay as they are.
    seed : int, default=0
    work_dir : path, default=None
        Folder for what is finished. A second call with the same arguments goes on from there.
    progress : bool or callable, default=False
        True: bars. A function is called with the name of each stage as it begins.

    Returns
    -------
    Enhanced

    Raises
    ------
    ValueError
        If `bits` is too small for any of the formats, there are too few windows, or an option is
        out of range.

    Notes
    -----
    SmolLM2-135M on 32 windows of 2048 tokens, one seed: at 2.3 bits ln(perplexity / float) is 0.220
    and the divergence 0.286 nats, at 2.1 bits 0.287 and 0.351. It takes 62 minutes of one core: 11
    for prices, 14 to compress, 35 to train; and 2.7 GB.

    Examples
    --------
    >>> found = enhance(model, "train.txt", bits=2.3)  # doctest: +SKIP
    >>> print(found)  # doctest: +SKIP
    >>> found.model.save("small")  # doctest: +SKIP
    """
    check_count("held", held, 1)
    check_count("trials", trials, 0)
    check_count("steps", steps, 0)
    tokens = windows(
        model.tokenizer, text, samples=samples, window=window, seed=seed, config=model.config
    )
    if len(tokens) < held + 2:
        raise ValueError(
            f"there are {len(tokens)} windows of text, expected at least {held + 2} to hold back "
            f"{held}"
        )
    options = {"seed": seed, "embedding": embedding, "drift": True}
    run = _Run(model, tokens[:-held], tokens[-held:], options, progress)
    folder = None if work_dir is None else Path(work_dir)
    plan = run.plan(bits, formats, folder)
    small = run.compressed(plan, folder)
    if trials:
        small = run.improved("search", small, lambda: run.searched(small, trials, folder))
    if steps:
        small = run.improved("train", small, lambda: run.trained(small, steps, seconds, folder))
    return Enhanced(small, tuple(run.stages))


class _Run:
    """The stages that are done, and what all of them need."""

    def __init__(
        self,
        model: Model,
        train: NDArray[np.int32],
        held: NDArray[np.int32],
        options: dict[str, Any],
        progress: bool | Callable[[str], object],
    ) -> None:
        self.model, self.train, self.held, self.options = model, train, held, options
        self.stages: list[Stage] = []
        self._report = progress if callable(progress) else lambda name: None
        self.bars = progress is True
        self._kl = math.nan

    def plan(
        self, bits: float, formats: Sequence[LayerPlan | Format | str], folder: Path | None
    ) -> Plan:
        """Price and plan; without prices, all layers have the largest format that fits."""
        started = self._begin("plan")
        try:
            chosen = choose(self._prices(formats, folder), bits=bits)
        except _FAILURES as error:
            plan, name = self._uniform(bits, formats)
            self._end("plan", started, f"skipped, all layers {name}: {error}")
            return plan
        note = f"predicted KL {chosen.outcome.kl:.4g}"
        if (uniform := chosen.rivals["uniform"]) is not None:
            note += f", {uniform.kl:.4g} if all layers were {next(iter(uniform.layers))}"
        self._end("plan", started, note)
        return chosen

    def _prices(self, formats: Sequence[LayerPlan | Format | str], folder: Path | None) -> Prices:
        stored = None
        if folder is not None:
            arrays = {"train": self.train, "formats": np.array([str(one) for one in formats])}
            for name, linear in self.model.linears():
                assert isinstance(linear, Linear)
                arrays[name] = linear.weight
            arrays["options"] = np.array(str(self.options))
            folder.mkdir(parents=True, exist_ok=True)
            stored = folder / f"prices-{digest(arrays)[:16]}.json"
            if stored.exists():
                return Prices.load(stored)
        few = np.ascontiguousarray(self.train[:16, :512])
        found = prices(
            self.model,
            few,
            formats,
            samples=len(few),
            window=few.shape[1],
            progress=self.bars,
            **self.options,
        )
        if stored is not None:
            found.save(stored)
        return found

    def _uniform(
        self, bits: float, formats: Sequence[LayerPlan | Format | str]
    ) -> tuple[Plan, LayerPlan]:
        shapes = [linear.shape for _, linear in self.model.linears()]
        weights = sum(rows * cols for rows, cols in shapes)
        sizes = {
            layer: 8 * sum(stored_bytes(layer, shape) for shape in shapes) / weights
            for layer in map(LayerPlan.parse, formats)
        }
        fitting = {layer: size for layer, size in sizes.items() if size <= bits}
        if not fitting:
            least = min(sizes.values(), default=math.inf)
            raise ValueError(f"bits is {bits}, but the smallest candidates take {least:.6g}")
        largest = max(fitting, key=fitting.__getitem__)
        names = [name for name, _ in self.model.linears()]
        return Plan.uniform(names, largest, **self.options), largest

    def compressed(self, plan: Plan, folder: Path | None) -> QuantizedModel:
        """Quantize the model as planned."""
        started = self._begin("compress")
        blocks = None if folder is None else folder / "blocks"
        small = compress(self.model, plan, text=self.train, work_dir=blocks, progress=self.bars,
                         samples=len(self.train), window=self.train.shape[1])  # fmt: skip
        self._kl = self._divergence(small)
        self._end("compress", started, f"{small.bits_per_weight:.3f} bits per weight")
        return small

    def searched(self, small: QuantizedModel, trials: int, folder: Path | None) -> QuantizedModel:
        """Search the parameters of the copies."""
        few = np.ascontiguousarray(self.train[:4, :512])
        storage = None if folder is None else folder / "search.log"
        return search(
            self.model,
            small,
            few,
            trials=trials,
            storage=storage,
            measure=len(few),
            window=few.shape[1],
            seed=self.options["seed"],
            progress=self.bars,
        ).model

    def trained(
        self, small: QuantizedModel, steps: int, seconds: float | None, folder: Path | None
    ) -> QuantizedModel:
        """Train what quantization left free."""
        return distill(
            small,
            self.model,
            self.train.ravel(),
            window=min(512, self.train.shape[1]),
            batch=1,
            steps=steps,
            every=20,
            seconds=seconds,
            seed=self.options["seed"],
            work_dir=None if folder is None else folder / "training",
            progress=self.bars,
        )

    def improved(
        self, name: str, small: QuantizedModel, stage: Callable[[], QuantizedModel]
    ) -> QuantizedModel:
        """Run a stage; return its model if that is better, else the one before."""
        started = self._begin(name)
        try:
            found = stage()
            kl = self._divergence(found)
        except _FAILURES as error:
            self._end(name, started, f"skipped: {error}")
            return small
        if not kl < self._kl:
            self._end(name, started, f"dropped: its KL is {kl:.4f}")
            return small
        gain = 1 - kl / self._kl
        self._kl = kl
        self._end(name, started, f"{gain:.1%} less")
        return found

    def _divergence(self, small: QuantizedModel) -> float:
        found = [Reference(self.model, row).divergence(small.hidden(row)[:-1])
                 for row in self.held]  # fmt: skip
        return float(np.mean(found))

    def _begin(self, name: str) -> float:
        self._report(name)
        return time.perf_counter()

    def _end(self, name: str, started: float, note: str) -> None:
        self.stages.append(Stage(name, time.perf_counter() - started, self._kl, note))
