"""export(): write a model for other programs, and say what that changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbitq.estimates import Perplexity
from lowbitq.evaluation import perplexity
from lowbitq.integer_folders import write_compressed_tensors, write_gptq
from lowbitq.linears import QuantizedLinear
from lowbitq.llama_cpp import write_llama_cpp
from lowbitq.models.decoder import Model
from lowbitq.models.loading import load
from lowbitq.models.plain import plain, write_hf
from lowbitq.texts import Text, settled

TARGETS = ("hf", "gguf", "compressed-tensors", "gptq")


# Those that `load` reads.
_READ_BACK = ("hf", "gguf")


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes
    ----------
    path : Path
    to : str
    nbytes : int
        Size of the file, or of all files of the folder.
    changes : tuple of str
        How the weights in the file differ from the model's; empty: not at all.
    notes : tuple of str
        What else differs when another program runs them.
    before, after : Perplexity or None
        Of the model as it runs, and of what was written; None: not measured.
    """

    path: Path
    to: str
    nbytes: int
    changes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    before: Perplexity | None = None
    after: Perplexity | None = None

    @property
    def lossless(self) -> bool:
        """Whether the weights in the file are the model's, to the bit."""
        return not self.changes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return {
            "path": str(self.path),
            "to": self.to,
            "size_bytes": self.nbytes,
            "lossless": self.lossless,
            "changes": list(self.changes),
            "notes": list(self.notes),
            "perplexity": None
            if self.before is None or self.after is None
            else {"before": self.before.to_dict(), "after": self.after.to_dict()},
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.to}, {self.nbytes / 1e6:.1f} MB"]
        lines += self.changes or ["lossless: the weights are those of the model, to the bit"]
        lines += self.notes
        if self.before is not None and self.after is not None:
            lines.append(f"perplexity {self.before:.3f} before, {self.after:.3f} after")
        return "\n".join(lines)


def export(
    model: Model,
    path: str | os.PathLike[str],
    to: str = "hf",
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    check: Text | None = None,
    window: int = 2048,
    windows: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Export:
    """Write a model for other programs.

    Parameters
    ----------
    model : Model
        Float or quantized, rotated or not. Left unchanged.
    path : str or path-like
        Destination: a folder, or for ``"gguf"`` a file.
    to : {"hf", "gguf", "compressed-tensors", "gptq"}, default="hf"
        ``"hf"``: a Hugging Face folder of float weights, which are what the layers compute, without
        rotations. ``"gguf"``: a file for llama.cpp. Codes and scales of packed matrices are written
        as they are, into Q4_0, Q4_1, Q8_0, Q2_K, Q3_K or Q4_K; matrices that none of these holds,
        and those of layers that rotate their inputs, are decoded. ``"compressed-tensors"`` and
        ``"gptq"``: folders for transformers and vLLM with the integers and scales of formats such
        as ``int4g32symz8``; the former decodes other layers, the latter refuses them.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Of decoded and float weights. ``"auto"``: for ``"hf"`` the narrowest that holds all of them
        exactly, for the others float16.
    overwrite : bool, default=False
        Whether an earlier export at `path` may be replaced.
    check : text, default=None
        Measure the perplexity of this text before and after, if `to` is ``"hf"`` or ``"gguf"``; see
        `lowbitq.perplexity`, also for `window`, `windows` and `progress`.

    Returns
    -------
    Export
        What changed; it prints as a few lines.

    Raises
    ------
    FileExistsError
        If `path` exists and may not be replaced; it is not touched.
    OSError
        If something cannot be written; nothing is left behind.
    ValueError
        If `to` or `dtype` is unknown, a weight is too large for `dtype`, no layer fits, `check` is
        given for a folder that `load` cannot read, or the model has a bias, a scaling of rotary
        frequencies or a tokenizer that the other program has no place for.

    Examples
    --------
    >>> print(export(small, "smollm2-hf"))  # doctest: +SKIP
    smollm2-hf: hf, 538.1 MB
    rotations are multiplied into the weights, to rounding in float32
    inputs of layers are float, not rounded to 8 bits
    """
    if to not in TARGETS:
        raise ValueError(f"to is {to!r}, expected one of {', '.join(TARGETS)}")
    if check is not None and to not in _READ_BACK:
        raise ValueError(f"check reads the export back, which lowbitq cannot if to = {to!r}")
    path = Path(path)
    changes = _WRITERS[to](model, path, dtype, overwrite)
    before = after = None
    if check is not None:
        check = settled(check)
        cut: dict[str, Any] = {"window": window, "windows": windows, "progress": progress}
        before = perplexity(model, check, **cut)
        after = perplexity(load(path), check, **cut)
    return Export(path, to, _nbytes(path), tuple(changes), tuple(_notes(model)), before, after)


def _write_hf(model: Model, path: Path, dtype: str, overwrite: bool) -> list[str]:
    rotated = model.residual_rotation is not None or any(
        copy.rotation is not None or getattr(copy, "output_rotation", None) is not None
        for _, layer in model.matrices()
        for copy in (layer.copies if isinstance(layer, QuantizedLinear) else [layer])
    )
    exact = write_hf(plain(model), path, dtype, overwrite=overwrite)
    changes = ["rotations are multiplied into the weights, to rounding in float32"] * rotated
    return changes + [f"weights are rounded to {dtype}"] * (not exact)


def _write_gguf(model: Model, path: Path, dtype: str, overwrite: bool) -> list[str]:
    return write_llama_cpp(model, path, _half_unless_told(dtype), overwrite)


def _write_compressed_tensors(model: Model, path: Path, dtype: str, overwrite: bool) -> list[str]:
    return write_compressed_tensors(model, path, _half_unless_told(dtype), overwrite)


def _write_gptq(model: Model, path: Path, dtype: str, overwrite: bool) -> list[str]:
    return write_gptq(model, path, _half_unless_told(dtype), overwrite)


def _half_unless_told(dtype: str) -> str:
    return "float16" if dtype == "auto" else dtype


def _notes(model: Model) -> list[str]:
    """Say how rounded inputs of layers differ where other programs run the model."""
    bits = sorted(
        {
            copy.activation.bits
            for _, layer in model.matrices()
            if isinstance(layer, QuantizedLinear)
            for copy in layer.copies
            if copy.activation.bits is not None
        }
    )
    if not bits:
        return []
    some = " and ".join(map(str, bits))
    return [f"lowbitq rounds inputs of layers to {some} bits; other programs have their own way"]


_WRITERS = {
    "hf": _write_hf,
    "gguf": _write_gguf,
    "compressed-tensors": _write_compressed_tensors,
    "gptq": _write_gptq,
}


def _nbytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
