"""How matrices are rounded and tokens weighted: the options of plans, checked and typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from lowbitq.formats import Format
from lowbitq.gptq import ORDERS
from lowbitq.quantizers import RANGES


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices or isinstance(value, (bool, float)):
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}, expected one of {expected}")


def check_at_least_zero(name: str, value: float) -> None:
    """Raise ValueError unless the value is at least 0."""
    if not value >= 0:
        raise ValueError(f"{name} is {value}, expected at least 0")


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded to its format.

    Parameters
    ----------
    method : {"gptq", "rtn"}, default="gptq"
        ``"rtn"``: round to nearest, without calibration.
    range : str, default="mse"
        How scales are found: see `lowbitq.quantize`.
    norm : float, default=2.0
        Exponent of the errors that range ``"mse"`` sums.
    importance : bool, default=True
        Whether the Hessian's diagonal weights these errors (``"gptq"`` only).
    damping : float, default=0.01
        Addition to the Hessian's diagonal, relative to `damping_by`.
    damping_by : {"median", "mean"}, default="median"
        Statistic of the diagonal that damping is relative to. SmolLM2 at 2 bits after 8 windows of
        calibration: perplexity 70.2 by the median, 73.2 by the mean, which one massive channel can
        lift above all others.
    order : {"group", "act", "none"}, default="group"
        Order of the columns; see `lowbitq.gptq.feedback`.
    sweeps : int or None, default=None
        Passes of coordinate descent over the codes from error feedback (``"gptq"`` only). None: two
        for codes of 1 and 2 bits whose rows are rounded alone, none for others. ln perplexity of
        SmolLM2 after 16 windows of calibration:

        ====================  =====  =====  =====
        sweeps                    0      1      2
        ====================  =====  =====  =====
        2 bits                 4.19   4.08   4.04
        2 bits, another seed   4.11   4.02   4.00
        3 bits                3.218         3.203
        4 bits                3.016         3.028
        ====================  =====  =====  =====

        A trellis gains nothing where drift is corrected: the divergence of ``"trellis2w10"`` after
        12 windows of 1024 tokens is 0.744, 0.733 and 0.748 with 0, 1 and 2 sweeps.
    arithmetic : {"float32", "float64"}, default="float32"
        Precision of the error feedback.
    alternations : int, default=0
        How often a layer with an adapter is rounded again, less the adapter, and the adapter fitted
        again; it ends early when the error of the outputs no longer falls. ln perplexity of
        SmolLM2 after 4 windows of calibration: int2g64 4.13 (2.50 bits), with rank16 3.97 (3.24
        bits), with 3 alternations 3.92.

    Raises
    ------
    ValueError
        If a choice or number is none of these.

    Examples
    --------
    >>> Rounding(damping=0.02).sweeps_for(Format.parse("int2g64"))
    2
    """

    method: str = "gptq"
    range: str = "mse"
    norm: float = 2.0
    importance: bool = True
    damping: float = 0.01
    damping_by: str = "median"
    order: str = "group"
    sweeps: int | None = None
    arithmetic: str = "float32"
    alternations: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("gptq", "rtn"))
        check_choice("range", self.range, RANGES)
        check_choice("damping_by", self.damping_by, ("mean", "median"))
        check_choice("order", self.order, ORDERS)
        check_choice("arithmetic", self.arithmetic, ("float32", "float64"))
        check_at_least_zero("damping", self.damping)
        check_at_least_zero("alternations", self.alternations)
        if self.sweeps is not None:
            check_at_least_zero("sweeps", self.sweeps)
        if not self.norm > 0:
            raise ValueError(f"norm is {self.norm}, expected a positive number")

    def sweeps_for(self, format: Format) -> int:
        """Return the number of sweeps for codes of this format."""
        if self.sweeps is not None:
            return self.sweeps
        return 2 if format.rate <= 2 and format.strip == 1 else 0


# For embedding and head. The "mse" search takes ten times as long, 4 s for SmolLM2, and lowers the
# error by a sixth.
NEAREST = Rounding(method="rtn", range="minmax")


@dataclass(frozen=True)
class Sampling:
    """Weights of the tokens of a calibration window.

    Parameters
    ----------
    first_tokens : int, default=4
        Number of tokens at the start of a window that have another weight.
    first_weight : float, default=16.0
        Their weight in the Hessian, unless Fisher information weights the tokens. They carry the
        massive activation that all later tokens attend to.
    clip : float, default=20.0
        Largest weight by Fisher information of the tokens after these, in medians.
    """

    first_tokens: int = 4
    first_weight: float = 16.0
    clip: float = 20.0

    def __post_init__(self) -> None:
        check_at_least_zero("first_tokens", self.first_tokens)
        check_at_least_zero("first_weight", self.first_weight)
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, expected a positive number")


class RoundingOptions(TypedDict, total=False):
    """The fields of `Rounding` as keywords."""

    method: str
    range: str
    norm: float
    importance: bool
    damping: float
    damping_by: str
    order: str
    sweeps: int | None
    arithmetic: str
    alternations: int
