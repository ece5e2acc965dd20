"""Aligned blocks and the arena."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lowbitq import _core


class Arena(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("used", ctypes.c_size_t),
        ("stack", ctypes.c_void_p),
    )


def opened(core, size):
    arena = Arena()
    assert core.lbq_arena_open(ctypes.byref(arena), ctypes.c_size_t(size)) == 0
    return arena


def close(core, arena):
    core.lbq_arena_close(ctypes.byref(arena))


def span(arena):
    return arena.base, arena.base + arena.size


# Under sanitizers every arena is a separate block.
kept = pytest.mark.skipif("LOWBITQ_SANITIZE" in os.environ, reason="sanitizers: no stack is kept")


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4097, 1 << 21, 10_000_000])
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
    arena = opened(core, 64 + 64 + 128 + 256)
    blocks = [core.lbq_arena_take(ctypes.byref(arena), ctypes.c_size_t(size)) for size in sizes]
    assert all(block % 64 == 0 for block in blocks)
    assert np.diff(blocks).tolist() == [64, 64, 128]
    assert arena.used == arena.size
    close(core, arena)
    assert arena.base is None


def test_arenas_open_at_once_do_not_overlap(core):
    """Some on the stack, some beyond it, one that ends where the stack does."""
    sizes = [100, 3, 1 << 19, 0, (1 << 20) - (1 << 19) - 256, 64, 2 << 20, 1]
    for _ in range(2):
        arenas = [opened(core, size) for size in sizes]
        spans = sorted(span(arena) for arena in arenas if arena.size)
        assert all(base % 64 == 0 for base, _ in spans)
        assert all(end <= base for (_, end), (base, _) in itertools.pairwise(spans))
        for arena in arenas:
            ctypes.memset(arena.base, 255, arena.size)
        for arena in reversed(arenas):
            close(core, arena)


@kept
def test_a_thread_gets_the_same_scratch_again(core):
    outer = opened(core, 1000)
    inner = opened(core, 1000)
    first = inner.base
    close(core, inner)
    again = opened(core, 5000)
    assert again.base == first
    assert outer.base < first
    close(core, again)
    close(core, outer)
    large = opened(core, 2 << 20)
    assert large.stack is None, "a large arena would stay allocated"
    close(core, large)


def test_threads_have_scratch_of_their_own(core):
    """Each holds an arena while the others hold theirs; afterwards the memory is free again."""
    barrier = threading.Barrier(4)

    def hold(_):
        arena = opened(core, 1000)
        barrier.wait()
        found = span(arena)
        barrier.wait()
        close(core, arena)
        return found

    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            spans = sorted(pool.map(hold, range(4)))
        assert all(end <= base for (_, end), (base, _) in itertools.pairwise(spans))


@kept
def test_threads_that_end_free_their_scratch(core):
    def touch():
        arena = opened(core, 1 << 20)
        ctypes.memset(arena.base, 1, arena.size)
        close(core, arena)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        thread = threading.Thread(target=touch)
        thread.start()
        thread.join()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 50 << 10, "200 stacks of 1 MiB grew the process by 50 MiB"


@pytest.mark.parametrize("size", [2**64 - 1, 2**64 - 64, 2**62])
def test_sizes_beyond_memory_are_refused_not_wrapped(core, size):
    block = ctypes.c_void_p()
    assert core.lbq_allocate(ctypes.c_size_t(size), ctypes.byref(block)) == 3
    assert b"bytes" in core.lbq_message()
    assert block.value is None
