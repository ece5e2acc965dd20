"""Numbers from outside: one conversion at the door, so that everything behind it is strict."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def float32(values: Any, name: str = "values") -> NDArray[np.float32]:
    """Return numbers as a C-contiguous float32 array: `values` itself if it already is one.

    Parameters
    ----------
    values : array_like of real numbers
        An array of any float or integer type, also bfloat16 of ml_dtypes, in any order and with any
        strides; lists; or what has ``__array__`` or ``__dlpack__``, such as tensors of torch.
    name : str, default="values"
        Name of the argument in error messages.

    Raises
    ------
    TypeError
        If they are not real numbers.
    ValueError
        If a finite number becomes an infinity.

    Examples
    --------
    >>> float32([[1, 2], [3, 4]]).T.flags.c_contiguous, float32(np.float64([0.5]))
    (False, array([0.5], dtype=float32))
    """
    found: NDArray[np.float32] = _converted(values, name, np.float32)
    return found


def float64(values: Any, name: str = "values") -> NDArray[np.float64]:
    """Return numbers as a C-contiguous float64 array; see `float32`.

    Examples
    --------
    >>> float64(np.eye(2, dtype=np.float16)[:, ::-1])
    array([[0., 1.],
           [1., 0.]])
    """
    found: NDArray[np.float64] = _converted(values, name, np.float64)
    return found


def _converted(values: Any, name: str, dtype: DTypeLike) -> Any:
    array = values if isinstance(values, np.ndarray) else _array(values, name)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {array.dtype}, expected real numbers")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, dtype).reshape(array.shape)
    narrower = array.dtype.itemsize > found.dtype.itemsize
    if narrower and np.isinf(found).sum() > np.isinf(array).sum():
        raise ValueError(f"{name} has a number too large for {found.dtype}")
    return found


def _array(values: Any, name: str) -> NDArray[Any]:
    if hasattr(values, "detach"):  # of torch: one that takes part in differentiation has no array
        values = values.detach()
    try:
        if hasattr(values, "__dlpack__") and not hasattr(values, "__array__"):
            return np.from_dlpack(values)
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        if callable(wider := getattr(values, "float", None)):  # torch's bfloat16, unknown to NumPy
            return np.asarray(wider())
        raise TypeError(f"{name} is a {type(values).__name__}, not numbers: {error}") from error
