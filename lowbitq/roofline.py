"""How close the linear layers come to the limits of this machine.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52, 2009: a product with I operations per byte
read runs at min(peak, I * bandwidth) at best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lowbitq import _core, plots
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.tensors import QuantizedTensor
from lowbitq.timing import take_turns

FORMATS = ("int1g64", "ternaryg64", "int2g64", "int3g64", "int4g64", "int8g64")
KINDS = {"memory": "a token, from memory", "cache": "a token, in cache", "tokens": "256 tokens"}
TOKENS = 256
LAYER = (4096, 4096)  # for streaming and for many tokens
CACHED_LAYER = (512, 1024)  # at 8 bits, half of a second-level cache
STREAM_BYTES = 256 << 20  # several times a last-level cache
# The int8 kernel is fastest with long steps and without offsets. Low bits may be summed in shorter
# integers, and 8 bits need no unpacking; which is faster depends on the instruction set.
PEAK_FORMATS = ("int2g128sym", "int8g128sym")


@dataclass(frozen=True)
class Point:
    """One product: its rates, and how close they are to the roof.

    Attributes
    ----------
    format : str
    kind : {"memory", "cache", "tokens"}
        One token with the weights in memory, one token with the weights in cache, or many tokens.
    intensity : float
        Multiplications and additions per byte of weights, inputs and outputs.
    gigaops : float
        10^9 multiplications and additions per second.
    gigabytes : float
        10^9 bytes per second.
    of_roof : float
        Fraction of the roof's rate, at most 1.
    """

    format: str
    kind: str
    intensity: float
    gigaops: float
    gigabytes: float
    of_roof: float


@dataclass(frozen=True)
class Roofline:
    """The limits of a machine and the rates of its layers; prints as a table.

    Attributes
    ----------
    machine : dict
        Its isa and threads.
    memory_gigabytes, cache_gigabytes : float
        10^9 bytes per second: the maximum of a float32 matrix-vector product, which does little but
        read, and of all points.
    peak_gigaops : float
        10^9 multiplications and additions per second: the maximum of the int8 kernel in the easiest
        format and of all points.
    points : tuple of Point
    """

    machine: dict[str, Any]
    memory_gigabytes: float
    cache_gigabytes: float
    peak_gigaops: float
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists for JSON."""
        return asdict(self)

    def plot(self, axes: Any = None) -> Any:
        """Draw the limits of the machine and the performance of its layers.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, default=None
            Where to draw. None: a new figure.

        Returns
        -------
        matplotlib.axes.Axes
            Its ``figure.savefig`` writes a file.

        Raises
        ------
        ImportError
            If `axes` is None and matplotlib is not installed.
        """
        axes = plots.new_axes() if axes is None else axes
        intensity = np.geomspace(1, 1e4, 200)
        for bandwidth, text in [
            (self.memory_gigabytes, "memory"),
            (self.cache_gigabytes, "cache"),
        ]:
            roof = np.minimum(bandwidth * intensity, self.peak_gigaops)
            axes.plot(intensity, roof, color="0.5", linewidth=1)
            label = f"{text} {bandwidth:.0f} GB/s"
            axes.annotate(label, (1, bandwidth), (2, 4), textcoords="offset points", color="0.3")
        peak = f"int8 {self.peak_gigaops:.0f} Gop/s"
        at = (1e4, self.peak_gigaops)
        axes.annotate(peak, at, (-2, 4), textcoords="offset points", color="0.3", ha="right")
        formats = list(dict.fromkeys(point.format for point in self.points))
        for kind, marker in zip(KINDS, "osD", strict=True):
            for point in (point for point in self.points if point.kind == kind):
                color = f"C{formats.index(point.format)}"
                axes.plot(point.intensity, point.gigaops, marker, color=color)
        for number, format in enumerate(formats):
            axes.plot([], [], "o", color=f"C{number}", label=format)
        for text, marker in zip(KINDS.values(), "osD", strict=True):
            axes.plot([], [], marker, color="0.5", label=text)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="operations per byte",
            ylabel="10^9 operations per second",
            title="{isa}, threads {threads}".format(**self.machine),
        )
        axes.legend(loc="lower right", fontsize="small")
        return axes

    def __str__(self) -> str:
        lines = [
            "{isa}, threads {threads}".format(**self.machine),
            f"reads {self.memory_gigabytes:.1f} GB/s from memory, {self.cache_gigabytes:.1f} GB/s "
            f"from cache; int8 peak {self.peak_gigaops:.0f} Gop/s",
            "",
            f"{'':10}" + "".join(f" {text:>24}" for text in KINDS.values()),
            f"{'format':10}" + "".join(f" {text:>24}" for text in ["Gop/s   GB/s  of roof"] * 3),
        ]
        for format in dict.fromkeys(point.format for point in self.points):
            cells = [
                f" {p.gigaops:9.1f} {p.gigabytes:6.1f} {p.of_roof:7.0%}"
                for p in self.points
                if p.format == format
            ]
            lines.append(f"{format:10}" + "".join(cells))
        return "\n".join(lines)


