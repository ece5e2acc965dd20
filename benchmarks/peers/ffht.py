"""FFHT's fast Hadamard transform, compiled from its C source."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_void_p, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import LOOPS, compiled, find

SOURCE = "FFHT*/ffht/fht.c"


class Ffht:
    """The library: unnormalised transforms of rows of 2^k numbers."""

    def __init__(self) -> None:
        source = find(SOURCE)
        if source is None:
            raise FileNotFoundError("FFHT is not found; see benchmarks/peers/README.md")
        self._loops = compiled([LOOPS])
        library = compiled([source, source.with_name("fast_copy.c")], "-std=c99")
        self._transform = cast(library.fht_float, c_void_p)

    def rows(self, x: NDArray[np.float32]) -> Callable[[], object]:
        """Return a call that transforms each row of x (rows, 2^k), 64-byte aligned, in place."""
        rows, n = x.shape
        arguments = (
            self._transform, c_int(rows), c_int(n.bit_length() - 1), c_void_p(x.ctypes.data),
        )  # fmt: skip
        return lambda: self._loops.transform_rows(*arguments)


def load() -> Ffht | None:
    """Return the library, if it is found."""
    return Ffht() if find(SOURCE) else None
