"""compress() with a work_dir: what is left after a kill, and who may go on with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tqdm.auto
from random_model import random_model, random_tokens

from lowbitq import _core, compression
from lowbitq._core import FormatError
from lowbitq.compression import compress, leftovers
from lowbitq.plans import Plan

TOKENS = random_tokens(8 * 64).reshape(8, 64)
HELD_OUT = random_tokens(64, seed=1)


def assert_same(one, two):
    for (name, a), (_, b) in zip(one.matrices(), two.matrices(), strict=True):
        assert np.array_equal(a.tensor.panels, b.tensor.panels), name
    assert [r["sha256"] for r in one.records.values()] == [
        r["sha256"] for r in two.records.values()
    ]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_compression_resuming import TOKENS, compress, random_model

def progress(step):
    if step.done == 16:  # in the third block, the second being on disk
        os.kill(os.getpid(), signal.SIGKILL)

compress(random_model(layers=4), sys.argv[3], text=TOKENS, work_dir=sys.argv[1], progress=progress)
"""


@pytest.mark.parametrize("layer", ["int3g32", "int2g32 a4 + rank3"])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, layer):
    model = random_model(layers=4)
    work = tmp_path / "work"
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(work), tests, layer], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in work.glob("*.npz")) == ["block_0000.npz", "block_0001.npz"]

    before = (work / "block_0001.npz").stat().st_mtime_ns
    resumed = compress(model, layer, text=TOKENS, work_dir=work)

    assert (work / "block_0001.npz").stat().st_mtime_ns == before
    whole = compress(model, layer, text=TOKENS)
    assert_same(resumed, whole)
    assert np.array_equal(resumed.logits(HELD_OUT), whole.logits(HELD_OUT))
    assert_same(compress(model, layer, text=TOKENS, work_dir=work), whole)


def biased_model(value, layers=1):
    model = random_model(layers=layers)
    layer = model.blocks[0].linears["o_proj"]
    model.blocks[0].linears["o_proj"] = layer.replace(bias=np.full(64, value, np.float32))
    return model


def other_gain():
    model = random_model(layers=1)
    model.blocks[0].mlp_norm[3] *= 2
    return model


def other_config(**changes):
    model = random_model(layers=1)
    model.config = replace(model.config, **changes)
    return model


OTHERS = {
    "format": ({"format": "int4g32"}, r"layers \(model.layers.0.self_attn.q_proj, "),
    "seed": ({"seed": 1, "text": TOKENS}, r"plan \(seed\);"),
    "tokens": ({"text": TOKENS[:, ::-1].copy()}, "tokens;"),
    "windows of the same tokens": ({"text": TOKENS.reshape(4, 128)}, "windows and tokens;"),
    "weights": ({"model": random_model(seed=1, layers=1)}, "weights;"),
    "gain": ({"model": other_gain()}, "weights;"),
    "a bias more": ({"model": biased_model(0)}, "weights;"),
    "rope_theta": ({"model": other_config(rope_theta=5e5)}, r"configuration \(rope_theta\);"),
    "norm_eps": ({"model": other_config(norm_eps=0.5)}, r"configuration \(norm_eps\);"),
    "rope_scaling": (
        {"model": other_config(rope_scaling={"rope_type": "linear", "factor": 8.0})},
        r"configuration \(rope_scaling\);",
    ),
}


def worked(work_dir, format="int3g32", model=None, text=TOKENS, **options):
    """Compress a model of one block with a work_dir."""
    return compress(
        model or random_model(layers=1), format, text=text, work_dir=work_dir, **options
    )


@pytest.mark.parametrize("case", OTHERS)
def test_work_of_something_else_is_refused(tmp_path, case):
    worked(tmp_path)
    arguments, different = OTHERS[case]
    with pytest.raises(ValueError, match=f"another run, with different {different}"):
        worked(tmp_path, **arguments)


