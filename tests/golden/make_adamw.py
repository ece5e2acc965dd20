"""Makes adamw.npz: parameters after steps of torch.optim.AdamW by random gradients, in float32.

    python tests/golden/make_adamw.py

Needs torch (made with 2.13.0). Each case is one set of options; `gradient` is (steps, n), `after`
(cases, steps, n), `options` (cases, 5): learning rate, beta1, beta2, epsilon, decay.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

STEPS, COUNT = 12, 37
OPTIONS = [
    (1e-3, 0.9, 0.999, 1e-8, 0.01),
    (1e-1, 0.8, 0.95, 1e-6, 0.0),
    (1e-2, 0.0, 0.5, 1e-3, 0.3),
]


def run(
    start: np.ndarray, gradients: np.ndarray, options: tuple[float, float, float, float, float]
) -> np.ndarray:
    rate, beta1, beta2, epsilon, decay = options
    param = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW(
        [param], lr=rate, betas=(beta1, beta2), eps=epsilon, weight_decay=decay
    )
    after = []
    for gradient in gradients:
        param.grad = torch.tensor(gradient)
        optimizer.step()
        after.append(param.detach().numpy().copy())
    return np.array(after)


def main() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(COUNT, dtype=np.float32)
    size = np.float32(10.0) ** rng.uniform(-6, 2, COUNT).astype(np.float32)
    gradient = size * rng.standard_normal((STEPS, COUNT), dtype=np.float32)
    gradient[:, 0] = 0
    after = np.array([run(start, gradient, options) for options in OPTIONS])
    np.savez(
        Path(__file__).with_name("adamw.npz"),
        start=start,
        gradient=gradient,
        after=after,
        options=np.array(OPTIONS),
    )


if __name__ == "__main__":
    main()
