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
    "find_checkpoint",
    "open_checkpoint",
    "read_folder",
    "read_gguf",
    "read_packed",
]

# The files of a repository that a model needs: no weights in other formats, no images.
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]


def open_checkpoint(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> GGUFFile | SafetensorsFolder | PackedFolder:
    """Open a model of any of the three kinds.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, a Hugging Face folder, the folder of a saved quantized model, or, if no such
        path exists, the name of a repository on the Hugging Face hub, ``"owner/name"``, or of a
        file in it, ``"owner/name:file.gguf"``.
    revision : str, default=None
        Branch, tag or commit of the repository. None: the main branch.
    token : str, default=None
        For a repository with restricted access. None: the one that the hub's client has stored.

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
    found = find_checkpoint(path, revision=revision, token=token)
    if not found.is_dir():
        return read_gguf(found)
    if is_packed(MappedFile(found / CONFIG).json()):
        return read_packed(found)
    return read_folder(found)


def find_checkpoint(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Return where a model lies here, after a download if needed; see `open_checkpoint`."""
    found = Path(path)
    if not found.exists():
        return _download(os.fspath(path), revision, token)
    if revision is not None or token is not None:
        raise ValueError(f"revision and token are for the Hugging Face hub, but {path} is here")
    return found


def _download(name: str, revision: str | None, token: str | None) -> Path:
    """Return the local copy of a repository on the hub, or of one GGUF file in it."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-][\w./-]*\.gguf))?", name)
    if match is None or match[1].endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or folder")
    from huggingface_hub import hf_hub_download, snapshot_download

    # The hub's client passes on its network library's exceptions; all mean the same here.
    try:
        if match[2]:
            return Path(hf_hub_download(match[1], match[2], revision=revision, token=token))
        return Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, revision=revision, token=token)
        )
    except Exception as error:
        why = f"no such file or folder, and not available from the Hugging Face hub ({error})"
        raise FileNotFoundError(f"{name}: {why}") from error
