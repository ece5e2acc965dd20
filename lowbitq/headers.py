"""What the file or folder of a model says about itself, without reading its weights."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowbitq._core import FormatError
from lowbitq.checkpoints import GGUFFile, TensorInfo, find_checkpoint, read_packed
from lowbitq.checkpoints.gguf import read_gguf_header
from lowbitq.checkpoints.mapping import MappedFile, elements
from lowbitq.checkpoints.packed import PackedFolder, is_packed
from lowbitq.checkpoints.safetensors import (
    CONFIG,
    INDEX,
    SINGLE,
    read_index,
    read_safetensors_header,
)
from lowbitq.models.config import ModelConfig
from lowbitq.models.config_hf import config_from_hf
from lowbitq.models.families import FAMILIES
from lowbitq.models.loading import config_of_gguf
from lowbitq.models.slots import OUTER, SLOTS
from lowbitq.models.tokenizer_folder import OTHER_FORMS
from lowbitq.tables import as_text, columns_of

# How tokenizer.json names the kind of its model; the file may have 17 MB, most of it words.
_TOKENIZER_MODEL = re.compile(rb'"model"\s*:\s*\{\s*"type"\s*:\s*"(\w+)"')
_CONFIG_TEMPLATE = re.compile(rb'"chat_template"\s*:\s*["\[]')

_MODELS = {"gpt2": "byte-level BPE", "llama": "SentencePiece BPE"}


@dataclass(frozen=True)
class Header:
    """What a file or folder says about its model; prints as a few lines.

    Attributes
    ----------
    path : Path
    kind : str
        ``"GGUF"``, ``"Hugging Face"`` or ``"lowbitq"``.
    file_type : str
        What the weights are mostly, in the file's own words.
    architecture, name : str
    config : ModelConfig or None
        None if the decoder cannot run the model.
    context_length : int or None
    rope : dict
        ``theta``, and ``scaling`` if there is one.
    tokenizer, chat_template : str, bool
        Its kind, ``""`` if there is none; whether there is a template for conversations.
    tensors : list of dict
        ``type``, ``tensors`` (their number) and ``bytes``, the largest first.
    parameters : int or None
        Number of weights.
    size_bytes : int
        Of all tensors.
    bits_per_weight : float or None
        Stored bits per weight of the linear layers.
    layers : list of dict
        The report of a model saved by lowbitq.
    provenance : dict
    problems : list of str
        Why the model does not load: what the decoder lacks, or what is damaged.
    """

    path: Path
    kind: str
    file_type: str
    architecture: str
    name: str
    config: ModelConfig | None
    context_length: int | None
    rope: dict[str, Any]
    tokenizer: str
    chat_template: bool
    tensors: list[dict[str, Any]]
    parameters: int | None
    size_bytes: int
    bits_per_weight: float | None
    layers: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as JSON can hold them; ``config`` has Hugging Face's keys."""
        config = None if self.config is None else self.config.to_hf()
        return {**vars(self), "path": str(self.path), "config": config}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, {self.file_type}, {self.size_bytes / 1e6:.1f} MB"]
        lines += [f"{name:13}{text}" for name, text in self._rows() if text]
        lines += ["", as_text(["type", "tensors", "bytes"], self.tensors)]
        if self.layers:
            lines += ["", as_text(columns_of(self.layers, without=["sha256"]), self.layers)]
        return "\n".join([*lines, *(f"does not load: {problem}" for problem in self.problems)])

    def _rows(self) -> Iterable[tuple[str, str]]:
        yield "name", self.name
        yield "architecture", self.architecture + self._shape()
        yield "context", f"{self.context_length} tokens" if self.context_length else ""
        yield "rope", ", ".join(f"{key} {_number(value)}" for key, value in self.rope.items())
        template = "a chat template" if self.chat_template else "no chat template"
        yield "tokenizer", f"{self.tokenizer or 'none'}, {template}"
        if self.bits_per_weight is not None:
            yield "bits", f"{self.bits_per_weight:.3f} bits per weight of the linear layers"

    def _shape(self) -> str:
        count = "" if self.parameters is None else f", {self.parameters / 1e6:.1f}M parameters"
        c = self.config
        if c is None:
            return count
        return (
            f": {c.layers} layers, hidden {c.hidden_size}, ffn {c.intermediate_size}, "
            f"heads {c.heads}/{c.kv_heads}{count}"
        )


