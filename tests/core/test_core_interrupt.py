"""Ctrl-C: every long call ends soon after it, and nothing is broken afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time

import numpy as np
import pytest
from packed_parts import dense_layer
from rounding import code_of

from lowbitq import _core
from lowbitq.models import load

F4 = np.float32
INTERRUPTED = 6
SIDE = 2048


@contextlib.contextmanager
def signals(number, every, handler=None):
    """Send a signal to this process again and again, then restore its handler."""
    stop = threading.Event()

    def send():
        while not stop.wait(every):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    if handler:
        signal.signal(number, handler)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        stop.set()
        sender.join()
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(0.001)  # a signal that is still pending
        signal.signal(number, before)


def seconds_to_interrupt(call, after=0.15):
    """Seconds from Ctrl-C to KeyboardInterrupt; calls last for seconds, or are repeated."""
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Timer(after, send)
    sender.start()
    try:
        while True:
            call()
    except KeyboardInterrupt:
        return time.monotonic() - sent[0]
    finally:
        sender.cancel()
        sender.join()


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape, dtype=F4)


def hessian():
    return np.eye(SIDE) + 0.1


def quantize(rows, cols, **options):
    scale, offset = np.ones((2, rows, 1), F4)
    defaults = {"group": cols, "fixed": False, "method": "mse", "clip": 1.0, "percentile": 99.0}
    defaults |= {"candidates": 10, "shrink": 0.3, "norm": 2.4} | options
    weight, codes = normal(rows, cols), np.empty((rows, cols), np.uint8)
    code = code_of(4, symmetric=False)
    return lambda: _core.quantize(code, weight, None, codes, scale, offset, **defaults)


def rounding(name, **options):
    """adaround or refine of a square matrix."""
    H, W, codes = hessian(), normal(SIDE, SIDE), np.zeros((SIDE, SIDE), np.uint8)
    scale, offset = np.ones((SIDE, 1), F4), np.full((SIDE, 1), -2, F4)
    code = code_of(4, symmetric=False)
    options |= {"group": SIDE}
    return lambda: getattr(_core, name)(code, H, W, scale, offset, codes, **options)


def linear():
    layer, x = dense_layer(normal(4096, SIDE), None, None), normal(SIDE, SIDE)
    y = np.empty((SIDE, 4096), F4)
    return lambda: _core.linear_forward(layer, x, y)


def gptq():
    scale, offset = np.empty((2, SIDE, SIDE // 64), F4)
    codes, R = np.empty((SIDE, SIDE), np.uint8), np.eye(SIDE) + np.triu(np.full((SIDE, SIDE), 1e-3))
    options = {"group": 64, "fixed": False, "method": "mse", "clip": 1.0, "percentile": 99.0}
    options |= {"candidates": 99, "shrink": 0.3, "norm": 2.0, "block": 128}
    code, W = code_of(4, symmetric=False), normal(SIDE, SIDE)
    return lambda: _core.gptq(code, R, None, None, W, None, codes, scale, offset, **options)


def factor():
    H, R = hessian(), np.empty((SIDE, SIDE))
    return lambda: _core.gptq_factor(H, None, R, damping=0.01, median=False)


def error():
    H, E = hessian(), normal(SIDE, SIDE)
    return lambda: _core.hessian_error(H, E)


def orthogonal():
    Q = np.empty((SIDE, SIDE))
    return lambda: _core.orthogonal(Q, seed=0, stream=0)


def entropy():
    counts, kept = np.ones(1 << 16), np.zeros(1, np.int64)
    return lambda: _core.entropy_range(counts, kept, levels=16)


def kmeans():
    values, levels = np.random.default_rng(0).standard_normal(1 << 20), np.empty(16)
    return lambda: _core.kmeans(values, None, levels)


def rope():
    x, frequency = np.ones((100_000, 1, 64), F4), np.ones(32)
    return lambda: _core.rope(x, frequency, None, first=0, factor=1.0, epsilon=0.0)


def random_normal():
    out = np.empty(1 << 23)
    return lambda: _core.random_normal(out, seed=0, stream=0)


CALLS = {
    "adaround": lambda: rounding("adaround", steps=1000000, rate=0.01, strength=1.0),
    "refine": lambda: rounding("refine", damping=0.1, sweeps=1000),
    "quantize": lambda: quantize(64, 4096, candidates=100000),
    "quantize percentile": lambda: quantize(1, 1 << 22, method="percentile"),
    "linear": linear,
    "gptq": gptq,
    "factor": factor,
    "error": error,
    "orthogonal": orthogonal,
    "entropy": entropy,
    "kmeans": kmeans,
    "rope": rope,
    "random": random_normal,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_ends_soon_after_ctrl_c(name):
    assert seconds_to_interrupt(CALLS[name]()) < 0.5


def test_a_handler_that_returns_lets_the_work_go_on():
    call = quantize(64, 512, candidates=300)
    handled = []
    with signals(signal.SIGUSR1, 0.02, lambda *_: handled.append(threading.get_ident())):
        end = time.monotonic() + 20
        while len(handled) < 6 and time.monotonic() < end:
            call()
    assert len(handled) >= 6
    assert set(handled) == {threading.main_thread().ident}


def test_a_handler_may_call_what_it_interrupts(threads):
    """The pool is busy then: the inner call works in its own thread."""
    _core.set_num_threads(threads=2)
    inner, outer = normal(300, 300), normal(3000, 3000)
    expected = np.zeros((300, 300))
    _core.hessian_add(inner, None, expected)
    sums, refused = [], []

    def handler(*_):
        sums.append(np.zeros((300, 300)))
        _core.hessian_add(inner, None, sums[-1])
        try:
            _core.set_num_threads(threads=1)
        except ValueError as error:
            refused.append(str(error))

    H = np.zeros((2, 3000, 3000))
    _core.hessian_add(outer, None, H[0])
    with signals(signal.SIGUSR1, 0.03, handler):
        while not refused:
            H[1] = 0
            _core.hessian_add(outer, None, H[1])
            _core.set_num_threads(threads=2)
    assert all((one == expected).all() for one in sums)
    assert (H[0] == H[1]).all()
    assert "cannot change" in refused[0]


def test_other_threads_work_on(threads):
    _core.set_num_threads(threads=2)
    x, results = normal(600, 600), []

    def work():
        for _ in range(20):
            H = np.zeros((600, 600))
            _core.hessian_add(x, None, H)
            results.append(H)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(3):
        assert seconds_to_interrupt(linear(), 0.05) < 0.5
    for worker in workers:
        worker.join()
    assert len(results) == 40
    assert all(H.tobytes() == results[0].tobytes() for H in results)


def test_an_interrupted_cache_is_as_it_was(tiny_folder):
    model = load(tiny_folder)
    tokens = np.arange(4000) % 90
    expected = model.step(tokens[:40], model.new_cache(4096))
    cache = model.new_cache(4096)

    def call():
        cache.length = 0
        model.step(tokens, cache)

    assert seconds_to_interrupt(call, 0.02) < 0.5
    cache.length = 0
    assert (model.step(tokens[:40], cache) == expected).all()


ASK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


class Watch(ctypes.Structure):
    _fields_ = (
        ("ask", ASK),
        ("owner", ctypes.c_void_p),
        ("due", ctypes.c_int64),
        ("ended", ctypes.c_bool),
    )


@pytest.fixture
def watch(core):
    """A watch on this thread that ends the call as soon as its `answers` say so."""
    watch = Watch()
    watch.answers, watch.asked = [], []

    def ask(_):
        watch.asked.append(threading.get_ident())
        return watch.answers.pop(0) if watch.answers else False

    watch.kept = ASK(ask)
    core.lbq_watch_open(ctypes.byref(watch), watch.kept)
    yield watch
    core.lbq_watch_join(None)


@pytest.mark.parametrize("threads", [1, 3])
def test_watch_is_asked_now_and_then_by_its_own_thread(core, watch, threads):
    assert core.lbq_set_threads(threads) == 0
    watch.answers = [False, True]
    done = []

    def task(_, index, worker):
        done.append(index)
        time.sleep(0.002)
        return 0

    status = core.lbq_parallel(ctypes.c_ssize_t(10000), TASK(task), None)
    core.lbq_set_threads(1)
    assert status == INTERRUPTED
    assert watch.asked == [threading.get_ident()] * 2
    assert len(done) < 5000, "two periods of 50 ms; all tasks take 7 to 20 s"
    assert core.lbq_interrupted() == INTERRUPTED, "an ended watch stays so"
    core.lbq_watch_join(None)
    assert core.lbq_interrupted() == 0


def test_interruption_outweighs_failures(core, watch):
    core.lbq_set_threads(3)
    watch.answers = [True]

    def task(_, index, worker):
        time.sleep(0.002)
        return core.lbq_fail(1, b"failed")

    assert core.lbq_parallel(ctypes.c_ssize_t(300), TASK(task), None) == INTERRUPTED
    core.lbq_set_threads(1)