def measure(
    formats: Sequence[str] = FORMATS,
    *,
    repetitions: int = 20,
    stream_bytes: int = STREAM_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Roofline:
    """Measure this machine's limits and the layers' speed, with the current number of threads.

    Parameters
    ----------
    formats : sequence of str, default=FORMATS
    repetitions : int, default=20
        Samples of each product; the fastest counts.
    stream_bytes : int, default=256 MiB
        Bytes of weights to stream, several times the last-level cache so that none is cached.
    progress : callable, default=None
        Called as ``progress(done, total)`` after each format.

    Returns
    -------
    Roofline

    Raises
    ------
    ValueError
        If a format is unknown, or `repetitions` is not positive.

    Examples
    --------
    >>> found = measure(["int2g64"], repetitions=1, stream_bytes=1)
    >>> [point.kind for point in found.points]
    ['memory', 'cache', 'tokens']
    >>> found.peak_gigaops > 0
    True
    """
    parsed = [Format.parse(format) for format in formats]
    references = _references(stream_bytes)
    seconds: dict[tuple[str, str], float] = {}
    work = {key: (product.ops, product.bytes) for key, product in references.items()}
    for done, format in enumerate(parsed, 1):
        products = _products(format, stream_bytes)
        work |= {key: (product.ops, product.bytes) for key, product in products.items()}
        calls = {key: product.run for key, product in (references | products).items()}
        for key, time in take_turns(calls, repetitions=repetitions).items():
            seconds[key] = min(seconds.get(key, time.least), time.least)
        if progress:
            progress(done, len(parsed))
    limit = dict.fromkeys(KINDS, 0.0)
    for (name, kind), least in seconds.items():
        ops, size = work[name, kind]
        limit[kind] = max(limit[kind], (ops if kind == "tokens" else size) / least / 1e9)
    memory, cache, peak = limit.values()
    points = []
    for name, kind in [(str(format), kind) for format in parsed for kind in KINDS]:
        ops, size = work[name, kind]
        intensity, rate = ops / size, ops / seconds[name, kind] / 1e9
        roof = min(peak, intensity * (memory if kind == "memory" else cache))
        points.append(Point(name, kind, intensity, rate, rate / intensity, rate / roof))
    config = _core.config()
    machine = {name: config[name] for name in ("isa", "threads")}
    return Roofline(machine, memory, cache, peak, tuple(points))


@dataclass(frozen=True)
class _Product:
    """A product of some layers and tokens, its operations and its bytes."""

    run: Callable[[], object]
    ops: int
    bytes: int

    @classmethod
    def of(cls, layers: Sequence[Linear | QuantizedLinear], tokens: int) -> _Product:
        rows, cols = layers[0].shape
        x = np.random.default_rng(0).standard_normal((tokens, cols), dtype=np.float32)
        y = np.empty((tokens, rows), np.float32)
        handles = [layer.handle for layer in layers]

        def run() -> None:
            for handle in handles:
                _core.linear_forward(handle, x, y)

        traffic = sum(layer.nbytes + x.nbytes + y.nbytes for layer in layers)
        return cls(run, 2 * rows * cols * tokens * len(layers), traffic)


def _references(stream_bytes: int) -> dict[tuple[str, str], _Product]:
    """Return the products that measure the limits: float32 reads and the fastest int8 kernel."""
    streamed = max(1, stream_bytes // (4 * LAYER[1])), LAYER[1]
    references = {
        ("float32", "memory"): _Product.of([Linear(np.ones(streamed, np.float32))], 1),
        ("float32", "cache"): _Product.of([Linear(np.ones((128, 1024), np.float32))], 1),
    }
    for name in PEAK_FORMATS:
        references[name, "tokens"] = _Product.of([random_layer(Format.parse(name), *LAYER)], TOKENS)
    return references


def _products(format: Format, stream_bytes: int) -> dict[tuple[str, str], _Product]:
    """Return the products of a format, one of each kind."""
    layers = [random_layer(format, *LAYER)]
    many = _Product.of(layers, TOKENS)
    while sum(layer.nbytes for layer in layers) < stream_bytes:
        layers.append(copy_layer(layers[0]))
    cached = _Product.of([random_layer(format, *CACHED_LAYER)], 1)
    products = [_Product.of(layers, 1), cached, many]
    return {(str(format), kind): one for kind, one in zip(KINDS, products, strict=True)}


def random_layer(format: Format, rows: int, cols: int) -> QuantizedLinear:
    """Make a layer of random codes to measure its speed, as `measure` does.

    Parameters
    ----------
    format : Format
    rows, cols : int

    Returns
    -------
    QuantizedLinear

    Examples
    --------
    >>> random_layer(Format.parse("int2g64"), 32, 128).shape
    (32, 128)
    """
    shape = format.code_shape(rows, cols)
    codes = np.random.default_rng(0).integers(0, format.level_count, shape, dtype=np.uint8)
    codes[:, np.arange(shape[1]) % round(format.bits / format.rate) > 0] = 0  # share a word
    scale = np.full((rows, format.groups(cols)), 2.0**-6, np.float32)
    offset = None if format.symmetric else -scale
    return QuantizedLinear.of(
        QuantizedTensor.pack(format, codes, scale, offset, shape=(rows, cols))
    )


def copy_layer(layer: QuantizedLinear) -> QuantizedLinear:
    """Copy a layer with its weights, so that reading both reads twice the memory.

    Parameters
    ----------
    layer : QuantizedLinear

    Returns
    -------
    QuantizedLinear

    Examples
    --------
    >>> layer = random_layer(Format.parse("int2g64"), 32, 128)
    >>> np.shares_memory(copy_layer(layer).tensor.panels, layer.tensor.panels)
    False
    """
    panels = _core.aligned_empty(bytes=layer.tensor.panels.nbytes)
    panels[:] = layer.tensor.panels
    arrays, metadata = layer.tensor.to_arrays()
    tensor = QuantizedTensor.from_arrays({**arrays, "panels": panels}, metadata)
    return QuantizedLinear.of(tensor)
