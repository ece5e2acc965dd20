"""Models as Hugging Face folders of integers, for transformers and vLLM."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import NDArray

from lowbitq.checkpoints.integer_words import (
    Integers,
    compressed_tensors_arrays,
    gptq_arrays,
    integers_of,
)
from lowbitq.checkpoints.safetensors import are_exact
from lowbitq.llama_cpp import only_tensor, some
from lowbitq.models.decoder import Model
from lowbitq.models.plain import dense, folded, write_hf
from lowbitq.models.slots import HEAD

Arrays = dict[str, dict[str, NDArray[Any]]]


def write_compressed_tensors(
    model: Model, path: str | os.PathLike[str], dtype: str, overwrite: bool
) -> list[str]:
    """Write a folder of pack-quantized layers; others are decoded.

    Parameters
    ----------
    model : Model
    path, overwrite
        See `lowbitq.export`.
    dtype : {"float16", "bfloat16", "float32"}
        Of embedding, head, norms and decoded layers.

    Returns
    -------
    list of str
        How the weights in the folder differ from the model's.

    Raises
    ------
    ValueError
        If no layer of the blocks is a matrix of integers.
    """
    made, matrices = _split(model)
    schemes: dict[tuple[int, int | None], list[str]] = {}
    for name, matrix in matrices.items():
        schemes.setdefault((matrix.bits, matrix.group), []).append(name)
    if not schemes:
        raise ValueError(f"no layer is a matrix of integers; {_WANTED}")
    entry = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": _weights(bits, group),
                "input_activations": None,
                "output_activations": None,
            }
            for i, ((bits, group), names) in enumerate(schemes.items())
        },
        "ignore": [*(name for name, _ in made.linears() if name not in matrices), HEAD],
        "kv_cache_scheme": None,
    }
    packed = {name: compressed_tensors_arrays(matrix) for name, matrix in matrices.items()}
    return _write(model, made, path, dtype, packed, entry, overwrite)


def write_gptq(
    model: Model, path: str | os.PathLike[str], dtype: str, overwrite: bool
) -> list[str]:
    """Write a folder in GPTQ's form, in which all layers of the blocks are alike.

    Parameters, results and errors are those of `write_compressed_tensors`.

    Raises
    ------
    ValueError
        If a layer of the blocks is no matrix of integers, or differs from the others in bits or
        group.
    """
    made, matrices = _split(model)
    names = [name for name, _ in made.linears()]
    schemes = {(matrix.bits, matrix.group) for matrix in matrices.values()}
    if others := [name for name in names if name not in matrices]:
        raise ValueError(f"no matrices of integers, as GPTQ needs: {some(others)}; {_WANTED}")
    if len(schemes) > 1:
        raise ValueError(
            f"layers have {len(schemes)} pairs of bits and group, expected one with GPTQ; "
            "compressed-tensors can mix them"
        )
    [(bits, group)] = schemes
    entry = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": False,
        "lm_head": False,
    }
    packed = {name: gptq_arrays(matrix) for name, matrix in matrices.items()}
    return _write(model, made, path, dtype, packed, entry, overwrite)


_WANTED = "int4g32symz8 and int8g32symz128 are formats of integers"


def _weights(bits: int, group: int | None) -> dict[str, Any]:
    """Return the arguments of compressed-tensors' quantizer of weights."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }


def _split(model: Model) -> tuple[Model, dict[str, Integers]]:
    """Return the model as it is written, and those of its blocks' layers that are integers."""
    made, matrices = folded(model), {}
    for name, layer in made.linears():
        tensor = only_tensor(layer)
        if tensor is not None and (found := integers_of(tensor)) is not None:
            matrices[name] = found
    for name, layer in list(made.matrices()):
        if name not in matrices:
            made.replace_linear(name, dense(layer))
    return made, matrices


def _write(
    model: Model,
    made: Model,
    path: str | os.PathLike[str],
    dtype: str,
    packed: Arrays,
    entry: dict[str, Any],
    overwrite: bool,
) -> list[str]:
    config = {"quantization_config": entry}
    write_hf(made, path, dtype, packed=packed, config=config, overwrite=overwrite)
    changes = []
    if model.residual_rotation is not None:
        changes.append("the rotation of the model is multiplied into the embedding and the head")
    decoded = [
        name
        for name, layer in made.matrices()
        if name not in packed and not are_exact([dense(layer).weight], dtype)
    ]
    if decoded:
        changes.append(f"decoded and rounded to {dtype}: {some(decoded)}")
    return changes
