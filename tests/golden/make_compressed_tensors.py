"""Words of compressed-tensors for random integers, for test_checkpoints_integer_words.py.

    pip install torch==2.13.0 compressed-tensors==0.20.0
    python tests/golden/make_compressed_tensors.py

Writes compressed_tensors.npz. For each case: codes and scales as lowbitq has them, the words that
the package packs them to, and the weights that it unpacks from these.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme

CASES = {"4": (4, 32, 5, 96), "8": (8, 32, 3, 64), "4 by rows": (4, None, 6, 44)}


def main():
    arrays = {}
    for name, (bits, group, rows, cols) in CASES.items():
        rng = np.random.default_rng([bits, cols])
        groups = cols // (group or cols)
        codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
        scale = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
        values = codes.astype(np.float32) - (1 << (bits - 1))
        weight = values * scale[:, np.arange(cols) // (group or cols)]
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "channel" if group is None else "group", "group_size": group}
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        state = {"weight": torch.tensor(weight), "weight_scale": torch.tensor(scale)}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        again = PackedQuantizationCompressor.decompress(packed, scheme)["weight"].numpy()
        arrays |= {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.weight": again}
        arrays[f"{name}.words"] = packed["weight_packed"].numpy()
    np.savez_compressed(Path(__file__).parent / "compressed_tensors.npz", **arrays)


if __name__ == "__main__":
    main()
