"""Archives of arrays: exact, whole, and only FormatError comes of damage."""

from __future__ import annotations

import errno
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from power_cut import assert_on_disk, journal

from lowbitq import FormatError
from lowbitq.checkpoints.archives import digest, load_arrays, save_arrays

ARRAYS = {
    "a/b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "empty": np.zeros((0, 3), np.uint8),
    "scalar": np.array(7),
    "text": np.array("Grüße"),
    "turned": np.arange(6.0).reshape(2, 3).T,
}


@pytest.fixture
def path(tmp_path):
    save_arrays(tmp_path / "a.npz", ARRAYS)
    return tmp_path / "a.npz"


def test_arrays_come_back(path):
    found = load_arrays(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)
    assert list(load_arrays(path, only="scalar")) == ["scalar"]
    with pytest.raises(FormatError, match="absent"):
        load_arrays(path, only="absent")


def test_an_archive_is_on_disk_before_it_has_its_name(path, monkeypatch):
    events = journal(monkeypatch)
    save_arrays(path, {"new": np.ones(3)})
    assert_on_disk(events, path)


def test_an_error_leaves_the_archive_that_was_there(path):
    class Unwilling:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no array")

    with pytest.raises(RuntimeError, match="no array"):
        save_arrays(path, {"a": np.ones(100000), "b": Unwilling()})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert list(load_arrays(path)) == list(ARRAYS)


def test_shifted_archives_are_refused(path):
    whole = path.read_bytes()
    start = struct.unpack_from("<I", whole, whole.rfind(b"PK\5\6") + 16)[0]
    for shift in (-start, -100, -12, -1, 1, 12, 10_000):
        moved = bytearray(whole)
        struct.pack_into("<I", moved, moved.rfind(b"PK\5\6") + 16, start + shift)
        for damaged in (moved, whole[-shift:] if shift < 0 else b"P" * shift + whole):
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=r"a\.npz: "):
                load_arrays(path)


def test_changed_bytes_are_found_or_harmless(path):
    whole = path.read_bytes()
    for at in [*range(0, len(whole), 9), *range(whole.find(b"PK\1\2"), len(whole))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            found = load_arrays(path)
        except FormatError:
            continue
        # The names in the list at the end have no checksum.
        assert digest(dict(zip(ARRAYS, found.values(), strict=True))) == digest(ARRAYS)


def test_sizes_are_not_believed(path):
    """An array that claims more than the file holds costs no memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 27,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(16))
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"float64 of shape \(134217728,\) in 16 bytes"):
        load_arrays(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_objects_and_compressed_archives_are_refused(path):
    np.savez(path, a=np.array([{}], object))
    with pytest.raises(FormatError, match="not a plain array"):
        load_arrays(path)
    np.savez_compressed(path, a=np.zeros(1000))
    with pytest.raises(FormatError, match="not a plain array"):
        load_arrays(path)


def test_what_is_no_file_is_no_damage(path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_arrays(path.with_name("absent"))
    with pytest.raises(IsADirectoryError):
        load_arrays(path.parent)


def test_a_failing_disk_is_no_damage(path, monkeypatch):
    def failing(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile, "ZipFile", failing)
    with pytest.raises(OSError, match="Input/output error"):
        load_arrays(path)


def test_a_digest_is_of_names_dtypes_shapes_and_contents():
    a = np.arange(6, dtype=np.int32)
    others = [
        {"b": a},
        {"a": a.reshape(2, 3)},
        {"a": a.view(np.uint32)},
        {"a": a + 1},
        {"a": a[:3], "b": a[3:]},
        {},
    ]
    assert len({digest(arrays) for arrays in [{"a": a}, *others]}) == len(others) + 1
    assert digest({"a": np.repeat(a, 2)[::2]}) == digest({"a": a})