def test_biases_decide_too(tmp_path):
    worked(tmp_path, model=biased_model(1))
    with pytest.raises(ValueError, match="with different weights"):
        worked(tmp_path, model=biased_model(2))


def test_another_version_or_instruction_set_does_not_go_on(tmp_path, monkeypatch):
    """A result that no single run gives is no result."""
    worked(tmp_path)
    used = _core.config()
    isa = "portable" if used["isa"] != "portable" else "avx2"
    with monkeypatch.context() as patch:
        patch.setattr(_core, "config", lambda: used | {"isa": isa})
        with pytest.raises(ValueError, match=r"with different instruction set \(isa\)"):
            worked(tmp_path)
    monkeypatch.setattr(compression, "__version__", "0.0.1")
    with pytest.raises(ValueError, match="with different version"):
        worked(tmp_path)


def test_an_equal_plan_goes_on(tmp_path):
    """Written in another order, and with a whole number for a float."""
    patterns = {"*.q_proj": "int2g64", "*.k_proj": "int4g32"}
    first = worked(tmp_path, overrides=patterns, norm=2.0, first_weight=8)
    before = (tmp_path / "block_0000.npz").stat().st_mtime_ns
    turned = dict(reversed(patterns.items()))
    names = [name for name, _ in random_model(layers=1).linears()][::-1]
    plan = Plan.uniform(names, "int3g32", overrides=turned, norm=2, first_weight=8.0, drift=True)
    again = compress(random_model(layers=1), plan, text=TOKENS, work_dir=tmp_path)
    assert (tmp_path / "block_0000.npz").stat().st_mtime_ns == before
    assert_same(again, first)


def test_what_is_taken_up_lies_at_cache_lines(tmp_path):
    worked(tmp_path)
    for _, linear in worked(tmp_path).matrices():
        assert linear.tensor.panels.ctypes.data % 64 == 0


def test_leftovers_are_known_without_the_model(tmp_path):
    options = {"samples": 8, "window": 64, "rotation": "hadamard"}
    assert leftovers(tmp_path, "int3g32", **options) is None
    worked(tmp_path)
    assert leftovers(tmp_path, "int3g32", **options) is None
    assert leftovers(tmp_path, "int2g32", **options) == "format (int3g32, not int2g32)"
    assert leftovers(tmp_path, "int3g32", **options | {"window": 65}) == "windows"
    assert leftovers(tmp_path, "int3g32", **options | {"samples": 9}) is None, "if text is short"
    assert leftovers(tmp_path, "int3g32", **options | {"samples": 7}) == "samples"
    assert (
        leftovers(tmp_path, "int3g32", **options, method="rtn")
        == "plan (drift, rounding (method)) and windows"
    )
    assert leftovers(tmp_path, "int3g32", **options, embedding=None) == "plan (embedding)"


def test_damaged_work_is_an_error(tmp_path):
    model = random_model(layers=1)
    compress(model, "int3g32", text=TOKENS, work_dir=tmp_path)
    path = tmp_path / "block_0000.npz"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:2000], b""):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="block_0000"):
            compress(model, "int3g32", text=TOKENS, work_dir=tmp_path)
    np.savez(path, about=np.array("{}"))
    with pytest.raises(FormatError, match="block_0000"):
        compress(model, "int3g32", text=TOKENS, work_dir=tmp_path)


def test_restored_blocks_do_not_count_for_the_remaining_time(tmp_path, monkeypatch):
    """The bar divides what this run has finished by its time."""
    bars = []

    class Bar(tqdm.auto.tqdm):
        def close(self):
            bars.append((self.initial, self.n, self.total, self.smoothing))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    model = random_model(layers=2)
    for _ in range(2):
        compress(model, "int3g32", text=TOKENS, work_dir=tmp_path / "work", progress=True)
        (tmp_path / "work" / "block_0001.npz").unlink()
    fresh, resumed = dict.fromkeys(bars)
    assert fresh == (0, 15, 15, 0)
    assert resumed == (7, 15, 15, 0)
