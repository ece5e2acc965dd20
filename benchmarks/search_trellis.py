"""Multipliers of trellis codes: what random ones err on a normal variable, and the best of them.

    python -m benchmarks.search_trellis trellis2
    python -m benchmarks.search_trellis trellis2 --multipliers 0xE169 --rings 1600

The constants of csrc/codes/trellis.c are the best of 300 to 400 candidates (100 for windows of 14
bits) on 60 to 120 rings of 64 weights; several that came first were measured again on 1600 rings.
The search for words is the one of trellis.c written with NumPy, all rings at once.
"""

from __future__ import annotations

import argparse

import numpy as np

ROWS = 64
# Bits of a word and of a window, columns of a ring, multipliers, whether four bytes are added,
# deviation of the levels.
CODES = {
    "trellis1": (1, 12, 1, 1, False, 0.87),
    "trellis1w10": (1, 10, 1, 1, False, 0.87),
    "trellis1.5": (3, 12, 2, 2, False, 0.98),
    "trellis2": (2, 12, 1, 1, False, 1.04),
    "trellis2w10": (2, 10, 1, 1, False, 1.04),
    "trellis3": (3, 12, 1, 2, True, 1.08),
    "trellis3w14": (3, 14, 1, 2, True, 1.06),
    "trellis4": (4, 12, 1, 2, True, 1.12),
    "trellis4w14": (4, 14, 1, 2, True, 1.10),
}


def levels_of(code, multipliers):
    """Return the levels (cols, windows) of all windows, around 0, with the deviation of CODES."""
    _, window, cols, _, wide, scale = CODES[code]
    levels = []
    for column in range(cols):
        z = np.arange(2**window) * multipliers[column] % 2**16
        parts = [z, z * multipliers[1] >> 16] if wide else [z]
        mask, middle = (0x3F, 126) if wide else (0x7F, 127)
        level = sum((part & mask) + (part >> 8 & mask) for part in parts) - float(middle)
        levels.append(level / level.std() * scale)
    return np.array(levels, np.float32)


def run(levels, bits, target, sums):
    """Go once over the rows of target (rows, cols, rings); return all sums (states, rings)."""
    states, words = levels.shape[1] >> bits, 1 << bits
    all_sums = [sums]
    for row in target:
        total = np.tile(all_sums[-1], (words, 1))
        for level, wanted in zip(levels, row, strict=True):
            total += (wanted - level[:, None]) ** 2
        all_sums.append(total.reshape(states, words, -1).min(1))
    return all_sums


def distortion(levels, bits, target):
    """Return the mean squared error of rings with target (64, cols, rings)."""
    states, rings = levels.shape[1] >> bits, target.shape[2]
    sums = run(levels, bits, np.concatenate([target] * 2), np.zeros((states, rings), np.float32))
    state, ring = sums[-1].argmin(0), np.arange(rings)
    for row in range(ROWS - 1, -1, -1):  # of the second turn
        window = (state << bits) + np.arange(1 << bits)[:, None]
        total = sums[ROWS + row][window % states, ring]
        total = total + ((target[row][:, None] - levels[:, window]) ** 2).sum(0)
        state = window[total.argmin(0), ring] % states
    first = np.full((states, rings), np.inf, np.float32)
    first[state, ring] = 0
    return float(run(levels, bits, target, first)[-1][state, ring].mean()) / target[:, :, 0].size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("code", choices=CODES)
    parser.add_argument("--multipliers", nargs="+", type=lambda text: int(text, 0))
    parser.add_argument("--candidates", type=int, default=400)
    parser.add_argument("--rings", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bits, _, cols, count, _, _ = CODES[options.code]
    rng = np.random.default_rng(options.seed)
    target = rng.standard_normal((ROWS, cols, options.rings), np.float32)
    candidates = 2 * rng.integers(0, 2**15, (options.candidates, count)) + 1
    if options.multipliers:
        candidates = np.array([options.multipliers])
    found = []
    for multipliers in candidates:
        levels = levels_of(options.code, multipliers)
        parts = [target[:, :, i : i + 16] for i in range(0, options.rings, 16)]
        errors = [distortion(levels, bits, part) * part.shape[2] for part in parts]
        found.append((sum(errors) / options.rings, *multipliers))
    for error, *multipliers in sorted(found)[:5]:
        print(f"{error:.5f}", *(f"0x{multiplier:04X}" for multiplier in multipliers))


if __name__ == "__main__":
    main()
