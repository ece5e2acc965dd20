"""Saved folders: exact, aligned, all or nothing, and no damage goes unnoticed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from power_cut import assert_on_disk, journal, killed_in
from safetensors.numpy import load_file
from small_files import write_packed

from lowbitq import FormatError
from lowbitq.checkpoints import packed, writing
from lowbitq.checkpoints.packed import narrowest, read_packed, write_arrays

ROOT = Path(__file__).parents[1]
ARRAYS = {
    "panels": np.arange(256, dtype=np.uint8),
    "odd": np.arange(5, dtype=np.int16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.float32(0.5).reshape(()),
    "gains": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    "half": np.float16([1, 2, 3]),
    "brain": np.array([1.0, 2.0**100], ml_dtypes.bfloat16),
}


@pytest.fixture
def saved(tmp_path):
    return write_packed(tmp_path / "model", ARRAYS, plan={"a": [1, 2.5, "é"]})


def test_what_is_read_is_what_was_written(saved):
    folder = read_packed(saved)

    assert list(folder.tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        if array.dtype == ml_dtypes.bfloat16:
            assert np.array_equal(folder.load(name), array.astype(np.float32))
            continue
        view = folder.view(name)
        assert view.dtype == array.dtype
        assert np.array_equal(view, array)
        assert not view.flags.writeable
        assert view.ctypes.data % 64 == 0
    assert folder.json("plan.json") == {"a": [1, 2.5, "é"]}
    assert folder.config["quantization_config"] == {"quant_method": "lowbitq", "format_version": 3}


def test_the_safetensors_package_reads_it_too(saved):
    arrays = load_file(saved / "model.safetensors")
    assert arrays.keys() >= ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(arrays[name], array)


def test_arrays_outlive_their_folder(saved):
    view = read_packed(saved).view("gains")
    for file in saved.iterdir():
        file.unlink()
    assert np.array_equal(view, ARRAYS["gains"])


def test_slices_and_orders_of_memory_do_not_matter(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    for name, array in {"t": base.T, "s": base[::2, 1::3], "r": base[::-1]}.items():
        folder = write_packed(tmp_path / name, {"w": array})
        assert np.array_equal(read_packed(folder).view("w"), array)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.5, -0.0, 65504, 2**-24, np.inf], "float16"),
        ([2.0**100, 1.0], "bfloat16"),
        ([1 + 2.0**-20], "float32"),
        ([65504, 1e30], "float32"),
        ([], "float16"),
    ],
)
def test_narrowest_keeps_every_bit(tmp_path, values, dtype):
    values = np.array(values, np.float32)

    narrow = narrowest(values)

    assert narrow.dtype.name == dtype
    loaded = read_packed(write_packed(tmp_path / "m", {"w": narrow})).load("w")
    assert np.array_equal(loaded.view(np.uint32), values.view(np.uint32))


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'w' has dtype complex128"):
        write_arrays(tmp_path / "a", {"w": np.zeros(2, complex)})
    with pytest.raises(ValueError, match=r"'_padding\.1' is reserved"):
        write_arrays(tmp_path / "b", {"_padding.1": np.zeros(2)})
    assert not list(tmp_path.iterdir())


# Damage


def test_changed_bytes_are_found(saved):
    for path in sorted(saved.iterdir()):
        intact = path.read_bytes()
        for at in range(0, len(intact), 3):
            damaged = bytearray(intact)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=r"byte \d+: "):
                read_packed(saved)
        path.write_bytes(intact)
    read_packed(saved)


def test_cuts_are_found(saved):
    for path in sorted(saved.iterdir()):
        intact = path.read_bytes()
        for size in range(0, len(intact), 7):
            path.write_bytes(intact[:size])
            with pytest.raises(FormatError, match=rf"{path.name}, byte \d+: "):
                read_packed(saved)
        path.write_bytes(intact + b" ")
        with pytest.raises(FormatError, match=path.name):
            read_packed(saved)
        path.write_bytes(intact)


def test_the_tensor_and_its_byte_are_named(saved):
    path = saved / "model.safetensors"
    tensor = packed.read_safetensors(path).tensors["gains"]
    raw = bytearray(path.read_bytes())
    raw[tensor.offset + 17] ^= 64
    path.write_bytes(raw)

    expected = (
        rf"model\.safetensors, byte {tensor.offset}: 'gains' has CRC-32 \w+, but had \w+ when"
    )
    with pytest.raises(FormatError, match=expected):
        read_packed(saved)
    changed = read_packed(saved, verify=False).view("gains") != ARRAYS["gains"]
    assert changed.sum() == 1


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_bytes(packed.json_text(value))


def test_newer_formats_are_refused(saved):
    rewrite(saved / "config.json", lambda c: c["quantization_config"].update(format_version=4))
    with pytest.raises(
        FormatError, match="format_version is 4, expected 2 or 3: another version of lowbitq"
    ):
        read_packed(saved)


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptq"}}])
def test_foreign_folders_are_refused(saved, config):
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="no quantization_config of quant_method 'lowbitq'"):
        read_packed(saved)


LISTINGS = {
    "no list": ({"config.json": 1}, "'config.json' is not a file with a list of sections"),
    "outside": ({"../x": []}, r"'\.\./x' is not a file with a list"),
    "missing": ({"absent.json": []}, r"'absent\.json' is missing"),
    "surrogate": ({"\ud800": []}, r"'\\ud800' is missing"),
    "long": ({"a" * 300: []}, r"'aaa.*aaa' is missing"),
    "nul": ({"\0": []}, r"'\\x00' is missing"),
    "section": ({"config.json": [{"section": "a"}]}, r"section 0 of 'config\.json' is malformed"),
    "negative": (
        {"config.json": [{"section": "a", "bytes": -1, "crc32": "00000000"}]},
        "'a' ends at byte -1",
    ),
    "large": (
        {"config.json": [{"section": "a", "bytes": 2**70, "crc32": "00000000"}]},
        f"'a' ends at byte {2**70}, the file at",
    ),
    "nothing": ({"config.json": []}, r"config\.json, byte 0: \d+ bytes too many"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_hostile_checksums(saved, case):
    entries, message = LISTINGS[case]
    listing = json.loads((saved / "checksums.json").read_text())["files"] | entries
    (saved / "checksums.json").write_bytes(packed.json_text(packed._listing(listing)))
    with pytest.raises(FormatError, match=message):
        read_packed(saved)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "model-2.safetensors", "folder"])
def test_files_that_were_not_saved_are_refused(saved, name):
    """A tokenizer put beside a model that has none would be taken for the model's own."""
    (saved / name).mkdir() if name == "folder" else (saved / name).write_text("{}")
    with pytest.raises(FormatError, match=rf"checksums\.json, byte 0: '{name}' was added"):
        read_packed(saved)


