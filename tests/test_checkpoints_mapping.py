"""Mapped files: what is no file, and JSON that is large, deep or ambiguous."""

from __future__ import annotations

import os
import time

import pytest

from lowbitq import FormatError
from lowbitq.checkpoints import open_checkpoint, read_folder, read_gguf
from lowbitq.checkpoints.mapping import MappedFile

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"
)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_bytes_of_a_file(tmp_path):
    file = MappedFile(written(tmp_path / "a", b"abc"))
    assert file.data.tolist() == [97, 98, 99]
    assert file.crc32(0, 3) == "352441c2"
    with pytest.raises(FormatError, match="byte 0: the file is empty"):
        MappedFile(written(tmp_path / "b", b""))
    with pytest.raises(IsADirectoryError):
        MappedFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "absent")


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    """Opening a pipe would wait for a writer, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    for path in ("pipe", "link", "/dev/null", "model"):
        start = time.monotonic()
        with pytest.raises(FormatError, match="not a regular file"):
            open_checkpoint(tmp_path / path)
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["a.gguf", "model.safetensors", "config.json"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    written(tmp_path / "config.json", "{}")
    path = written(tmp_path / name, POINTER)
    with pytest.raises(FormatError, match=f"{name}, byte 0: a git-lfs pointer.*git lfs pull"):
        read_gguf(path) if name == "a.gguf" else read_folder(tmp_path)


def test_an_object_of_many_keys_takes_linear_time(tmp_path):
    many = ",".join(f'"{i}":0' for i in range(200_000))
    file = MappedFile(written(tmp_path / "a.json", f'{{{many},"199999":0}}'))
    start = time.monotonic()
    with pytest.raises(FormatError, match="key '199999' appears twice"):
        file.json()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused(tmp_path, opening, closing):
    """Python parses far deeper lists than it can compare or print."""

    def nested(levels):
        text = '{"a":' + (levels - 1) * opening + "1" + (levels - 1) * closing + "}"
        return MappedFile(written(tmp_path / f"{levels}.json", text))

    assert nested(64).json()
    for levels in (65, 500, 100_000):
        with pytest.raises(FormatError, match=r"JSON of more than 64 levels|not usable as JSON"):
            nested(levels).json()
