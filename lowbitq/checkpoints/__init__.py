"""Reading and writing of names, arrays and metadata in files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lowbitq.checkpoints.gguf import GGUFFile, read_gguf
from lowbitq.checkpoints.mapping import MappedFile, TensorInfo
from lowbitq.checkpoints.packed import PackedFolder, is_packed, read_packed
from lowbitq.checkpoints.safetensors import CONFIG, SafetensorsFolder, read_folder

__all__ = [
    "GGUFFile",
    "PackedFolder",
    "SafetensorsFolder",
    "TensorInfo",
    "open_checkpoint",
    "read_folder",
    "read_gguf",
    "read_packed",
]

# The files of a repository that a model needs: no weights in other formats, no images.
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]


def open_checkpoint(path: str | os.PathLike[str]) -> GGUFFile | SafetensorsFolder | PackedFolder:
    """Open a model of any of the three kinds.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, a Hugging Face folder, the folder of a saved quantized model, or, if no such
        path exists, the name of a repository on the Hugging Face hub, ``"owner/name"``.

    Returns
    -------
    GGUFFile, SafetensorsFolder or PackedFolder

    Raises
    ------
    OSError
        If neither such a path nor such a repository exists, or a file cannot be opened.
    FormatError
        If a file is damaged.

    Examples
    --------
    >>> open_checkpoint("absent.gguf")
    Traceback (most recent call last):
    FileNotFoundError: absent.gguf: no such file or folder
    """
    folder = Path(path)
    if not folder.exists():
        folder = _download(os.fspath(path))
    if not folder.is_dir():
        return read_gguf(folder)
    if is_packed(MappedFile(folder / CONFIG).json()):
        return read_packed(folder)
    return read_folder(folder)


def _download(name: str) -> Path:
    """Return the local copy of a repository on the hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    # The hub's client passes on its network library's exceptions; all mean the same here.
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        why = f"no such file or folder, and not available from the Hugging Face hub ({error})"
        raise FileNotFoundError(f"{name}: {why}") from error