def test_hidden_files_are_not_looked_at(saved):
    """Of git, or of a download from a hub."""
    (saved / ".cache").mkdir()
    (saved / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert list(read_packed(saved).tensors) == list(ARRAYS)


def test_entries_stand_for_the_files_that_were_opened(saved):
    folder = read_packed(saved)
    (saved / "plan.json").write_text("{}")
    (saved / "tokenizer.json").write_text("{}")
    assert (folder / "plan.json").is_file()
    assert str(folder / "plan.json") == str(saved / "plan.json")
    assert not (folder / "tokenizer.json").is_file()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        (folder / "tokenizer.json").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        folder.json("tokenizer.json")


OTHER = {"w": np.ones(3, np.float32)}


def read_while(saved, happens, monkeypatch):
    """Read the folder once for each of its files, with something happening before that one."""
    opened = packed.MappedFile
    for number in range(1, 5):
        count = 0

        def opening(path, number=number, **options):
            nonlocal count
            count += 1
            if count == number:
                happens(saved)
            return opened(path, **options)

        write_packed(saved, ARRAYS, plan={"arrays": len(ARRAYS)})
        with monkeypatch.context() as patch:
            patch.setattr(packed, "MappedFile", opening)
            yield lambda: read_packed(saved)
        assert count >= number


def test_a_model_that_is_replaced_meanwhile_is_read_as_one(saved, monkeypatch):
    found = []
    for read in read_while(
        saved, lambda path: write_packed(path, OTHER, plan={"arrays": 1}), monkeypatch
    ):
        folder = read()
        assert folder.json("plan.json") == {"arrays": len(folder.tensors)}
        found.append(len(folder.tensors))
    assert found == [1] * len(found), "the old one is gone before all of it is open"


def test_a_model_that_is_removed_meanwhile_is_missing(saved, monkeypatch):
    for read in read_while(saved, shutil.rmtree, monkeypatch):
        with pytest.raises((FileNotFoundError, FormatError), match="model"):
            read()


# All or nothing


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_replaced_as_a_whole(saved):
    old = read_packed(saved).view("gains")

    write_packed(saved, {"w": np.ones(3, np.float32)})

    assert entries(saved.parent) == ["model"]
    assert list(read_packed(saved).tensors) == ["w"]
    assert np.array_equal(old, ARRAYS["gains"]), "still mapped"


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_model_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch, replacing, exchanges):
    path = tmp_path / "model"
    if replacing:
        write_packed(path, ARRAYS)
    events = journal(monkeypatch)
    if not exchanges:
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    write_packed(path, {"w": np.ones(3, np.float32)})
    events = [event for event in events if event != ("name", str(path))]  # the old one steps aside
    assert_on_disk(events, path)


