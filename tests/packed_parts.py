"""Random packed matrices, described as _core wants it."""

from __future__ import annotations

import numpy as np

from lowbitq import _core


def description(rows, cols, bits, group=None, scale_bits=16, has_offset=False, gamma=1.0, zero=0.0):
    return {
        "rows": rows,
        "cols": cols,
        "bits": bits,
        "group": group or cols,
        "scale_bits": scale_bits,
        "has_offset": has_offset,
        "gamma": gamma,
        "zero": zero,
    }


def random_parts(spec, seed=0):
    """Codes, scale and offset that the description can hold."""
    rng = np.random.default_rng([seed, spec["rows"], spec["cols"], spec["bits"]])
    rows, cols = spec["rows"], spec["cols"]
    groups = -(-cols // spec["group"])
    codes = rng.integers(0, 1 << spec["bits"], (rows, cols), dtype=np.uint8)
    if spec["scale_bits"] == 16:
        scale = rng.uniform(0.01, 1, (rows, groups)).astype(np.float16).astype(np.float32)
    else:
        integers = rng.integers(0, 1 << spec["scale_bits"], (rows, groups)).astype(np.float32)
        scale = np.float32(spec["gamma"]) * integers
    offset = rng.normal(size=(rows, groups)).astype(np.float16).astype(np.float32)
    return codes, scale, offset


def pack(spec, codes, scale, offset):
    panels = _core.aligned_empty(bytes=_core.packed_bytes(**spec))
    panels[:] = 0xA5
    _core.pack(
        codes,
        scale if spec["scale_bits"] else None,
        offset if spec["has_offset"] else None,
        panels,
        **spec,
    )
    return panels


def packed_copy(panels, spec, *, levels=None, input=None, output=None, weight=None, **activation):
    """A handle of a copy; `activation`: bits, clip, scale, zero (None: of each token), sums."""
    bits, zero = activation.pop("bits", 8), activation.pop("zero", 0.0)
    return _core.copy_packed(
        panels,
        levels,
        input,
        output,
        weight,
        activation.pop("sums", None),
        activation_bits=bits,
        activation_clip=activation.pop("clip", 1.0),
        activation_scale=activation.pop("scale", 0.0),
        activation_zero=0.0 if zero is None else zero,
        zero_per_token=zero is None,
        **activation,
        **spec,
    )


def packed_layer(panels, levels, bias, rotation, *, activation_bits, **spec):
    """A handle of a layer of one packed copy."""
    copy = packed_copy(panels, spec, levels=levels, input=rotation, bits=activation_bits)
    return _core.linear((copy,), bias, None, None)


def dense_layer(weight, bias, rotation):
    """A handle of a layer of one dense copy."""
    return _core.linear((_core.copy_dense(weight, rotation, None, None),), bias, None, None)
