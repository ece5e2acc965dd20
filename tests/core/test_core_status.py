"""Statuses: the message of a failure, and the exception it becomes."""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np
import pytest

from lowbitq import FormatError, NumericalError, _core


def test_fail_stores_the_message_and_returns_the_status(core):
    assert core.lbq_fail(2, b"%d columns are not whole groups of %d", 100, 64) == 2
    assert core.lbq_message() == b"100 columns are not whole groups of 64"


def test_long_message_is_cut_not_overrun(core):
    core.lbq_fail(1, b"%s", b"x" * 5000)
    assert core.lbq_message() == b"x" * 255


def test_message_belongs_to_its_thread(core):
    core.lbq_fail(1, b"of the main thread")
    seen = []

    def other():
        seen.append(core.lbq_message())
        core.lbq_fail(1, b"of the other thread")
        seen.append(core.lbq_message())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [b"", b"of the other thread"]
    assert core.lbq_message() == b"of the main thread"


def test_bad_value_is_value_error_with_the_message():
    with pytest.raises(ValueError, match="isa is 'mmx', expected 'portable', 'avx2' or 'avx512'"):
        _core.use_isa(isa="mmx")


def test_no_memory_is_memory_error():
    with pytest.raises(MemoryError, match="bytes"):
        _core.aligned_empty(bytes=2**62)


def test_exceptions_stand_where_python_puts_them():
    assert issubclass(NumericalError, ArithmeticError)
    assert issubclass(FormatError, ValueError)
    assert NumericalError.__module__ == FormatError.__module__ == "lowbitq"


@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        ([1, 2], np.empty(2, np.float32), TypeError, "x"),
        (np.zeros(2, np.int16), np.empty(2, np.float32), TypeError, "x"),
        (np.zeros((2, 1), np.uint16), np.empty(2, np.float32), ValueError, "x"),
        (np.zeros(2, np.uint16), np.empty(3, np.float32), ValueError, "y"),
        (np.zeros(4, np.uint16)[::2], np.empty(2, np.float32), ValueError, "x"),
        (np.zeros(2, ">u2"), np.empty(2, np.float32), TypeError, "x"),
        (np.zeros(2, np.uint16), np.empty(2, ">f4"), TypeError, "y"),
        (np.zeros(5, np.uint8)[1:].view(np.uint16), np.empty(2, np.float32), ValueError, "x"),
        (np.zeros(2, np.uint16), np.zeros(9, np.uint8)[1:].view(np.float32), ValueError, "y"),
    ],
    ids=[
        *("list", "dtype", "dimensions", "length", "strides"),
        *("swapped input", "swapped output", "unaligned input", "unaligned output"),
    ],
)
def test_arrays_are_refused_not_converted(x, y, error, match):
    with pytest.raises(error, match=match):
        _core.half_to_float(x, y)


def test_an_axis_is_empty_only_where_its_table_says_so():
    _core.half_to_float(np.empty(0, np.uint16), np.empty(0, np.float32))
    H = np.zeros((2, 2))
    _core.hessian_add(np.empty((0, 2), np.float32), None, H)
    assert (H == 0).all()
    with pytest.raises(ValueError, match=r"axis 1 \(k\) of x has size 0, expected at least 1"):
        _core.hessian_add(np.empty((5, 0), np.float32), None, np.empty((0, 0)))


def test_outputs_share_no_memory_with_other_arrays():
    memory = np.zeros(10, np.float32)
    x, logits = np.ones((1, 4), np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="y shares memory with x"):
        _core.half_to_float(memory[:4].view(np.uint16)[:8], memory[2:])
    _core.half_to_float(memory[:4].view(np.uint16)[:6], memory[4:])
    kl = np.empty(2)
    with pytest.raises(ValueError, match="kl shares memory with same"):
        _core.kl_divergence(logits, logits, kl, kl.view(np.uint8)[7:9])
    _core.rmsnorm(x, None, x, epsilon=0.0)  # the one pair that the table allows
    with pytest.raises(ValueError, match="y shares memory with gain"):
        _core.rmsnorm(x, memory[:4], memory[:4].reshape(1, 4), epsilon=0.0)
    both = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="y shares memory with x"):
        _core.rmsnorm(both[:2], None, both[1:], epsilon=0.0)


def test_readonly_output_is_refused():
    y = np.empty(2, np.float32)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="y"):
        _core.half_to_float(np.zeros(2, np.uint16), y)


@pytest.mark.parametrize("threads", [0, -1, 257, 2**70])
def test_numbers_outside_their_range_are_refused(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 256"):
        _core.set_num_threads(threads=threads)


def test_scalars_are_keyword_only_and_required():
    with pytest.raises(TypeError):
        _core.set_num_threads(2)
    with pytest.raises(TypeError, match="threads"):
        _core.set_num_threads()
    with pytest.raises(TypeError):
        _core.set_num_threads(threads=1, cores=2)


def test_reference_counts_do_not_grow():
    x, y = np.zeros(8, np.uint16), np.empty(8, np.float32)
    before = sys.getrefcount(x), sys.getrefcount(y)
    for _ in range(100):
        _core.half_to_float(x, y)
        with pytest.raises(ValueError, match="y"):
            _core.half_to_float(x, y[1:])
    assert (sys.getrefcount(x), sys.getrefcount(y)) == before


def test_handle_of_another_type_is_refused(core):
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    capsule = make(1, b"somebody.else", None)
    with pytest.raises(TypeError):
        _core.half_to_float(capsule, np.empty(1, np.float32))
