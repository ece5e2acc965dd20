"""Random packed matrices, described as _core wants it."""

from __future__ import annotations

import numpy as np

from lowbitq import _core


def description(rows, cols, bits, group=None, scale_bits=16, has_offset=False, unit=1.0, zero=0.0):
    return {
        "rows": rows,
        "cols": cols,
        "bits": bits,
        "group": group or cols,
        "scale_bits": scale_bits,
        "has_offset": has_offset,
        "unit": unit,
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
        scale = np.float32(spec["unit"]) * integers
    offset = rng.normal(size=(rows, groups)).astype(np.float16).astype(np.float32)
    return codes, scale, offset


def code_of(spec, levels=None):
    """A handle of the code, with a table or without."""
    return _core.code(
        levels,
        name=f"{'int' if levels is None else 'kmeans'}{spec['bits']}",
        symmetric=not spec["has_offset"],
        scale_bits=spec["scale_bits"],
        unit=spec["unit"],
        zero=spec["zero"],
    )


def layout(spec):
    """Where the matrix lies, as _core wants it."""
    return {name: spec[name] for name in ("rows", "cols", "group")}


def packed_bytes(spec):
    stored = {"scale_bits": spec["scale_bits"], "symmetric": not spec["has_offset"]}
    return _core.packed_bytes(code=f"int{spec['bits']}", **layout(spec), **stored)


def pack(spec, codes, scale, offset):
    panels = _core.aligned_empty(bytes=packed_bytes(spec))
    panels[:] = 0xA5
    _core.pack(
        code_of(spec),
        codes,
        scale if spec["scale_bits"] else None,
        offset if spec["has_offset"] else None,
        panels,
        **layout(spec),
    )
    return panels


def packed_copy(panels, spec, *, levels=None, input=None, output=None, weight=None, **activation):
    """A handle of a copy; `activation`: bits, clip, scale, zero (None: of each token), sums."""
    bits, zero = activation.pop("bits", 8), activation.pop("zero", 0.0)
    return _core.copy_packed(
        code_of(spec, levels),
        panels,
        input,
        output,
        weight,
        activation.pop("sums", None),
        None,
        activation_bits=bits,
        activation_clip=activation.pop("clip", 1.0),
        activation_scale=activation.pop("scale", 0.0),
        activation_zero=0.0 if zero is None else zero,
        zero_per_token=zero is None,
        **activation,
        **layout(spec),
    )


def packed_layer(panels, levels, bias, rotation, *, activation_bits, **spec):
    """A handle of a layer of one packed copy."""
    copy = packed_copy(panels, spec, levels=levels, input=rotation, bits=activation_bits)
    return _core.linear((copy,), bias, None, None)


def dense_layer(weight, bias, rotation):
    """A handle of a layer of one dense copy."""
    return _core.linear((_core.copy_dense(weight, rotation, None, None),), bias, None, None)
