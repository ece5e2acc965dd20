"""load(): read a Model from a file or folder."""

from __future__ import annotations

import contextlib
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.checkpoints import GGUFFile, PackedFolder, SafetensorsFolder, open_checkpoint
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.config import ModelConfig
from lowbitq.models.config_gguf import config_from_gguf
from lowbitq.models.config_hf import config_from_hf
from lowbitq.models.decoder import AnyLinear, Block, Model
from lowbitq.models.families import ARCHITECTURES, FAMILIES, uninterleave
from lowbitq.models.quantized import RESIDUAL_ROTATION, QuantizedModel
from lowbitq.models.slots import (
    EMBEDDING,
    HEAD,
    NORMS,
    OUTER,
    SLOTS,
    Norm,
    Slot,
    name_in_block,
    sizes_of,
)
from lowbitq.models.stored import LayerReader
from lowbitq.models.tokenizer import Tokenizer
from lowbitq.models.tokenizer_folder import OTHER_FORMS
from lowbitq.plans import Plan
from lowbitq.rotations import Rotation

AnyModel = TypeVar("AnyModel", bound=Model)

# Redundant tensors: tables of sines, and frequencies that the configuration defines.
_DERIVED = ("rotary_emb.inv_freq", "rope_freqs.weight", "attn_rot_embd.weight")


