"""Makes rounding.npz: a layer whose weights are rounded straight through, by torch.autograd.

    python tests/golden/make_rounding.py

Needs torch (made with 2.13.0). Each case is a grid: ``lsq``, of 3 bits around zero, with learned
scales; ``lsq_plus``, of 2 bits, with learned offsets. In float64 from float32 arrays:

    v = (w - offset) / scale,   q = clip(round(v), 0, levels - 1),   y = x (scale q + offset)^T

with ``offset = -zero scale`` unless it is learned. Rounding has the gradient of the identity,
scales that of LSQ, times ``1 / sqrt(group (levels - 1) / 2)``. The loss is the mean of
``(y - target)^2``. Of each case: ``w`` (rows, cols), ``x`` (t, cols), ``target`` (t, rows),
``scale``, ``offset`` (rows, groups), ``rounded`` (rows, cols), and ``dw``, ``dscale``, ``doffset``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

ROWS, COLS, GROUP, TOKENS = 6, 64, 32, 20
CASES = {"lsq": (8, False), "lsq_plus": (4, True)}


class Round(torch.autograd.Function):
    """Rounding to nearest, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """The same values, whose gradient is multiplied by a factor."""
    return (x - factor * x).detach() + factor * x


def wide(grid: torch.Tensor) -> torch.Tensor:
    return grid.repeat_interleave(GROUP, dim=1)


def case(levels: int, offsets: bool, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    w, x = (rng.standard_normal((n, COLS), np.float32) for n in (ROWS, TOKENS))
    target = rng.standard_normal((TOKENS, ROWS), np.float32)
    # Narrow enough to clip some weights; exact in float16.
    scale = (rng.integers(64, 96, (ROWS, COLS // GROUP)) / 128 * 4 / levels).astype(np.float32)
    offset = -(levels - 1) / 2 * scale
    if offsets:
        offset = (np.rint(offset * 64) / 64 + 1 / 64).astype(np.float32)
    long = np.repeat(scale, GROUP, 1)
    v = (w - np.repeat(offset, GROUP, 1)) / long
    w += np.where(abs(v - np.floor(v) - 0.5) < 1e-3, long / 100, 0)  # no ties
    parts = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in (w, scale, offset)]
    weight, steps, shift = parts
    learned = scaled_gradient(steps, (GROUP * (levels - 1) / 2) ** -0.5)
    from_zero = shift if offsets else -(levels - 1) / 2 * learned
    q = torch.clamp(Round.apply((weight - wide(from_zero)) / wide(learned)), 0, levels - 1)
    rounded = wide(learned) * q + wide(from_zero)
    y = torch.tensor(x.astype(np.float64)) @ rounded.T
    torch.mean((y - torch.tensor(target.astype(np.float64))) ** 2).backward()
    found = {"dw": weight.grad, "dscale": steps.grad, "rounded": rounded.detach()}
    found |= {"doffset": shift.grad} if offsets else {}
    clipped = ((q == 0) | (q == levels - 1)).double().mean()
    assert 0.1 < float(clipped) < 0.9, "expected weights inside and outside"
    arrays = {"w": w, "x": x, "target": target, "scale": scale, "offset": offset}
    return arrays | {name: array.numpy() for name, array in found.items()}


def main() -> None:
    arrays = {
        f"{name}/{part}": array
        for seed, (name, options) in enumerate(CASES.items())
        for part, array in case(*options, seed).items()
    }
    np.savez(Path(__file__).with_name("rounding.npz"), **arrays)


if __name__ == "__main__":
    main()
