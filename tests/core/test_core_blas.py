"""OpenBLAS's buffers, forks during its calls, and products cut into tiles."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from packed_parts import dense_layer

from lowbitq import _core

ROOT = Path(__file__).parents[2]
NO_TRANS, TRANS = 111, 112
multi_threaded = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def busy(core, seconds):
    """One product that takes `seconds`; `core` has an OpenBLAS that only sleeps."""
    size, empty = ctypes.c_ssize_t(1), ctypes.c_void_p()
    alpha = ctypes.c_float(seconds)
    core.lbq_sgemm(
        *(NO_TRANS, NO_TRANS, size, size, size, alpha, empty, size, empty, size),
        *(ctypes.c_float(), empty, size),
    )


def counter(core, name):
    return ctypes.c_int.in_dll(core, f"fake_{name}").value


def test_there_is_a_buffer_for_each_call_before_it_begins(core):
    core.lbq_set_threads(3)
    busy(core, 0)
    assert counter(core, "most_held") == 3, "a buffer for each thread, made at once"
    callers = [threading.Thread(target=busy, args=(core, 0.05)) for _ in range(7)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    core.lbq_set_threads(1)
    assert counter(core, "most_running") <= counter(core, "most_held") <= 7
    assert counter(core, "most_running") > 3


@multi_threaded
def test_a_fork_waits_for_calls_under_way(core):
    """Otherwise a child would inherit the locks that they hold."""
    busy(core, 0)
    for _ in range(5):
        callers = [threading.Thread(target=busy, args=(core, 0.05)) for _ in range(3)]
        for caller in callers:
            caller.start()
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            inherited = counter(core, "running")
            busy(core, 0)
            os._exit(inherited)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for caller in callers:
            caller.join()


# The limit is slightly above what is already mapped.
LIMITED = """
import os, resource, threading
import numpy as np
from lowbitq import _core

side = 600
x, results = np.ones((side, side), np.float32), np.empty((5, side, side), np.float32)
layer = _core.linear((_core.copy_dense(x, None, None, None),), None, None, None)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + ({megabytes} << 20),) * 2)
outcomes = []

def work(y):
    try:
        _core.linear_forward(layer, x, y)
        outcomes.append("done" if (y == side).all() else "wrong")
    except MemoryError as error:
        outcomes.append(str(error))

try:
    threads = [threading.Thread(target=work, args=(results[i],)) for i in range({threads})]
    for thread in threads:
        thread.start()
except RuntimeError:  # no memory for a thread
    pass
for thread in threads:
    thread.ident and thread.join()
work(results[4])
print(sorted(set(outcomes)))
"""


@pytest.mark.skipif("LOWBITQ_SANITIZE" in os.environ, reason="sanitizers map terabytes")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("megabytes", "threads"), [(0, 0), (20, 0), (70, 0), (150, 0), (40, 4), (100, 4)]
)
def test_without_memory_there_is_a_memory_error(megabytes, threads):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(megabytes=megabytes, threads=threads)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOWBITQ_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    outcomes = set(eval(done.stdout))
    assert "wrong" not in outcomes
    assert all(text == "done" or text.startswith("cannot allocate") for text in outcomes)
    if megabytes < 30 or megabytes > 140:
        assert ("done" in outcomes) == (megabytes > 140)


@pytest.mark.parametrize(
    ("tokens", "rows", "cols"),
    [(1, 1, 1), (1, 700, 33), (2, 1030, 9), (3, 100, 600), (513, 511, 40), (1100, 70, 300)],
)
def test_tiles_make_up_the_product(threads, tokens, rows, cols):
    """Results are the same for any number of threads."""
    rng = np.random.default_rng([tokens, rows, cols])
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    weight = rng.standard_normal((rows, cols), dtype=np.float32)
    layer, results = dense_layer(weight, None, None), []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        y = np.full((tokens + 2, rows), np.nan, np.float32)
        _core.linear_forward(layer, x, y[1:-1])
        assert np.isnan(y[[0, -1]]).all(), "wrote outside y"
        results.append(y[1:-1])
    bound = cols * 2.0**-24 * (abs(x).astype(float) @ abs(weight).astype(float).T)
    assert (abs(results[0] - x.astype(float) @ weight.astype(float).T) <= bound).all()
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (64, 33, 200), (300, 16, 577)])
def test_product_is_that_of_the_formula(m, n, k):
    rng = np.random.default_rng([m, n, k])
    a, b = rng.standard_normal((m, k)), rng.standard_normal((n, k))
    c = np.full((m + 2, n), np.nan)  # the first and the last row are guards
    _core.product(a, b, c[1:-1])
    bound = k * np.finfo(float).eps * (abs(a) @ abs(b).T)
    assert (abs(c[1:-1] - a @ b.T) <= bound).all()
    assert np.isnan(c[[0, -1]]).all(), "wrote outside c"
