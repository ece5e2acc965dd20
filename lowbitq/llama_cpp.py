"""Models as GGUF files for llama.cpp: which type each matrix has, and what that changes."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.checkpoints.gguf import write_gguf
from lowbitq.checkpoints.gguf_blocks import blocks_of
from lowbitq.checkpoints.safetensors import are_exact, rounded
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.config_gguf import config_to_gguf
from lowbitq.models.decoder import Model
from lowbitq.models.families import FAMILIES, interleave
from lowbitq.models.plain import DTYPES, config_now, dense, folded, taps_with_bias
from lowbitq.models.slots import NORMS, OUTER, SLOTS, TAPS, name_in_block
from lowbitq.plans import LayerPlan
from lowbitq.quantizers import quantize
from lowbitq.tensors import QuantizedTensor

# Options of `compress` for a file that holds everything without change.
PRESET = {"format": "int4g32symz8", "embedding": "int8g32symz128", "rotation": "none"}

AnyLinear = Linear | QuantizedLinear
Tensors = dict[str, tuple[str, NDArray[Any]]]

_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

# llama.cpp's numbers for the type of most matrices (enum llama_ftype); shown, but not used.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "BF16": 32,
}


def write_llama_cpp(
    model: Model, path: str | os.PathLike[str], dtype: str, overwrite: bool
) -> list[str]:
    """Write a model as a GGUF file.

    Parameters
    ----------
    model : Model
    path : str or path-like
    dtype : {"float16", "bfloat16", "float32"}
        Of matrices that no type of blocks holds.
    overwrite : bool
        Whether a GGUF file at `path` may be replaced.

    Returns
    -------
    list of str
        How the weights in the file differ from the model's.

    Raises
    ------
    ValueError
        If `dtype` is none of these or too narrow for a weight, or llama.cpp has no such tokenizer,
        biases or rotary frequencies.
    FileExistsError
        If there is a file that may not be replaced.
    """
    if dtype not in _TYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    made = folded(model)
    config = config_now(made)
    metadata, factors = config_to_gguf(config, FAMILIES)
    _check_biases(made, FAMILIES[config.family].architecture)
    metadata |= {"general.type": "model", "general.quantization_version": 2}
    if made.tokenizer is None:
        metadata["tokenizer.ggml.model"] = "none"
    else:
        metadata |= made.tokenizer.to_gguf(config.vocab_size)
    tensors = _Tensors(dtype)
    if factors is not None:
        tensors.found["rope_freqs.weight"] = "F32", factors
    tensors.layer(OUTER["embedding"].gguf, made.embedding)
    if made.head is not None:
        tensors.layer(OUTER["head"].gguf, made.head)
    tensors.vector(f"{OUTER['final_norm'].gguf}.weight", made.final_norm)
    interleaved = FAMILIES[config.family].rows_interleaved
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads} if interleaved else {}
    for index, block in enumerate(made.blocks):
        for norm in NORMS:
            gain = getattr(block, norm.name)
            if gain is None and (norm.size == "hidden" or config.qk_norm):
                size = config.hidden_size if norm.size == "hidden" else config.head_dim
                gain = np.ones(size, np.float32)
            if gain is not None:
                tensors.vector(f"{name_in_block(index, norm, 'gguf')}.weight", gain)
        for slot in SLOTS:
            name = name_in_block(index, slot, "gguf")
            tensors.layer(name, block.linears[slot.name], heads.get(slot.name, 1))
    types = Counter(type for type, array in tensors.found.values() if array.ndim == 2)
    metadata["general.file_type"] = _FILE_TYPES[types.most_common(1)[0][0]]
    write_gguf(path, metadata, tensors.found, overwrite=overwrite)
    return tensors.changes(folding=model.residual_rotation is not None)


def _check_biases(model: Model, architecture: str) -> None:
    """Raise ValueError if a layer has a bias that llama.cpp does not know."""
    unknown = taps_with_bias(model) - ({"qkv"} if architecture != "llama" else set(TAPS))
    if unknown:
        names = ", ".join(slot.name for slot in SLOTS if slot.tap in unknown)
        raise ValueError(
            f"{names} have biases, but llama.cpp has none there in {architecture} models"
        )


def holds(format: Format | str) -> bool:
    """Return whether blocks hold matrices of a format without any change.

    Examples
    --------
    >>> [holds(format) for format in ("int4g32symz8", "int4g32", "int2g64", "nf4g64")]
    [True, True, True, False]
    """
    weight = np.random.default_rng(0).standard_normal((16, 256), np.float32)
    blocks = blocks_of(quantize(weight, format, range="minmax"))
    return blocks is not None and blocks.change == 0


def check_plan(layer: LayerPlan, rotation: str = "none", name: str = "format") -> None:
    """Raise ValueError unless a file holds layers of this plan as they are.

    Examples
    --------
    >>> check_plan(LayerPlan.parse("int4g32symz8"))
    >>> check_plan(LayerPlan.parse("int2g64 + rank16"))
    Traceback (most recent call last):
    ValueError: format is int2g64 + rank16, which a file for llama.cpp cannot hold unchanged; \