def test_what_is_added_while_a_model_is_written_is_kept(tmp_path, saved):
    def write_while_added(path):
        with packed.new_folder(path) as folder:
            packed.write_json(folder / "config.json", packed.quantization_config())
            path.mkdir(exist_ok=True)
            (path / "notes.txt").write_text("text")

    for path, message in {
        saved: r"model holds notes\.txt, which is not part",
        tmp_path / "fresh": "fresh is neither empty nor a model",
    }.items():
        with pytest.raises(FileExistsError, match=message):
            write_while_added(path)
        assert (path / "notes.txt").read_text() == "text"
    (saved / "notes.txt").unlink()
    assert list(read_packed(saved).tensors) == list(ARRAYS)
    assert entries(tmp_path) == ["fresh", "model"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, saved):
    def killed():
        with packed.new_folder(saved) as folder:
            packed.write_arrays(folder / "model.safetensors", ARRAYS)
            os.kill(os.getpid(), signal.SIGKILL)

    killed_in(killed)
    (tmp_path / ".model.89abcdef.old").mkdir()
    (tmp_path / ".models.89abcdef.new").mkdir()
    assert len(entries(tmp_path)) == 4
    with packed.new_folder(saved) as folder:
        write_packed(saved, ARRAYS)
        assert folder.exists(), "its writer lives"
        packed.write_json(folder / "config.json", packed.quantization_config())
        packed.write_arrays(folder / "model.safetensors", {"w": np.ones(3, np.float32)})
    assert entries(tmp_path) == [".models.89abcdef.new", "model"]
    assert list(read_packed(saved).tensors) == ["w"]


def test_without_exchange_a_model_is_replaced_too(saved, monkeypatch):
    monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    write_packed(saved, {"w": np.ones(3, np.float32)})
    assert entries(saved.parent) == ["model"]
    assert list(read_packed(saved).tensors) == ["w"]


def test_a_failing_rename_puts_the_old_model_back(saved, monkeypatch):
    monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write_packed(saved, {"w": np.ones(3, np.float32)})
    assert entries(saved.parent) == ["model"]
    assert list(read_packed(saved).tensors) == list(ARRAYS)


def test_links_to_folders_are_followed(saved):
    link = saved.parent / "link"
    link.symlink_to(saved, target_is_directory=True)
    write_packed(link, {"w": np.ones(3, np.float32)})
    assert link.is_symlink()
    assert list(read_packed(saved).tensors) == ["w"]