def read_header(path: str | os.PathLike[str]) -> Header:
    """Describe a model by its headers; weights are neither read nor checked.

    Parameters
    ----------
    path : str or path-like
        As for `lowbitq.load`. Data that is cut off, and models that the decoder cannot run, are
        described too, with their `problems`.

    Returns
    -------
    Header

    Raises
    ------
    OSError
        If a file is missing or cannot be opened.
    FormatError
        If a header is damaged.

    Examples
    --------
    >>> print(read_header("SmolLM2-135M-Instruct.Q4_1.gguf"))  # doctest: +SKIP
    SmolLM2-135M-Instruct.Q4_1.gguf: GGUF, MOSTLY_Q4_1, 98.9 MB
    name         Smollm2 135M 8k Lc100K Mix1 Ep2
    architecture llama: 30 layers, hidden 576, ffn 1536, heads 9/3, 134.5M parameters
    ...
    """
    found = find_checkpoint(path)
    if not found.is_dir():
        return _of_gguf(read_gguf_header(found))
    config = MappedFile(found / CONFIG).json()
    if is_packed(config):
        return _of_packed(read_packed(found, verify=False))
    return _of_folder(found, config)


def _of_gguf(source: GGUFFile) -> Header:
    metadata, problems = source.metadata, []
    try:
        source.check()
    except FormatError as error:
        problems.append(str(error))
        # The one tensor that the configuration needs; it may be among those that are cut off.
        kept = {name: t for name, t in source.tensors.items() if name != "rope_freqs.weight"}
        source = replace(source, tensors=kept)
    architecture = str(metadata.get("general.architecture", ""))

    def key(name: str) -> Any:
        return metadata.get(f"{architecture}.{name}")

    config = _config(lambda: config_of_gguf(source), problems)
    scaling = key("rope.scaling.type")
    rope = {"theta": key("rope.freq_base"), "scaling": None if scaling == "none" else scaling}
    return Header(
        source.path,
        "GGUF",
        source.file_type or "of no known file type",
        architecture,
        str(metadata.get("general.name", "")),
        config,
        key("context_length"),
        _rope(config, rope),
        _gguf_tokenizer(metadata),
        isinstance(metadata.get("tokenizer.chat_template"), str),
        **_stored(source.tensors.values(), [f"{outer.gguf}.weight" for outer in OUTER.values()]),
        problems=problems,
    )


def _gguf_tokenizer(metadata: Mapping[str, Any]) -> str:
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return ""
    rule = metadata.get("tokenizer.ggml.pre")
    words = metadata.get("tokenizer.ggml.tokens")
    told = [_MODELS.get(kind, str(kind)), f"rule {rule}" if rule else ""]
    told.append(f"{len(words)} tokens" if isinstance(words, list) else "")
    return ", ".join(filter(None, told))


def _of_folder(folder: Path, values: Mapping[str, Any]) -> Header:
    problems: list[str] = []
    tensors = _folder_tensors(folder, problems)
    if method := values.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        problems.append(f"its weights are quantized by {method!r:.40}")
    config = _config(lambda: _hf_config(values, folder), problems)
    return Header(
        folder,
        "Hugging Face",
        str(values.get("dtype") or values.get("torch_dtype") or "of no stated dtype"),
        str(values.get("model_type", "")),
        str(values.get("_name_or_path", "")),
        config,
        values.get("max_position_embeddings"),
        _rope(config, {"theta": values.get("rope_theta"), "scaling": values.get("rope_scaling")}),
        *_folder_tokenizer(folder),
        **_stored(tensors, [f"{outer.hf}.weight" for outer in OUTER.values()]),
        problems=problems,
    )


