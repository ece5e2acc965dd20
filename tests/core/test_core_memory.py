"""Aligned blocks and the arena."""

from __future__ import annotations

import ctypes
import gc
import resource

import numpy as np
import pytest

from lowbitq import _core


class Arena(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t), ("used", ctypes.c_size_t))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4097, 10_000_000])
def test_aligned_empty_is_aligned_writable_and_its_own(size):
    first, second = _core.aligned_empty(bytes=size), _core.aligned_empty(bytes=size)
    assert first.shape == (size,)
    assert first.dtype == np.uint8
    assert first.ctypes.data % 64 == 0
    first[:], second[:] = 1, 2
    assert (first == 1).all()


def test_view_keeps_the_block_alive():
    view = _core.aligned_empty(bytes=1 << 20)[5:].view()
    view[:] = 7
    gc.collect()
    others = [_core.aligned_empty(bytes=1 << 20) for _ in range(4)]
    for other in others:
        other[:] = 0
    assert (view == 7).all()


def test_blocks_are_freed():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        _core.aligned_empty(bytes=16 << 20)[:] = 1
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 400 << 10, "100 blocks of 16 MiB grew the process by 400 MiB"


def test_arena_gives_disjoint_aligned_blocks(core):
    sizes = [1, 64, 65, 200]
    arena = Arena()
    assert core.lbq_arena_open(ctypes.byref(arena), ctypes.c_size_t(64 + 64 + 128 + 256)) == 0
    blocks = [core.lbq_arena_take(ctypes.byref(arena), ctypes.c_size_t(size)) for size in sizes]
    assert all(block % 64 == 0 for block in blocks)
    assert np.diff(blocks).tolist() == [64, 64, 128]
    assert arena.used == arena.size
    core.lbq_arena_close(ctypes.byref(arena))
    assert arena.base is None


@pytest.mark.parametrize("size", [2**64 - 1, 2**64 - 64, 2**62])
def test_sizes_beyond_memory_are_refused_not_wrapped(core, size):
    block = ctypes.c_void_p()
    assert core.lbq_allocate(ctypes.c_size_t(size), ctypes.byref(block)) == 3
    assert b"bytes" in core.lbq_message()
    assert block.value is None