def test_missing_parents_are_made_and_empty_folders_used(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        write_packed(path, {"w": np.ones(3, np.float32)})
        assert list(read_packed(path).tensors) == ["w"]


def test_what_is_no_saved_model_is_left_alone(tmp_path, saved):
    file, foreign, damaged = (tmp_path / name for name in ("file", "foreign", "damaged"))
    file.write_text("text")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("text")
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    write_packed(tmp_path / "listless", {})
    rewrite(tmp_path / "listless" / "checksums.json", lambda listing: listing.update(files=1))
    (saved / "notes.txt").write_text("text")
    cases = {
        file: "is a file",
        foreign: "neither empty nor a model saved by lowbitq",
        damaged: "neither empty nor a model saved by lowbitq",
        tmp_path / "listless": "neither empty nor a model saved by lowbitq",
        saved: r"holds notes\.txt, which is not part of the model",
    }
    for path, message in cases.items():
        with pytest.raises(FileExistsError, match=message):
            write_packed(path, {"w": np.ones(3, np.float32)})
    assert entries(tmp_path) == ["damaged", "file", "foreign", "listless", "model"]
    assert (saved / "notes.txt").read_text() == "text"


def test_an_error_on_the_way_leaves_nothing(tmp_path, saved):
    for path in (tmp_path / "fresh", saved):
        with pytest.raises(TypeError, match="complex128"):
            write_packed(path, {"w": np.zeros(3, complex)})
    assert entries(tmp_path) == ["model"]
    assert list(read_packed(saved).tensors) == list(ARRAYS)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, saved):
    """The system itself refuses to write: no file of this process may pass 64 KiB."""
    program = f"""
import numpy as np, resource, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from small_files import write_packed
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for path in sys.argv[1:]:
    try:
        write_packed(path, {{"w": np.zeros(1 << 20, np.float32)}})
    except OSError as error:
        print(error)
"""
    paths = [str(tmp_path / "fresh"), str(saved)]
    command = [sys.executable, "-c", program, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    reported = result.stdout.splitlines()
    assert len(reported) == 2
    for path, line in zip(paths, reported, strict=True):
        assert "File too large" in line
        assert path in line
    assert entries(tmp_path) == ["model"]
    assert list(read_packed(saved).tensors) == list(ARRAYS)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_late_loses_nothing(tmp_path, saved, monkeypatch, code):
    def failing(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(packed.os, "fsync", failing)
    with pytest.raises(OSError, match="model") as error:
        write_packed(saved, {"w": np.ones(3, np.float32)})
    assert error.value.errno == code
    assert error.value.filename == str(saved)
    assert entries(tmp_path) == ["model"]
    assert list(read_packed(saved).tensors) == list(ARRAYS)


def test_a_read_only_parent_is_named(tmp_path):
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    if os.access(parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(PermissionError, match="locked"):
        write_packed(parent / "model", {"w": np.ones(3, np.float32)})
    assert not entries(parent)


def killed_after(path, calls):
    """Save, and die without any cleanup at the `calls`-th change of the file system."""
    left = calls

    def counting(event, args):
        nonlocal left
        if event in CHANGES and (event != "open" or args[1] in ("xb", "wb")):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(counting)
    write_packed(path, {"w": np.ones(3, np.float32)})


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("replacing", [False, True], ids=["fresh", "replacing"])
def test_a_kill_at_any_point_leaves_the_old_model_or_the_new(tmp_path, replacing):
    context = multiprocessing.get_context("fork")
    found = []
    for calls in range(1, 40):
        path = tmp_path / str(calls) / "model"
        if replacing:
            write_packed(path, ARRAYS)
        process = context.Process(target=killed_after, args=(path, calls))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        found.append(list(read_packed(path).tensors) if path.exists() else [])
    else:
        pytest.fail("never finished")

    before, after = (list(ARRAYS) if replacing else []), ["w"]
    assert before in found
    assert after in found or not replacing
    assert all(names in (before, after) for names in found)
    assert found == sorted(found, key=lambda names: names == after), "there is one turning point"