def _folder_tensors(folder: Path, problems: list[str]) -> list[TensorInfo]:
    """Return the tensors of all files that are there; add what is missing or cut off."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        names = [SINGLE]
    else:
        names = sorted(set(read_index(MappedFile(folder / INDEX)).values()))
    tensors: list[TensorInfo] = []
    for name in names:
        if not (folder / name).exists():
            problems.append(f"{folder / name} is missing")
            continue
        file = read_safetensors_header(folder / name)
        tensors += file.tensors.values()
        try:
            file.check()
        except FormatError as error:
            problems.append(str(error))
    return tensors


def _folder_tokenizer(folder: Path | PackedFolder) -> tuple[str, bool]:
    """Return the kind of a folder's tokenizer, and whether there is a chat template."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    text = config.read_bytes() if config.is_file() else b""
    template = (folder / "chat_template.jinja").is_file() or bool(_CONFIG_TEMPLATE.search(text))
    if not file.is_file():
        return ", ".join(name for name in OTHER_FORMS if (folder / name).is_file()), template
    kind = _TOKENIZER_MODEL.search(file.read_bytes())
    return kind[1].decode() if kind else "tokenizer.json", template


def _of_packed(source: PackedFolder) -> Header:
    config = _hf_config(source.config, source.path)
    entry, report = source.config["quantization_config"], source.json("report.json")
    layers = report.get("layers", [])
    formats = Counter(str(row.get("format", "dense")) for row in layers)
    tensors = list(source.tensors.values())
    plain = sum(elements(t.shape) for t in tensors if t.name.endswith(("norm.weight", ".bias")))
    matrices = sum(rows * cols for rows, cols in (slot.shape(config) for slot in SLOTS))
    ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    stored = _stored(tensors, [])
    stored |= {"parameters": plain + config.layers * matrices + ends}
    stored |= {"bits_per_weight": entry.get("bits_per_weight", report.get("bits_per_weight"))}
    return Header(
        source.path,
        "lowbitq",
        ", ".join(name for name, _ in formats.most_common(3)),
        config.family,
        config.name,
        config,
        config.max_positions,
        _rope(config, {}),
        *_folder_tokenizer(source),
        **stored,
        layers=layers,
        provenance=source.json("provenance.json"),
    )


def _hf_config(values: Mapping[str, Any], folder: Path) -> ModelConfig:
    return config_from_hf(values, FAMILIES, str(folder / CONFIG))


def _config(make: Any, problems: list[str]) -> ModelConfig | None:
    """Return the configuration; None, and a problem, if the decoder cannot run the model."""
    try:
        found: ModelConfig = make()
    except ValueError as error:
        problems.append(str(error))
        return None
    return found


def _rope(config: ModelConfig | None, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return base and scaling, from the configuration if there is one, else as the file says."""
    if config is not None:
        scaling = config.rope_scaling
        told = {"theta": config.rope_theta, "scaling": scaling and _short(scaling)}
    return {key: value for key, value in told.items() if value is not None}


def _number(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _short(scaling: Mapping[str, Any]) -> str:
    """Return rope scaling in a few words: its type and the factors that are single numbers."""
    numbers = {k: v for k, v in scaling.items() if isinstance(v, (int, float)) and "factor" in k}
    return " ".join([str(scaling["rope_type"]), *(f"{k}={v:g}" for k, v in numbers.items())])


def _stored(tensors: Iterable[TensorInfo], outer: Iterable[str]) -> dict[str, Any]:
    """Return what the list of tensors says: numbers and bytes by type, weights, bits."""
    tensors, outer = list(tensors), set(outer)
    counts, sizes = Counter(t.dtype for t in tensors), Counter[str]()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    inner = [t for t in tensors if len(t.shape) > 1 and t.name not in outer]
    weights = sum(elements(t.shape) for t in inner)
    return {
        "tensors": [
            {"type": kind, "tensors": counts[kind], "bytes": size}
            for kind, size in sizes.most_common()
        ],
        "parameters": sum(elements(t.shape) for t in tensors) or None,
        "size_bytes": sum(sizes.values()),
        "bits_per_weight": 8 * sum(t.nbytes for t in inner) / weights if weights else None,
    }
