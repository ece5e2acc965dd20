"""Make packed_v2/ and packed_v2.npz: a saved model that every later version must read.

    PYTHONPATH=.:tests python tests/golden/make_packed_v2.py

Run once, when format_version 2 was made. A new format gets a script and a folder of its own; this
one is never made again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from golden import tiny_models

from lowbitq import quantize
from lowbitq.linears import QuantizedLinear
from lowbitq.models import Model, QuantizedModel, load
from lowbitq.models.rotating import rotate
from lowbitq.plans import Plan

FORMATS = ["int4g64", "int3g32", "int2g32sym", "ternaryg64", "kmeans4g16", "int4g64s8", "binary"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = load(tiny_models.write_folder("qwen2", Path(folder)))
    rotated = rotate(source, seed=3)
    rotated.provenance = {"source": "tests/golden/tiny_models.py: qwen2"}
    names = [field.name for field in dataclasses.fields(Model) if field.init]
    model = QuantizedModel(
        **{name: getattr(rotated, name) for name in names}, plan=Plan({}, seed=3)
    )
    arrays = {"tokens": tiny_models.tokens_of("qwen2")}
    for i, (name, linear) in enumerate(list(model.linears())):
        tensor = quantize(linear.weight, FORMATS[i % len(FORMATS)])
        model.replace_linear(name, QuantizedLinear.of(tensor, linear.bias, linear.rotation))
        arrays |= {f"{name}.{part}": getattr(tensor, part) for part in ("codes", "scale", "offset")}
        if tensor.levels is not None:
            arrays[f"{name}.levels"] = tensor.levels
    arrays["logits"] = model.logits(arrays["tokens"])
    here = Path(__file__).parent
    model.save(here / "packed_v2")
    np.savez_compressed(here / "packed_v2.npz", **arrays)


if __name__ == "__main__":
    main()
