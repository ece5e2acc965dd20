"""What a layer costs as planned: bytes stored, multiplications for a token."""

from __future__ import annotations

from lowbitq.formats import Format
from lowbitq.plans import LayerPlan


def stored_bytes(plan: LayerPlan, shape: tuple[int, int]) -> int:
    """Return the bytes of a layer: codes, scales, tables, factors, dense rotations, adapter.

    Copies of mode ``"shared"`` have no codes of their own. Copies that are averaged (``"own"`` and
    ``"shared"``) have a factor for each row, in 16 bits. A Hadamard rotation is a seed; an
    orthogonal one is a matrix of float32. A bias is not counted.

    Parameters
    ----------
    plan : LayerPlan
    shape : (int, int)
        (rows, cols).

    Returns
    -------
    int

    Examples
    --------
    >>> stored_bytes(LayerPlan.parse("int4g64"), (16, 64))
    576
    >>> stored_bytes(LayerPlan.parse("int4g64 + int4g64 shared + rank1"), (16, 64))
    800
    """
    rows, cols = shape
    total = 2 * plan.rank * (rows + cols)
    for copy in plan.copies:
        if copy.mode != "shared":
            total += Format.parse(copy.format).stored_bytes(rows, cols)
        if copy.rotation == "orthogonal":
            total += 4 * cols * cols
    averaged = sum(copy.mode != "residual" for copy in plan.copies)
    return total + 2 * rows * averaged * (averaged > 1)


def multiplications(plan: LayerPlan, shape: tuple[int, int]) -> int:
    """Return the multiplications of a layer for a token: of its codes and its adapter.

    Rotations are not counted; they are less than a tenth of the others.

    Examples
    --------
    >>> multiplications(LayerPlan.parse("int2g64 + int2g64 residual + rank1"), (16, 64))
    2128
    """
    rows, cols = shape
    return len(plan.copies) * rows * cols + plan.rank * (rows + cols)
