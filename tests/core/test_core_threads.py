"""The pool: every index once, failures by index, nesting, fork and spawn."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import lowbitq
from lowbitq import _core

TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def parallel(core, count, task):
    return core.lbq_parallel(ctypes.c_ssize_t(count), TASK(task), None)


@pytest.fixture(params=[1, 2, 5])
def pool(request, core):
    """The test's own pool, with the parameter's number of threads."""
    assert core.lbq_set_threads(request.param) == 0
    assert core.lbq_threads() == request.param
    yield core
    core.lbq_set_threads(1)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_every_index_runs_once_on_a_known_worker(pool, count):
    seen = []

    def task(_, index, worker):
        seen.append((index, worker))
        return 0

    assert parallel(pool, count, task) == 0
    assert sorted(index for index, _ in seen) == list(range(count))
    assert all(0 <= worker < pool.lbq_threads() for _, worker in seen)


def test_workers_take_part(core):
    core.lbq_set_threads(3)
    seen = set()

    def task(_, index, worker):
        time.sleep(0.01)
        seen.add((worker, threading.get_ident()))
        return 0

    assert parallel(core, 30, task) == 0
    assert {worker for worker, _ in seen} == {0, 1, 2}
    assert len({thread for _, thread in seen}) == 3
    core.lbq_set_threads(1)


@pytest.mark.parametrize("pause", [0, 2e-5, 1e-3])
def test_tasks_may_wait_for_one_another(core, pause):
    """As OpenBLAS's tasks do: every worker has to join, whether spinning or asleep."""
    core.lbq_set_threads(3)
    barrier = threading.Barrier(3, timeout=30)

    def task(*_):
        barrier.wait()
        return 0

    for _ in range(30):
        time.sleep(pause)
        assert parallel(core, 3, task) == 0
    assert not barrier.broken
    core.lbq_set_threads(1)


def test_failure_of_the_lowest_index_is_the_result(pool):
    def task(_, index, worker):
        if index in (3, 17, 40):
            # The lowest fails last, so it has to replace the others.
            time.sleep(0.03 if index == 3 else 0)
            return pool.lbq_fail(1 + index % 2, b"task %d failed", index)
        return 0

    for _ in range(5):
        assert parallel(pool, 50, task) == 2
        assert pool.lbq_message() == b"task 3 failed"
    assert parallel(pool, 50, lambda *_: 0) == 0, "a failure does not stick"


def test_nested_call_runs_in_its_caller(pool):
    outer, inner = [], []

    def nested(_, index, worker):
        inner.append((threading.get_ident(), worker))
        return 0

    def task(_, index, worker):
        before = len(inner)
        assert parallel(pool, 4, nested) == 0
        outer.append((index, before))
        return 0

    assert parallel(pool, 6, task) == 0
    assert len(outer) == 6
    assert len(inner) == 24
    if pool.lbq_threads() > 1:
        assert {worker for _, worker in inner} == {0}


def test_two_callers_at_once(pool):
    totals = [0, 0]

    def caller(which):
        for _ in range(20):
            seen = []
            parallel(pool, 20, lambda _, index, worker, seen=seen: seen.append(index) or 0)
            totals[which] += len(seen)

    callers = [threading.Thread(target=caller, args=(which,)) for which in (0, 1)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert totals == [400, 400]


@pytest.mark.parametrize("count", [0, -3, 257])
def test_impossible_numbers_of_threads_are_refused(core, count):
    assert core.lbq_set_threads(count) == 1
    assert b"expected 1 to 256" in core.lbq_message()


def test_number_of_threads_goes_up_and_down(core):
    for count in [4, 1, 3, 2, 8, 1]:
        assert core.lbq_set_threads(count) == 0
        seen = []
        parallel(core, 100, lambda _, index, worker, seen=seen: seen.append(index) or 0)
        assert sorted(seen) == list(range(100))


def test_cpus_are_those_this_process_may_use(core):
    assert core.lbq_cpus() == len(os.sched_getaffinity(0)) == _core.config()["cpus"]


# Uses the pool of _core. A text, because a spawned child cannot import this file.
WIDEN = """
import numpy as np
from lowbitq import _core

x = (np.arange(1_000_000) % 0x7C00).astype(np.uint16)
y = np.empty(len(x), np.float32)
_core.half_to_float(x, y)
report((float(y.sum(dtype=np.float64)), _core.config()["threads"]))
"""


def widened():
    reports = []
    exec(WIDEN, {"report": reports.append})
    return reports[0][0]


# Python 3.12 and later warn about any fork while threads run; this tests the pool.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool_works_in_child_processes(threads, method):
    _core.set_num_threads(threads=3)
    expected = widened()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=exec, args=(WIDEN, {"report": queue.put}))
    child.start()
    result, child_threads = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert result == expected
    assert child_threads == (3 if method == "fork" else threads)
    assert widened() == expected, "the parent's pool still works"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_uses_the_pool(threads):
    _core.set_num_threads(threads=2)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            widened()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if widened() > 0 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_starts_workers_of_its_own(core):
    """Even if the parent's workers, which it does not inherit, were in a region at the fork."""
    core.lbq_set_threads(3)
    stop, barrier = threading.Event(), threading.Barrier(3, timeout=10)

    def work():
        while not stop.is_set():
            parallel(core, 20, lambda *_: time.sleep(0.001) or 0)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            time.sleep(0.01)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                os._exit(parallel(core, 3, lambda *_: barrier.wait() * 0))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()
        core.lbq_set_threads(1)


def test_a_caller_with_scratch_for_some_threads_gets_no_others(core):
    """Even if another thread starts more of them meanwhile."""
    core.lbq_set_threads(2)
    core.lbq_settle_threads(2)
    larger = threading.Thread(target=core.lbq_set_threads, args=(8,))
    larger.start()
    larger.join()
    workers = set()

    def task(_, index, worker):
        time.sleep(0.002)
        workers.add(worker)
        return 0

    assert core.lbq_threads() == 2
    assert parallel(core, 60, task) == 0
    assert workers == {0, 1}
    core.lbq_settle_threads(0)
    assert core.lbq_threads() == 8
    core.lbq_set_threads(1)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(lowbitq.__file__)),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("threads", ["1", "3"])
def test_environment_sets_the_number_of_threads(threads):
    code = "from lowbitq import _core; print(_core.config()['threads'])"
    assert python(code, LOWBITQ_NUM_THREADS=threads).stdout.strip() == threads


@pytest.mark.parametrize(
    ("name", "value"),
    [("LOWBITQ_NUM_THREADS", v) for v in ["0", "two", "999"]] + [("LOWBITQ_ISA", "sse9")],
)
def test_environment_with_an_unknown_value_is_an_error(name, value):
    failed = python("import lowbitq", **{name: value})
    assert failed.returncode == 1
    assert f"{name} is '{value}', expected" in failed.stderr


def test_environment_lowers_the_instruction_set():
    code = "from lowbitq import _core; print(_core.config()['isa'])"
    assert python(code, LOWBITQ_ISA="portable").stdout.strip() == "portable"
