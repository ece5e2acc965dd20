"""Files that appear whole and on disk or not at all, and the litter of killed writers."""

from __future__ import annotations

import errno
import os
import signal

import pytest
from power_cut import assert_on_disk, journal, killed_in

from lowbitq.checkpoints import writing
from lowbitq.checkpoints.writing import make_folder, new_file

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, contents=b"new"):
    with new_file(path) as file:
        file.write(contents)


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch, before):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    events = journal(monkeypatch)
    write(path)
    assert_on_disk(events, path)
    assert path.read_bytes() == b"new"
    assert entries(tmp_path) == ["file"]


def write_half(path, error):
    with new_file(path) as file:
        file.write(b"new")
        file.flush()
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for place in (path, tmp_path / "fresh"):
        with pytest.raises(error):
            write_half(place, error)
    assert entries(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_named(tmp_path, monkeypatch, code):
    def failing(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        write(tmp_path / "file")
    assert (error.value.errno, error.value.filename) == (code, str(tmp_path / "file"))
    assert not entries(tmp_path)


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"new"


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a [b].npz"  # no pattern

    def body():
        with new_file(path) as file:
            file.write(b"new" * 10000)
            os.kill(os.getpid(), signal.SIGKILL)

    killed_in(body)
    (tmp_path / ".other.01234567.new").write_bytes(b"of another file")
    assert len(entries(tmp_path)) == 2
    assert not path.exists()
    write(path)
    assert entries(tmp_path) == [".other.01234567.new", path.name]


def test_a_living_writer_keeps_its_file(tmp_path):
    path = tmp_path / "file"
    with new_file(path) as file:
        file.write(b"first")
        write(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert entries(tmp_path) == ["file"]


def test_without_locks_nothing_of_others_is_removed(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writing.fcntl, "flock", unsupported)
    (tmp_path / ".file.01234567.new").write_bytes(b"of a process elsewhere, perhaps")
    write(tmp_path / "file")
    assert entries(tmp_path) == [".file.01234567.new", "file"]


def test_the_folders_that_are_made_are_on_disk(tmp_path, monkeypatch):
    events = journal(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert sorted(events) == [("sync", str(tmp_path)), ("sync", str(tmp_path / "a"))]
