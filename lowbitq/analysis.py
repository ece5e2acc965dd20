"""analyze(): where a model's bytes and operations are, and how redundant its matrices are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowbitq.gptq import product
from lowbitq.linears import QuantizedLinear
from lowbitq.models.decoder import AnyLinear, Model
from lowbitq.models.finite import check_finite
from lowbitq.models.slots import EMBEDDING

SHARES = (0.5, 0.9, 0.99)  # of the energy


@dataclass(frozen=True)
class MatrixAnalysis:
    """One matrix of a model.

    Attributes
    ----------
    layer : str
    shape : (int, int)
    nbytes : int
        Bytes as the model has it.
    operations : int
        Multiplications and additions for a token; 0 for an embedding that is only looked up.
    ranks : tuple of float
        For each of `SHARES`, the share of the singular values that carries this share of the sum of
        their squares; empty if they were not computed. A square matrix of random numbers has 0.18,
        0.51 and 0.77.
    """

    layer: str
    shape: tuple[int, int]
    nbytes: int
    operations: int
    ranks: tuple[float, ...]

    def intensity(self, tokens: int = 1) -> float:
        """Operations per byte of weights for so many tokens at once.

        Below the balance of the machine (`lowbitq.roofline`: peak over bandwidth) memory is the
        limit, above it arithmetic.
        """
        return self.operations * tokens / self.nbytes if self.nbytes else 0.0


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found. Its str is a table.

    Attributes
    ----------
    rows : tuple of MatrixAnalysis
        In the order of `Model.matrices`; a layer that occurs twice is there once.
    vectors : int
        Bytes of gains and biases.
    attention : int
        Operations of attention for a token, for each token that it looks back on.
    """

    rows: tuple[MatrixAnalysis, ...]
    vectors: int
    attention: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model."""
        return self.vectors + sum(row.nbytes for row in self.rows)

    @property
    def operations(self) -> int:
        """Operations for a token, without attention."""
        return sum(row.operations for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max(len(row.layer) for row in self.rows)
        shares = [f"{share:.0%}" for share in SHARES] * bool(self.rows[0].ranks)
        heads = ["shape", "kB", "kop/token", "op/byte", *shares]
        yield f"{'layer':{width}}" + "".join(f" {head:>12}" for head in heads)
        for row in self.rows:
            cells = [f"{row.shape[0]} x {row.shape[1]}", f"{row.nbytes / 1e3:.1f}"]
            cells += [f"{row.operations / 1e3:.0f}", f"{row.intensity():.2f}"]
            cells += [f"{rank:.3f}" for rank in row.ranks]
            yield f"{row.layer:{width}}" + "".join(f" {cell:>12}" for cell in cells)
        yield (
            f"{self.nbytes / 1e6:.1f} MB in all, {self.operations / 1e6:.1f} million operations a "
            f"token and {self.attention / 1e3:.1f} thousand for each token before it"
        )


def analyze(model: Model, *, spectrum: bool = False) -> Analysis:
    """Find the bytes, the operations and the redundancy of a model's matrices.

    Parameters
    ----------
    model : Model
        Float or quantized.
    spectrum : bool, default=False
        Whether to find singular values, too: half a minute for 100 million weights.

    Returns
    -------
    Analysis

    Raises
    ------
    ValueError
        If singular values of a NaN or an infinity are asked for.

    Examples
    --------
    >>> found = analyze(model)  # doctest: +SKIP
    >>> print(found)  # doctest: +SKIP
    """
    if spectrum:
        check_finite(model)
    rows, seen = [], set()
    for name, linear in model.matrices():
        if id(linear) in seen:
            continue
        seen.add(id(linear))
        looked_up = name == EMBEDDING and model.head is not None
        times = sum(other is linear for _, other in model.linears()) or 1
        work = 0 if looked_up else 2 * times * _multiplications(linear)
        ranks = _ranks(linear.to_float().weight) if spectrum else ()
        rows.append(MatrixAnalysis(name, linear.shape, linear.nbytes, work, ranks))
    config = model.config
    attention = 2 * 2 * len(model.blocks) * config.heads * config.head_dim
    vectors = model.nbytes - sum(row.nbytes for row in rows)
    return Analysis(tuple(rows), vectors, attention)


def _multiplications(linear: AnyLinear) -> int:
    """Of the codes of all copies and of the adapter; rotations are less than a tenth of them."""
    rows, cols = linear.shape
    if not isinstance(linear, QuantizedLinear):
        return rows * cols
    rank = 0 if linear.adapter is None else linear.adapter[0].shape[1]
    return len(linear.copies) * rows * cols + rank * (rows + cols)


def _ranks(weight: NDArray[np.float32]) -> tuple[float, ...]:
    """Shares of the singular values, by the eigenvalues of the smaller Gram matrix in float64."""
    W = np.ascontiguousarray(weight if len(weight) < weight.shape[1] else weight.T, np.float64)
    squares = np.maximum(np.linalg.eigvalsh(product(W, W))[::-1], 0)
    if not squares.any():
        return (0.0,) * len(SHARES)
    energy = np.cumsum(squares) / squares.sum()
    counts = np.searchsorted(energy, np.array(SHARES) * (1 - 1e-12)) + 1
    return tuple(float(count) / len(squares) for count in counts)
