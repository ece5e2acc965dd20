"""Language models in 1 to 4 bits: quantize, run and judge them on a CPU, without PyTorch."""

from __future__ import annotations

import scipy_openblas32 as _openblas  # noqa: F401  (loads the library that _core links to)

from lowbitq._core import FormatError, NumericalError

__all__ = ["FormatError", "NumericalError"]
__version__ = "0.1.0"