def load(
    path: str | os.PathLike[str],
    *,
    bits: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, a Hugging Face folder, a folder that `QuantizedModel.save` wrote, or the name
        of a repository on the Hugging Face hub, or of a file in one, ``"owner/name:file.gguf"``.
    bits : float, default=None
        Of a saved model with residual copies, run only as many copies of each layer as have codes
        of at most this many bits in all. None: all.
    revision : str, default=None
        Branch, tag or commit of the repository. None: the main branch.
    token : str, default=None
        For a repository with restricted access. None: the one that the hub's client has stored.

    Returns
    -------
    Model
        Weights are float32; a saved folder gives a QuantizedModel. There is no tokenizer if a
        folder has no ``tokenizer.json`` (with a warning if it has another form of tokenizer) or a
        GGUF file has no vocabulary.

        A Hugging Face folder is read as transformers reads it: biases that its configuration
        disables are left out, and a tied ``lm_head.weight`` that differs from the embedding is the
        head. From a GGUF file, every bias and head present is used.

    Raises
    ------
    OSError
        If a file is missing or cannot be opened.
    FormatError
        If a file is damaged, or a tensor is missing or does not have the shape that the
        configuration implies.
    ValueError
        If the decoder cannot run the model; the message lists all differences. If `bits` is given
        for a float model, or for one with a layer whose first copy has more bits.

    Examples
    --------
    >>> load("absent.gguf")
    Traceback (most recent call last):
    FileNotFoundError: absent.gguf: no such file or folder
    """
    source = open_checkpoint(path, revision=revision, token=token)
    if isinstance(source, PackedFolder):
        model = _from_packed(source)
        return model if bits is None else _narrow(model, bits, source)
    if bits is not None:
        raise ValueError(f"bits is {bits}, but {path} is not a saved quantized model")
    return _from_gguf(source) if isinstance(source, GGUFFile) else _from_hf(source)


def _narrow(model: QuantizedModel, bits: float, source: PackedFolder) -> QuantizedModel:
    """Keep the copies of each layer whose codes have at most this many bits in all."""
    counts = {}
    for name, linear in model.linears():
        if isinstance(linear, QuantizedLinear):
            rates = list(accumulate(copy.tensor.format.rate for copy in linear.copies))
            if rates[0] > bits:
                raise ValueError(f"bits is {bits}, but {name} of {source} has at least {rates[0]}")
            counts[name] = bisect_right(rates, bits)
    return model.with_copies(counts)


def _from_hf(source: SafetensorsFolder) -> Model:
    config = config_from_hf(source.config, FAMILIES, str(source.path / "config.json"))
    return _assemble(
        _Tensors(source, config, "hf"),
        _tokenizer_in(source.path),
        Model,
        provenance=_origin(source),
    )


def _from_packed(source: PackedFolder) -> QuantizedModel:
    where = str(source.path / "config.json")
    tensors = _PackedTensors(source, config_from_hf(source.config, FAMILIES, where))
    return _assemble(
        tensors,
        _tokenizer_in(source),
        QuantizedModel,
        residual_rotation=tensors.residual_rotation(),
        provenance=source.json("provenance.json"),
        plan=tensors.plan(),
        records=tensors.records(),
    )


def _tokenizer_in(folder: Path | PackedFolder) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_folder(folder)
    others = [name for name in OTHER_FORMS if (folder / name).is_file()]
    if others:
        warnings.warn(
            f"{folder} has no tokenizer.json, the only form supported, but {', '.join(others)}: "
            "the model is loaded without a tokenizer",
            stacklevel=4,
        )
    return None


def _origin(source: GGUFFile | SafetensorsFolder) -> dict[str, Any]:
    """Return the origin of weights. `save` adds the digests of the files, which are slow."""
    return {"source": str(Path(source.path).resolve()), "source_files": source.stamps()}


def _from_gguf(source: GGUFFile) -> Model:
    has_tokenizer = source.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    where = str(source.path)
    return _assemble(
        _Tensors(source, config_of_gguf(source), "gguf"),
        Tokenizer.from_gguf(source.metadata, source=where) if has_tokenizer else None,
        Model,
        provenance=_origin(source),
    )


def config_of_gguf(source: GGUFFile) -> ModelConfig:
    """Return the configuration of a GGUF file, as `config_from_gguf` does, by all its tensors."""
    where, tensors = str(source.path), source.tensors
    embedding, head = (f"{OUTER[name].gguf}.weight" for name in ("embedding", "head"))
    if embedding not in tensors or len(tensors[embedding].shape) != 2:
        raise FormatError(f"{where}: tensor {embedding!r} is missing or not a matrix")
    return config_from_gguf(
        source.metadata,
        ARCHITECTURES,
        vocab_size=tensors[embedding].shape[0],
        tie_embeddings=head not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        rope_factors=source.load("rope_freqs.weight") if "rope_freqs.weight" in tensors else None,
        where=where,
    )


class _Tensors:
    """The tensors of a checkpoint by this package's names, with checked shapes."""

    def __init__(
        self, source: GGUFFile | SafetensorsFolder | PackedFolder, config: ModelConfig, naming: str
    ) -> None:
        self.source, self.config, self.naming = source, config, naming
        self.unused = set(source.tensors)

    def take(self, name: str, *shape: int) -> NDArray[np.float32]:
        if name not in self.source.tensors:
            raise FormatError(f"{self.source.path}: tensor {name!r} is missing")
        found = self.source.tensors[name].shape
        if found != shape:
            raise FormatError(
                f"{self.source.path}: tensor {name!r} has shape {found}, expected {shape}"
            )
        self.unused.discard(name)
        return self.source.load(name)

    def outer(self, name: str, *shape: int) -> NDArray[np.float32]:
        return self.take(self.outer_name(name), *shape)

    def outer_name(self, name: str) -> str:
        return f"{getattr(OUTER[name], self.naming)}.weight"

    def embedding(self) -> AnyLinear:
        return Linear(self.outer("embedding", self.config.vocab_size, self.config.hidden_size))

    def head(self, embedding: AnyLinear) -> AnyLinear | None:
        """Return the head; None: the embedding."""
        if self.config.tie_embeddings and self.outer_name("head") not in self.unused:
            return None
        head = Linear(self.outer("head", self.config.vocab_size, self.config.hidden_size))
        stored_twice = (
            self.config.tie_embeddings
            and isinstance(embedding, Linear)
            and np.array_equal(head.weight, embedding.weight)
        )
        return None if stored_twice else head

    def norm(self, index: int, norm: Norm) -> NDArray[np.float32] | None:
        size = sizes_of(self.config)[norm.size]
        return self.take(f"{name_in_block(index, norm, self.naming)}.weight", size)

    def linear(self, index: int, slot: Slot) -> AnyLinear:
        full, shape = name_in_block(index, slot, self.naming), slot.shape(self.config)
        weight = self.take(f"{full}.weight", *shape)
        bias = self.take(f"{full}.bias", shape[0]) if self.has_bias(full, slot) else None
        if self.naming == "gguf" and FAMILIES[self.config.family].rows_interleaved:
            heads = {"q_proj": self.config.heads, "k_proj": self.config.kv_heads}.get(slot.name)
            if heads is not None:
                weight = uninterleave(weight, heads)
                bias = None if bias is None else uninterleave(bias, heads)
        return Linear(weight, bias)

    def scales(self, index: int) -> dict[str, float]:
        """Return the factors of what the halves of a block add."""
        return {}

    def has_bias(self, full: str, slot: Slot) -> bool:
        """Whether a layer has a bias, by the configuration or, in a GGUF file, by the tensors."""
        c, of_qkv = self.config, slot.tap == "qkv"
        if self.naming == "gguf":
            return (c.attention_bias and of_qkv) or f"{full}.bias" in self.source.tensors
        self.unused.discard(f"{full}.bias")
        if of_qkv:
            return c.attention_bias
        if slot.tap == "o":
            return c.attention_bias and FAMILIES[c.family].qkv_bias is None
        return c.mlp_bias

    def refuse_unused(self) -> None:
        """Raise ValueError if there are tensors that the decoder would ignore."""
        unused = sorted(name for name in self.unused if not name.endswith(_DERIVED))
        if unused:
            some = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            raise ValueError(
                f"{self.source.path}: the model is not supported: {len(unused)} tensors have no "
                f"place in a {self.config.family} model: {some}"
            )


class _PackedTensors(_Tensors):
    """The tensors of a saved model, whose configuration describes its layers."""

    source: PackedFolder

    def __init__(self, source: PackedFolder, config: ModelConfig) -> None:
        super().__init__(source, config, "hf")
        self.entry = source.config["quantization_config"]
        self.reader = LayerReader(source)
        with self.naming_errors("layers"):
            # Folders of the first version do not describe the embedding, which is always dense.
            self.layers = {EMBEDDING: {}, **self.entry["layers"]}

    def embedding(self) -> AnyLinear:
        embedding = self.join(EMBEDDING, self.config.vocab_size, self.config.hidden_size)
        with self.naming_errors(EMBEDDING):
            if embedding.bias is not None:
                raise ValueError("has a bias, expected none")
        return embedding

    def head(self, embedding: AnyLinear) -> AnyLinear | None:
        if self.config.tie_embeddings:
            return None
        return self.join(HEAD, self.config.vocab_size, self.config.hidden_size)

    def norm(self, index: int, norm: Norm) -> NDArray[np.float32] | None:
        full = f"{name_in_block(index, norm)}.weight"
        return super().norm(index, norm) if full in self.source.tensors else None

    def linear(self, index: int, slot: Slot) -> AnyLinear:
        return self.join(name_in_block(index, slot), *slot.shape(self.config))

    def scales(self, index: int) -> dict[str, float]:
        if "blocks" not in self.entry:  # format version 2
            return {}
        with self.naming_errors(f"blocks[{index}]"):
            scales = self.entry["blocks"][index]
            found = {name: scales[name] for name in ("attention_scale", "mlp_scale")}
            if set(scales) != set(found) or not all(
                isinstance(scale, (int, float)) and abs(scale) <= 1e6 for scale in found.values()
            ):
                raise ValueError(f"is {scales!r:.80}, expected attention_scale and mlp_scale")
        return {name: float(scale) for name, scale in found.items()}

    def join(self, name: str, rows: int, cols: int) -> AnyLinear:
        """Return the layer of this name; it must have this shape."""
        with self.naming_errors(name):
            linear = self.reader.layer(name, self.layers[name])
            if linear.shape != (rows, cols):
                raise ValueError(f"shape is {linear.shape}, expected {(rows, cols)}")
        self.unused -= self.reader.used
        return linear

    def residual_rotation(self) -> Rotation | None:
        with self.naming_errors(RESIDUAL_ROTATION):
            entry = self.entry["residual_rotation"]
            rotation = self.reader.rotation(RESIDUAL_ROTATION, entry, self.config.hidden_size)
        self.unused -= self.reader.used
        return rotation

    def plan(self) -> Plan | None:
        if not (self.source / "plan.json").is_file():
            return None
        values = self.source.json("plan.json")
        with self.naming_errors("plan", file="plan.json"):
            return Plan.from_dict(values)

    def records(self) -> dict[str, dict[str, Any]]:
        report = self.source.json("report.json")
        with self.naming_errors("layers", file="report.json"):
            return {row["layer"]: row for row in report["layers"]}

    @contextlib.contextmanager
    def naming_errors(self, name: str, file: str = "config.json") -> Iterator[None]:
        """Turn an error caused by wrong contents into one that names the file and the layer."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            where = self.source.path / file
            raise FormatError(f"{where}: {name}: {error}") from error


def _assemble(
    tensors: _Tensors, tokenizer: Tokenizer | None, kind: Callable[..., AnyModel], **more: Any
) -> AnyModel:
    c = tensors.config
    embedding = tensors.embedding()
    head = tensors.head(embedding)
    model = kind(
        config=replace(c, tie_embeddings=head is None),
        tokenizer=tokenizer,
        embedding=embedding,
        blocks=[_block(tensors, index) for index in range(c.layers)],
        final_norm=tensors.outer("final_norm", c.hidden_size),
        head=head,
        **more,
    )
    tensors.refuse_unused()
    return model


def _block(tensors: _Tensors, index: int) -> Block:
    has_norm = {"query_norm": tensors.config.qk_norm, "key_norm": tensors.config.qk_norm}
    norms: dict[str, Any] = {
        norm.name: tensors.norm(index, norm) if has_norm.get(norm.name, True) else None
        for norm in NORMS
    }
    linears = {slot.name: tensors.linear(index, slot) for slot in SLOTS}
    rope = tensors.config.rope_layers
    return Block(
        linears=linears,
        rope=rope is None or rope[index],
        **(norms | tensors.scales(index)),
    )
