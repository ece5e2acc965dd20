"""Base matrices, the orders that make n, and the fast transform, on every instruction set."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest

from lowbitq import _core

UNIT = 2.0**-24  # float32 rounding

ORDERS = {
    1: [],
    2: [],
    64: [],
    128: [],
    4096: [],
    16384: [],
    3: [3],
    5: [5],
    7: [7],
    12: [12],
    20: [20],
    36: [36],
    60: [60],
    80: [20],
    96: [12],
    576: [36],
    640: [20],
    896: [28],
    960: [60],
    1536: [12],
    2560: [20],
    3584: [28],
    4864: [76],
    5120: [20],
    5632: [44],
    8960: [28, 20],
    9728: [76],
    10944: [76, 36],
    11008: [344],
    13696: [107],
    13824: [12, 12, 12],
    14336: [28],
    17408: [68],
    18944: [148],
    25600: [20, 20],
    29568: [44, 28, 12],
}


def orders_of(n):
    orders = np.full(8, -1, np.int64)
    _core.hadamard_orders(orders, n=n)
    return orders[orders != 0].tolist()


def base_of(order):
    base = np.full((order, order), np.nan, np.float32)
    _core.hadamard_base(base)
    return base


def rotation_of(n, orders=None):
    """Handle, orders, bases and signs of a randomised rotation."""
    orders = orders_of(n) if orders is None else orders
    bases = [base_of(c) for c in orders]
    signs = np.random.default_rng(n).choice([-1.0, 1.0], n)
    flat = np.concatenate([m.ravel() for b in bases for m in (b, b.T)] or [np.empty(0, np.float32)])
    diagonal = (signs / math.sqrt(n)).astype(np.float32)
    handle = _core.hadamard_rotation(np.array(orders, np.int64), flat, diagonal)
    return handle, orders, bases, signs


def is_prime_power(q):
    prime = next((p for p in range(2, q + 1) if q % p == 0), None)
    while prime and q % prime == 0:
        q //= prime
    return q == 1 and prime is not None


def has_paley(order):
    one = order % 4 == 0 and is_prime_power(order - 1)
    return one or (order % 4 == 0 and order // 2 % 4 == 2 and is_prime_power(order // 2 - 1))


@pytest.mark.parametrize("n", ORDERS)
def test_orders_of_model_sizes(n):
    assert orders_of(n) == ORDERS[n]


def test_orders_multiply_to_n_and_avoid_hartley_wherever_paley_makes_n():
    reachable = {1, 2}
    for n in range(4, 513, 4):
        paley = [c for c in range(12, n + 1, 4) if n % c == 0 and has_paley(c)]
        if n // 2 in reachable or any(n // c in reachable for c in paley):
            reachable.add(n)
    for n in range(1, 513):
        orders = orders_of(n)
        rest = n // math.prod(orders)
        assert rest * math.prod(orders) == n
        assert rest & (rest - 1) == 0
        assert orders == sorted(orders, reverse=True) or n not in reachable
        odd = [c for c in orders if not has_paley(c)]
        assert (n in reachable) == (not odd), n
        assert len(odd) <= 1


@pytest.mark.parametrize("order", [c for c in range(4, 400, 4) if has_paley(c)] + [684, 924])
def test_paley_matrix_is_hadamard(order):
    base = base_of(order).astype(np.int64)
    assert (abs(base) == 1).all()
    assert (base @ base.T == order * np.eye(order, dtype=np.int64)).all()


@pytest.mark.parametrize("order", [1, 3, 5, 7, 9, 11, 33, 43, 107, 171])
def test_hartley_matrix_is_orthogonal_and_flat(order):
    base = base_of(order)
    i = np.arange(order)
    angle = 2 * np.pi * np.outer(i, i) / order
    # The angle's error, relative to at most order * 2 pi, dominates in the naive float64 formula.
    bound = UNIT * np.sqrt(2) + 2 * np.pi * order * 2.0**-52
    assert (abs(base - np.cos(angle) - np.sin(angle)) <= bound).all()
    gram = base.astype(float) @ base.T.astype(float)
    assert (abs(gram - order * np.eye(order)) <= 4 * order * UNIT).all()
    assert abs(base).max() <= np.sqrt(2)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("n", [n for n in ORDERS if n <= 1536])
def test_transform_matches_the_definition(isa, n, rows):
    check_transform(n, rows)


@pytest.mark.parametrize("n", [n for n in ORDERS if n > 1536])
def test_long_transform_matches_the_definition(isa, n):
    check_transform(n, 1)


@pytest.mark.parametrize("orders", [[3, 5], [5, 33], [12, 36], [36, 12], [3, 31, 2, 8], [7, 9]])
def test_any_number_of_lanes(isa, orders):
    """Lane counts around whole registers, which no order of a model size has."""
    check_transform(math.prod(orders), 3, orders)


def check_transform(n, rows, orders=None):
    handle, orders, bases, signs = rotation_of(n, orders)
    power = round(math.log2(n // math.prod(orders)))
    x = np.random.default_rng([n, rows]).standard_normal((rows, n), dtype=np.float32)
    buffer = np.full((rows + 2) * n + 1, np.nan, np.float32)
    guarded = buffer[1:].reshape(rows + 2, n)  # not even 16-byte aligned
    guarded[1:-1] = x

    _core.rotate(handle, guarded[1:-1])
    expected = oracle.kronecker(bases, power, x * signs) / math.sqrt(n)
    # Each output is a sum of n products in which no path has more than this many roundings; the
    # entries of Hartley's matrices are up to sqrt(2).
    depth = sum(orders) + power + len(orders) + 3
    flatness = math.prod(abs(base).max() for base in bases)
    bound = depth * UNIT * flatness * abs(x).astype(float).sum(1, keepdims=True) / math.sqrt(n)
    assert (abs(guarded[1:-1] - expected) <= bound).all()

    _core.rotate_back(handle, guarded[1:-1])
    twice = bound * (1 + flatness * math.sqrt(n)) * flatness
    assert (abs(guarded[1:-1] - x) <= twice).all()
    assert np.isnan(guarded[[0, -1]]).all(), "wrote outside x"


@pytest.mark.parametrize("n", [16, 80, 96, 576, 1536, 8192, 8960, 11008, 13696, 29568])
def test_transform_has_the_same_bits_on_every_isa(isa, n):
    handle, *_ = rotation_of(n)
    x = np.random.default_rng(n).standard_normal((2, n), dtype=np.float32)
    ours = x.copy()
    _core.rotate(handle, ours[:1])
    _core.rotate_back(handle, ours[1:])
    _core.use_isa(isa="portable")
    _core.rotate(handle, x[:1])
    _core.rotate_back(handle, x[1:])
    assert (ours == x).all()


def test_transform_has_the_same_bits_for_every_number_of_threads():
    handle, *_ = rotation_of(4864)
    x = np.random.default_rng(0).standard_normal((64, 4864), dtype=np.float32)
    before = _core.config()["threads"]
    results = []
    for threads in (1, 2, 3):
        _core.set_num_threads(threads=threads)
        results.append(x.copy())
        _core.rotate(handle, results[-1])
    _core.set_num_threads(threads=before)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_no_rows_is_no_work():
    handle, *_ = rotation_of(12)
    _core.rotate(handle, np.empty((0, 12), np.float32))


def test_refusals():
    handle, *_ = rotation_of(12)
    with pytest.raises(ValueError, match="x has 13 columns, expected 12"):
        _core.rotate(handle, np.zeros((1, 13), np.float32))
    with pytest.raises(ValueError, match="order over 4096"):
        _core.hadamard_orders(np.zeros(8, np.int64), n=2 * 4099)
    with pytest.raises(ValueError, match="order is 4097, expected 1 to 4096"):
        _core.hadamard_base(np.empty((4097, 4097), np.float32))
    one, none = np.ones(24, np.float32), np.empty(0, np.float32)
    with pytest.raises(ValueError, match="expected a power of two"):
        _core.hadamard_rotation(np.empty(0, np.int64), none, one)
    with pytest.raises(ValueError, match="expected a divisor of 24"):
        _core.hadamard_rotation(np.array([5]), np.empty(50, np.float32), one)
    with pytest.raises(ValueError, match="bases has size 287, expected 288"):
        _core.hadamard_rotation(np.array([12]), np.empty(287, np.float32), one)
    with pytest.raises(ValueError, match="9 orders, expected at most 8"):
        _core.hadamard_rotation(np.ones(9, np.int64), none, one)
