"""Model families, and load(), which makes a Model of a file or folder."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.checkpoints import GGUFFile, PackedFolder, SafetensorsFolder, open_checkpoint
from lowbitq.linears import Linear
from lowbitq.models import llama, qwen
from lowbitq.models.config import Family, ModelConfig, config_from_gguf, config_from_hf
from lowbitq.models.decoder import EMBEDDING, HEAD, AnyLinear, Block, Cache, Model
from lowbitq.models.llama import GGUF_BLOCK, HF_BLOCK, LINEAR_NAMES, NORM_NAMES, OUTER_NAMES
from lowbitq.models.quantized import (
    RESIDUAL_ROTATION,
    QuantizedModel,
    Report,
    join_linear,
    join_rotation,
)
from lowbitq.models.tokenizer import Tokenizer
from lowbitq.models.tokenizer_folder import OTHER_FORMS
from lowbitq.rotations import Rotation

__all__ = [
    "Block",
    "Cache",
    "Family",
    "Model",
    "ModelConfig",
    "QuantizedModel",
    "Report",
    "Tokenizer",
    "load",
]

AnyModel = TypeVar("AnyModel", bound=Model)

_FAMILIES = {family.name: family for family in (*llama.FAMILIES, *qwen.FAMILIES)}
# Two families may share an architecture's name in GGUF; the first stands for both.
_ARCHITECTURES = {family.architecture: family for family in reversed(_FAMILIES.values())}

# Tensors that say nothing new: tables of sines, and the frequencies that the configuration gives.
_DERIVED = ("rotary_emb.inv_freq", "rope_freqs.weight", "attn_rot_embd.weight")


def load(path: str | os.PathLike[str]) -> Model:
    """Load a model.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, a Hugging Face folder, a folder that `QuantizedModel.save` wrote, or the name
        of a repository on the Hugging Face hub.

    Returns
    -------
    Model
        Weights as float32; of a saved folder a QuantizedModel. Without a tokenizer where a
        folder has no ``tokenizer.json`` (with a warning where it has another form of tokenizer)
        or a GGUF file no vocabulary.

    Raises
    ------
    OSError
        If a file is missing or cannot be opened.
    FormatError
        If a file is damaged, or a tensor is missing or has another shape than the configuration
        says.
    ValueError
        If the decoder cannot run the model; lists all that differs.

    Examples
    --------
    >>> load("absent.gguf")
    Traceback (most recent call last):
    FileNotFoundError: absent.gguf: no such file or folder
    """
    source = open_checkpoint(path)
    if isinstance(source, GGUFFile):
        return _from_gguf(source)
    if isinstance(source, SafetensorsFolder):
        return _from_hf(source)
    return _from_packed(source)


def _from_hf(source: SafetensorsFolder) -> Model:
    config = config_from_hf(source.config, _FAMILIES, str(source.path / "config.json"))
    return _assemble(_Tensors(source, config, 0), _tokenizer_in(source.path), Model)


def _from_packed(source: PackedFolder) -> QuantizedModel:
    where = str(source.path / "config.json")
    tensors = _PackedTensors(source, config_from_hf(source.config, _FAMILIES, where))
    return _assemble(
        tensors,
        _tokenizer_in(source.path),
        QuantizedModel,
        residual_rotation=tensors.residual_rotation(),
        provenance=source.json("provenance.json"),
        plan=source.json("plan.json") if (source.path / "plan.json").is_file() else None,
        records=tensors.records(),
    )


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_folder(folder)
    others = [name for name in OTHER_FORMS if (folder / name).is_file()]
    if others:
        warnings.warn(
            f"{folder} has no tokenizer.json, the one form that is read, but {', '.join(others)}: "
            "the model is loaded without a tokenizer",
            stacklevel=4,
        )
    return None


def _from_gguf(source: GGUFFile) -> Model:
    where, tensors = str(source.path), source.tensors
    embedding, head = (OUTER_NAMES[name][1] for name in ("embedding", "head"))
    if embedding not in tensors or len(tensors[embedding].shape) != 2:
        raise FormatError(f"{where}: tensor {embedding!r} is missing or no matrix")
    config = config_from_gguf(
        source.metadata,
        _ARCHITECTURES,
        vocab_size=tensors[embedding].shape[0],
        tie_embeddings=head not in tensors,
        attention_bias=GGUF_BLOCK.format(0, "attn_q.bias") in tensors,
        rope_factors=source.load("rope_freqs.weight") if "rope_freqs.weight" in tensors else None,
        where=where,
    )
    has_tokenizer = "tokenizer.ggml.model" in source.metadata
    return _assemble(
        _Tensors(source, config, 1),
        Tokenizer.from_gguf(source.metadata, source=where) if has_tokenizer else None,
        Model,
    )


class _Tensors:
    """The tensors of a checkpoint under this package's names, their shapes checked."""

    def __init__(
        self, source: GGUFFile | SafetensorsFolder | PackedFolder, config: ModelConfig, naming: int
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
        return self.take(OUTER_NAMES[name][self.naming], *shape)

    def embedding(self) -> AnyLinear:
        return Linear(self.outer("embedding", self.config.vocab_size, self.config.hidden_size))

    def head(self) -> AnyLinear:
        return Linear(self.outer("head", self.config.vocab_size, self.config.hidden_size))

    def norm(self, index: int, name: str, size: int) -> NDArray[np.float32] | None:
        return self.take(f"{self.in_block(index, NORM_NAMES[name])}.weight", size)

    def linear(self, index: int, name: str, rows: int, cols: int) -> AnyLinear:
        full = self.in_block(index, LINEAR_NAMES[name])
        weight = self.take(f"{full}.weight", rows, cols)
        needs_bias = self.config.attention_bias and name in ("q_proj", "k_proj", "v_proj")
        has_bias = f"{full}.bias" in self.source.tensors
        bias = self.take(f"{full}.bias", rows) if needs_bias or has_bias else None
        if self.naming == 1 and _FAMILIES[self.config.family].rows_interleaved:
            heads = {"q_proj": self.config.heads, "k_proj": self.config.kv_heads}.get(name)
            if heads is not None:
                weight = llama.uninterleave(weight, heads)
                bias = None if bias is None else llama.uninterleave(bias, heads)
        return Linear(weight, bias)

    def in_block(self, index: int, names: tuple[str, str]) -> str:
        return (HF_BLOCK, GGUF_BLOCK)[self.naming].format(index, names[self.naming])

    def refuse_unused(self) -> None:
        """Raise ValueError if there are tensors that the decoder would ignore."""
        unused = sorted(name for name in self.unused if not name.endswith(_DERIVED))
        if self.config.tie_embeddings:
            unused = [name for name in unused if name not in OUTER_NAMES["head"]]
        if unused:
            some = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            raise ValueError(
                f"{self.source.path}: the model is not supported: {len(unused)} tensors have no "
                f"place in a {self.config.family} model: {some}"
            )


class _PackedTensors(_Tensors):
    """The same of a saved model, whose layers are described in its configuration."""

    source: PackedFolder

    def __init__(self, source: PackedFolder, config: ModelConfig) -> None:
        super().__init__(source, config, 0)
        self.entry = source.config["quantization_config"]
        with self.naming_errors("layers"):
            # The first folders, in which the embedding is always dense, do not describe it.
            self.layers = {EMBEDDING: {}, **self.entry["layers"]}

    def embedding(self) -> AnyLinear:
        embedding = self.join(EMBEDDING, self.config.vocab_size, self.config.hidden_size)
        with self.naming_errors(EMBEDDING):
            if embedding.bias is not None:
                raise ValueError("has a bias, expected none")
        return embedding

    def head(self) -> AnyLinear:
        return self.join(HEAD, self.config.vocab_size, self.config.hidden_size)

    def norm(self, index: int, name: str, size: int) -> NDArray[np.float32] | None:
        full = f"{self.in_block(index, NORM_NAMES[name])}.weight"
        return super().norm(index, name, size) if full in self.source.tensors else None

    def linear(self, index: int, name: str, rows: int, cols: int) -> AnyLinear:
        return self.join(self.in_block(index, LINEAR_NAMES[name]), rows, cols)

    def join(self, name: str, rows: int, cols: int) -> AnyLinear:
        """Return the layer of this name, which must have this shape."""
        with self.naming_errors(name):
            linear = join_linear(self.source, name, self.layers[name])
            if linear.shape != (rows, cols):
                raise ValueError(f"shape is {linear.shape}, expected {(rows, cols)}")
        self.unused -= {tensor for tensor in self.unused if tensor.startswith(f"{name}.")}
        return linear

    def residual_rotation(self) -> Rotation | None:
        self.unused.discard(f"{RESIDUAL_ROTATION}.matrix")
        with self.naming_errors(RESIDUAL_ROTATION):
            return join_rotation(self.source, RESIDUAL_ROTATION, self.entry["residual_rotation"])

    def records(self) -> dict[str, dict[str, Any]]:
        report = self.source.json("report.json")
        with self.naming_errors("layers", file="report.json"):
            return {row["layer"]: row for row in report["layers"]}

    @contextlib.contextmanager
    def naming_errors(self, name: str, file: str = "config.json") -> Iterator[None]:
        """Turn what wrong contents cause into an error that names the file and the layer."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = self.source.path / file
            raise FormatError(f"{where}: {name}: {error}") from error


def _assemble(
    tensors: _Tensors, tokenizer: Tokenizer | None, kind: Callable[..., AnyModel], **more: Any
) -> AnyModel:
    c = tensors.config
    more.setdefault("provenance", {"source": str(Path(tensors.source.path).resolve())})
    model = kind(
        config=c,
        tokenizer=tokenizer,
        embedding=tensors.embedding(),
        blocks=[_block(tensors, index) for index in range(c.layers)],
        final_norm=tensors.outer("final_norm", c.hidden_size),
        head=None if c.tie_embeddings else tensors.head(),
        **more,
    )
    tensors.refuse_unused()
    return model


def _block(tensors: _Tensors, index: int) -> Block:
    c = tensors.config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {
        "q_proj": (q, c.hidden_size),
        "k_proj": (kv, c.hidden_size),
        "v_proj": (kv, c.hidden_size),
        "o_proj": (c.hidden_size, q),
        "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
    }
    return Block(
        attention_norm=tensors.norm(index, "attention_norm", c.hidden_size),
        mlp_norm=tensors.norm(index, "mlp_norm", c.hidden_size),
        linears={name: tensors.linear(index, name, *shape) for name, shape in shapes.items()},
        query_norm=tensors.norm(index, "query_norm", c.head_dim) if c.qk_norm else None,
        key_norm=tensors.norm(index, "key_norm", c.head_dim) if c.qk_norm else None,
    )