int4g32symz8, int4g32 and int8g32symz128 are its own
    """
    plain = len(layer.copies) == 1 and not layer.rank
    if not (plain and holds(layer.copies[0].format)):
        raise ValueError(
            f"{name} is {layer}, which a file for llama.cpp cannot hold unchanged; "
            "int4g32symz8, int4g32 and int8g32symz128 are its own"
        )
    if rotation != "none":
        raise ValueError(f"rotation is {rotation}, but llama.cpp does not rotate inputs of layers")


def only_tensor(layer: AnyLinear) -> QuantizedTensor | None:
    """Return the matrix of a layer that is nothing but one, packed, and a bias."""
    if not isinstance(layer, QuantizedLinear) or len(layer.copies) != 1 or layer.adapter:
        return None
    [copy] = layer.copies
    others = (copy.rotation, copy.output_rotation, copy.weight)
    return copy.tensor if all(other is None for other in others) else None


class _Tensors:
    """The tensors of a file, and what storing them changed."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.found: Tensors = {}
        self.decoded: list[str] = []
        self.scales: list[str] = []

    def vector(self, name: str, values: NDArray[np.float32]) -> None:
        self.found[name] = "F32", values

    def layer(self, name: str, layer: AnyLinear, heads: int = 1) -> None:
        """Add a layer's matrix and bias; with several heads, rows that rotate together pair up."""
        type, contents = self._matrix(name, layer)
        paired = (lambda rows: interleave(rows, heads)) if heads > 1 else lambda rows: rows
        self.found[f"{name}.weight"] = type, paired(contents)
        if layer.bias is not None:
            self.vector(f"{name}.bias", paired(layer.bias))

    def _matrix(self, name: str, layer: AnyLinear) -> tuple[str, NDArray[Any]]:
        tensor = only_tensor(layer)
        blocks = None if tensor is None else blocks_of(tensor)
        if blocks is not None:
            self.scales += [name] if blocks.change else []
            return blocks.type, blocks.raw
        weight = dense(layer).weight
        if not are_exact([weight], self.dtype):
            self.decoded.append(name)
        values = rounded(weight, self.dtype, name)
        return _TYPES[self.dtype], values.view(np.uint8) if self.dtype == "bfloat16" else values

    def changes(self, *, folding: bool) -> list[str]:
        """Return the changes in words."""
        found = [
            "the rotation of the model is multiplied into the embedding and the head"
        ] * folding
        if self.scales:
            found.append(f"scales are rounded, by up to 2^-9 of a weight: {some(self.scales)}")
        if self.decoded:
            found.append(f"decoded and rounded to {self.dtype}: {some(self.decoded)}")
        return found


def some(names: list[str]) -> str:
    """Return the first three names and the number of the others."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
