"""Finished blocks: kept exactly, never taken for those of another run."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import numpy as np
import pytest

from lowbitq import FormatError
from lowbitq.checkpoints import blocks
from lowbitq.checkpoints.archives import load_arrays, save_arrays
from lowbitq.checkpoints.blocks import Blocks, block_files, read_fingerprint, remove_blocks

MARK = {"version": "1", "plan": {"seed": 1, "norm": 2.0, "layers": {"a": "int4", "b": "int2"}}}
NAMES = ["up", "down"]


def block(seed=0):
    """Arrays of two layers, and what is said of them."""
    random = np.random.default_rng(seed)
    arrays = {
        "up/panels": random.integers(0, 256, 1000, np.uint8),
        "up/levels": random.standard_normal(8, np.float32),
        "down/panels": random.integers(0, 256, 1700, np.uint8),
        "down/U": random.standard_normal((17, 3), np.float32),
        "down/bias": random.standard_normal(17).astype(np.float16),
    }
    about = {name: {"layer": {"gamma": 2.0}, "record": {"error": 0.25}} for name in NAMES}
    return arrays, about


def assert_same(found, expected):
    assert list(found[1]) == list(expected[1])
    assert found[1] == expected[1]
    assert set(found[0]) == set(expected[0])
    for name, array in expected[0].items():
        assert found[0][name].dtype == array.dtype
        assert np.array_equal(found[0][name], array)
        assert array.dtype != np.uint8 or found[0][name].ctypes.data % 64 == 0


def test_blocks_come_back(tmp_path):
    Blocks(tmp_path / "a" / "work", MARK).save(3, *block())
    kept = Blocks(tmp_path / "a" / "work", MARK)
    assert_same(kept.load(3, NAMES), block())
    assert kept.load(2, NAMES) is None
    assert [path.name for path in block_files(tmp_path / "a" / "work")] == ["block_0003.npz"]
    assert read_fingerprint(tmp_path / "a" / "work") == MARK
    assert read_fingerprint(tmp_path / "a") is None


def test_a_fingerprint_that_is_equal_is_equal(tmp_path):
    """In any order, and with or without a point in a whole number."""
    Blocks(tmp_path, MARK).save(0, *block())
    plan = {"layers": {"b": "int2", "a": "int4"}, "norm": 2, "seed": np.int64(1)}
    assert_same(Blocks(tmp_path, {"plan": plan, "version": "1"}).load(0, NAMES), block())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "2"}, "version"),
        ({"plan": MARK["plan"] | {"seed": 2}}, r"plan \(seed\)"),
        ({"plan": None}, "plan"),
        ({"plan": MARK["plan"] | {"layers": {"a": "int3", "b": "int2"}}}, r"plan \(layers \(a\)\)"),
        ({"more": 1}, "more"),
    ],
)
def test_blocks_of_another_run_are_refused(tmp_path, change, said):
    Blocks(tmp_path, MARK).save(0, *block())
    message = rf"json is from another run, with different {said}; remove .* or choose another"
    with pytest.raises(ValueError, match=message):
        Blocks(tmp_path, MARK | change)


def test_a_block_brought_from_another_folder_is_refused(tmp_path):
    kept = Blocks(tmp_path / "one", MARK)
    kept.save(0, *block())
    Blocks(tmp_path / "two", MARK | {"version": "2"}).save(1, *block())
    shutil.copy(tmp_path / "two" / "block_0001.npz", tmp_path / "one")
    message = r"block_0001\.npz is from another run, with different version"
    with pytest.raises(ValueError, match=message):
        Blocks(tmp_path / "one", MARK)
    with pytest.raises(ValueError, match=message):
        kept.load(1, NAMES)
    (tmp_path / "two" / "fingerprint.json").unlink()
    with pytest.raises(ValueError, match=message):
        Blocks(tmp_path / "two", MARK)


def changed(change):
    def damage(path):
        arrays = load_arrays(path)
        change(arrays)
        save_arrays(path, arrays)

    return damage


def other_gamma(arrays):
    about = json.loads(str(arrays["about"]))
    about["down"]["layer"]["gamma"] = 7.0
    arrays["about"] = np.array(json.dumps(about))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "gamma": changed(other_gamma),
    "levels": changed(lambda arrays: arrays["up/levels"].__iadd__(1)),
    "no fingerprint": changed(lambda arrays: arrays.pop("fingerprint")),
    "a list": changed(lambda arrays: arrays.update(fingerprint=np.array("[]"))),
    "no digest": changed(lambda arrays: arrays.pop("sha256")),
    "one array less": changed(lambda arrays: arrays.pop("up/levels")),
    "adapter": changed(lambda arrays: arrays["down/U"].__iadd__(1)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_block_is_named(tmp_path, case):
    kept = Blocks(tmp_path, MARK)
    kept.save(0, *block())
    DAMAGE[case](tmp_path / "block_0000.npz")
    with pytest.raises(FormatError, match=r"block_0000\.npz: "):
        kept.load(0, NAMES)


def test_other_layers_are_refused(tmp_path):
    kept = Blocks(tmp_path, MARK)
    kept.save(0, *block())
    with pytest.raises(FormatError, match=r"block_0000.npz: holds \['up', 'down'\], expected"):
        kept.load(0, ["gate", "down"])


@pytest.mark.parametrize("contents", [b"", b"{", b"[1]"])
def test_a_damaged_fingerprint_is_named(tmp_path, contents):
    (tmp_path / "fingerprint.json").write_bytes(contents)
    with pytest.raises(FormatError, match=r"fingerprint\.json, byte \d+: "):
        Blocks(tmp_path, MARK)


def test_nothing_is_written_where_all_blocks_are_there(tmp_path, monkeypatch):
    Blocks(tmp_path, MARK).save(0, *block())

    def read_only(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(blocks, "new_file", read_only)
    assert_same(Blocks(tmp_path, MARK).load(0, NAMES), block())
    with pytest.raises(OSError, match=r"Read-only file system: .*fingerprint\.json"):
        Blocks(tmp_path / "other", MARK)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_stays(tmp_path, there):
    link, real = tmp_path / "link", tmp_path / "real"
    link.symlink_to(real)
    if there:
        real.mkdir()
    Blocks(link, MARK).save(0, *block())
    assert len(block_files(real)) == 1
    remove_blocks(link)
    assert link.is_symlink()
    assert not list(real.iterdir())


def test_only_blocks_are_removed(tmp_path):
    remove_blocks(tmp_path / "absent")
    kept = Blocks(tmp_path / "work", MARK)
    kept.save(0, *block())
    (tmp_path / "work" / ".block_0001.npz.01234567.new").write_bytes(b"litter")
    (tmp_path / "work" / "notes.txt").write_text("text")
    remove_blocks(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]
    (tmp_path / "work" / "notes.txt").unlink()
    remove_blocks(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    kept.save(1, *block())  # as when another process was done first, and cleared up
    assert_same(kept.load(1, NAMES), block())


def test_another_process_may_clear_the_folder_meanwhile(tmp_path, monkeypatch):
    Blocks(tmp_path, MARK)
    gone = [tmp_path / "block_0000.npz"]
    monkeypatch.setattr(blocks, "block_files", lambda folder: gone)
    assert Blocks(tmp_path, MARK).load(0, NAMES) is None


def save_often(folder):
    kept = Blocks(folder, MARK)
    for _ in range(20):
        kept.save(0, *block())
        assert_same(kept.load(0, NAMES), block())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_may_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_often, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["block_0000.npz", "fingerprint.json"]
