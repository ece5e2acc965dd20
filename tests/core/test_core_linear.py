"""Linear layers: against float64, and bit for bit among themselves."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from packed_parts import code_of, dense_layer, description, pack, packed_layer, random_parts

from lowbitq import _core
from lowbitq.rotations import Rotation

# rows, cols, group: one panel and less, ragged tails of each, real layer sizes
SIZES = [
    (1, 1, None),
    (15, 17, 32),
    (16, 64, 64),
    (17, 33, None),
    (33, 576, 128),
    (40, 200, 64),
    (50, 1100, 32),
    (576, 576, 64),
]
# bits, scale_bits, has_offset, zero: ternary, binary, mid-rise, asymmetric, two-level
CODES = [
    (1, 16, False, 0.5),
    (2, 16, False, 1.0),
    (2, 16, True, 0.0),
    (3, 16, True, 0.0),
    (3, 8, False, 3.5),
    (4, 16, False, 7.5),
    (4, 4, False, 7.5),
    (8, 16, True, 0.0),
    (8, 8, False, 127.5),
]


class Layer:
    """A packed layer with random parts, and its result by the oracle."""

    def __init__(self, rows, cols, group, code, activation_bits=8, levels=None, rotation=None):
        bits, scale_bits, has_offset, zero = code
        self.spec = description(rows, cols, bits, group, scale_bits, has_offset, 2.0**-7, zero)
        self.codes, self.scale, offset = random_parts(self.spec)
        self.offset = offset if has_offset else np.float32(-zero) * self.scale
        self.levels = levels
        self.bias = np.random.default_rng(1).normal(size=rows).astype(np.float32)
        self.panels = pack(self.spec, self.codes, self.scale, offset)
        self.limit = (1 << (activation_bits - 1)) - 1 if activation_bits else None
        self.handle = packed_layer(
            self.panels,
            levels,
            self.bias,
            rotation and rotation.handle,
            activation_bits=activation_bits,
            **self.spec,
        )

    def forward(self, x):
        """y (t, rows), computed between two guard rows of NaN."""
        y = np.full((len(x) + 2, self.spec["rows"]), np.nan, np.float32)
        _core.linear_forward(self.handle, x, y[1:-1])
        assert np.isnan(y[[0, -1]]).all(), "wrote outside y"
        return y[1:-1]

    def expected(self, x):
        parts = self.codes, self.scale, self.offset, self.spec["group"]
        return oracle.quantized_linear(*parts, x, self.bias, self.limit, self.levels)


def random_levels(bits):
    """Levels of very different sizes, one of them zero."""
    levels = np.random.default_rng(bits).normal(size=1 << bits).astype(np.float32) ** 3
    levels[1] = 0
    return levels


def activations(tokens, cols, seed=0):
    """Tokens of very different sizes, at an address that is not a multiple of 8."""
    rng = np.random.default_rng([seed, tokens, cols])
    buffer = np.zeros(tokens * cols + 1, np.float32)
    x = buffer[1:].reshape(tokens, cols)
    x[:] = rng.normal(size=x.shape) * 10.0 ** rng.integers(-3, 4, (tokens, 1))
    return x


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("rows", "cols", "group"), SIZES)
def test_quantized_product_is_within_rounding(isa, rows, cols, group, code):
    layer = Layer(rows, cols, group, code)
    for tokens in (1, 2, 3, 9):
        x = activations(tokens, cols)
        expected, bound = layer.expected(x)
        assert (abs(layer.forward(x) - expected) <= bound).all()


@pytest.mark.parametrize("code", [code for code in CODES if code[0] <= 4])
@pytest.mark.parametrize(("rows", "cols", "group"), SIZES)
def test_levels_are_multiplied_as_bytes(isa, rows, cols, group, code):
    layer = Layer(rows, cols, group, code, levels=random_levels(code[0]))
    for tokens in (1, 2, 3, 9):
        x = activations(tokens, cols)
        expected, bound = layer.expected(x)
        assert (abs(layer.forward(x) - expected) <= bound).all()


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_bits_are_equal_on_every_isa_and_thread_count(threads, code, group, table):
    if code[0] == 8 and table:
        pytest.skip("no table of 256 levels")
    levels = random_levels(code[0]) if table else None
    layer = Layer(333, 1100, group, code, levels=levels)
    x = activations(300, 1100)
    isas = ["portable", "avx2", "avx512"]
    best = _core.config()["cpu_isa"]
    results = []
    try:
        for isa in isas[: isas.index(best) + 1]:
            _core.use_isa(isa=isa)
            for count in (1, 2):
                _core.set_num_threads(threads=count)
                results.append(layer.forward(x if isa != "portable" else x[:40]))
    finally:
        _core.use_isa(isa=best)
    for y in results:
        assert (y.view(np.uint32) == results[-1][: len(y)].view(np.uint32)).all()


@pytest.mark.parametrize("code", CODES)
def test_a_token_does_not_depend_on_its_neighbours(isa, code):
    layer = Layer(49, 300, 64, code)
    x = activations(300 if isa != "portable" else 40, 300)
    alone = np.vstack([layer.forward(x[t : t + 1]) for t in range(len(x))])
    for tokens in (2, 3, 4, 5, 7, 8, 9, 17, len(x)):
        together = layer.forward(x[:tokens])
        assert (together.view(np.uint32) == alone[:tokens].view(np.uint32)).all()


@pytest.mark.parametrize("code", CODES)
def test_results_repeat_on_two_threads(threads, code):
    """Enough work for the pool: one token, a few and many."""
    layer = Layer(4100, 1030, 64, code)
    for tokens in (1, 4, 20):
        x = activations(tokens, 1030)
        _core.set_num_threads(threads=1)
        expected = layer.forward(x)
        _core.set_num_threads(threads=2)
        assert (layer.forward(x) == expected).all()


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize("group", [16, 128])
def test_four_bit_activations_and_narrow_groups(isa, group, activation_bits):
    for bits in (2, 4, 8):
        layer = Layer(20, 150, group, (bits, 16, True, 0), activation_bits)
        x = activations(11, 150)
        expected, bound = layer.expected(x)
        assert (abs(layer.forward(x) - expected) <= bound).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_integer_sums_are_exact_at_extreme_codes(isa, bits, group):
    """Every product the largest possible; 32,768 columns of 8-bit codes fill 24 bits of float32."""
    rows, cols = 17, 65536 if bits <= 4 else 32768
    spec = description(rows, cols, bits, group)
    codes = np.full((rows, cols), (1 << bits) - 1, np.uint8)
    codes[3] = 0
    scale = np.ones((rows, -(-cols // spec["group"])), np.float32)
    panels = pack(spec, codes, scale, None)
    layer = packed_layer(panels, None, None, None, activation_bits=8, **spec)
    for tokens in (1, 2, 4, 8):
        x = np.full((tokens, cols), 127, np.float32)
        x[-1] = -127
        y = np.empty((tokens, rows), np.float32)
        _core.linear_forward(layer, x, y)
        assert (y == (x.astype(np.int64) @ codes.T.astype(np.int64))).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_integer_sums_are_exact_at_extreme_levels(isa, bits, group):
    """Levels of +-127 are bytes of 1 and 255; 64 columns of them with 127 fill 22 bits."""
    rows, cols = 17, 4096
    spec = description(rows, cols, bits, group)
    levels = np.linspace(-127, 127, 1 << bits).astype(np.float32)
    codes = np.full((rows, cols), (1 << bits) - 1, np.uint8)
    codes[3] = 0
    scale = np.ones((rows, -(-cols // spec["group"])), np.float32)
    panels = pack(spec, codes, scale, None)
    layer = packed_layer(panels, levels, None, None, activation_bits=8, **spec)
    for tokens in (1, 2, 4, 8):
        x = np.full((tokens, cols), 127, np.float32)
        x[-1] = -127
        y = np.empty((tokens, rows), np.float32)
        _core.linear_forward(layer, x, y)
        integers = np.where(codes == 0, -127, 127)
        assert (y == (x.astype(np.int64) @ integers.T)).all()


def test_activations_that_quantize_oddly(isa):
    """Steps of zeros, of denormals, of one huge value, and ties between integers."""
    layer = Layer(20, 256, 64, (4, 16, False, 7.5))
    x = np.zeros((4, 256), np.float32)
    x[0, 64:128] = 1e-42
    x[1, 5] = 3e38
    x[2, :128] = np.arange(128) - 0.5
    x[2, 0] = 127
    x[3, 128:] = -np.arange(128) / 2
    expected, bound = layer.expected(x)
    with np.errstate(over="ignore"):
        assert (abs(layer.forward(x).astype(np.float64) - expected) <= bound)[[0, 2, 3]].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_stays_with_its_token(isa, bad):
    layer = Layer(20, 100, 32, (3, 16, True, 0))
    for tokens in (3, 9):
        x = activations(tokens, 100)
        clean = layer.forward(x)
        x[1, 99] = bad
        y = layer.forward(x)
        assert np.isnan(y[1]).all()
        assert (np.delete(y, 1, 0) == np.delete(clean, 1, 0)).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("rows", "cols", "group"), SIZES)
def test_float_activations_agree_with_dequantized_weights(isa, rows, cols, group, code):
    table = code[0] <= 4
    rng = np.random.default_rng(2)
    levels = rng.normal(size=1 << code[0]).astype(np.float32) if table else None
    layer = Layer(rows, cols, group, code, activation_bits=0, levels=levels)
    weight = np.empty((rows, cols), np.float32)
    _core.packed_dequantize(
        code_of(layer.spec, levels), layer.panels, weight, group=layer.spec["group"]
    )
    for tokens in (1, 5):
        x = activations(tokens, cols)
        expected, bound = oracle.float_linear(weight, x, layer.bias)
        assert (abs(layer.forward(x) - expected) <= bound).all()


def dense(rows, cols, rotation=None):
    rng = np.random.default_rng([rows, cols])
    weight = rng.normal(size=(rows, cols)).astype(np.float32)
    bias = rng.normal(size=rows).astype(np.float32)
    return dense_layer(weight, bias, rotation and rotation.handle)


def check_shared(handles, rows, x):
    """Layers give the same bits together as alone, and write nothing else."""
    tokens = len(x)
    y = np.full(tokens * sum(rows) + 2, np.nan, np.float32)
    _core.linears_forward(tuple(handles), x, y[1:-1])
    assert np.isnan(y[[0, -1]]).all(), "wrote outside y"
    at = 1
    for handle, size in zip(handles, rows, strict=True):
        alone = np.empty((tokens, size), np.float32)
        _core.linear_forward(handle, x, alone)
        together = y[at : at + tokens * size].reshape(alone.shape)
        assert (together.view(np.uint32) == alone.view(np.uint32)).all()
        at += tokens * size


@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 21])
@pytest.mark.parametrize(("cols", "group"), [(1, 32), (200, 64), (576, 64), (1100, None)])
def test_layers_of_one_input_share_its_activations(isa, cols, group, tokens):
    """One step, but different widths, levels and numbers of rows: four and two at a time."""
    rows = [1, 16, 40, 17, 300, 15]
    table = np.linspace(-2, 1, 16, dtype=np.float32)
    layers = [Layer(r, cols, group, code) for r, code in zip(rows[:5], CODES[:5], strict=True)]
    layers.insert(2, Layer(15, cols, group, CODES[5], levels=table))
    rows.insert(2, rows.pop())
    check_shared([layer.handle for layer in layers], rows, activations(tokens, cols))


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_layers_of_one_input_that_cannot_share(isa, tokens):
    """A different group, activation width, kind or rotation between layers that could share."""
    code, turn, other = CODES[4], Rotation(96, seed=1), Rotation(96, seed=2)
    layers = [
        Layer(20, 96, 32, code),
        Layer(20, 96, 64, code),
        Layer(20, 96, 64, code, activation_bits=4),
        Layer(20, 96, 64, code, activation_bits=0),
        Layer(20, 96, 64, code, rotation=turn),
        Layer(20, 96, 64, CODES[0], rotation=turn),
        Layer(20, 96, 64, code, rotation=other),
    ]
    handles = [layer.handle for layer in layers]
    x = activations(tokens, 96)
    check_shared(handles, [20] * len(handles), x)
    check_shared([dense(5, 96), *handles[:2]], [5, 20, 20], x)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_dense_layers_share_one_rotation(kind):
    rotation = Rotation(96, kind, seed=1)
    x = activations(5, 96)
    check_shared([dense(30, 96, rotation), dense(7, 96, rotation)], [30, 7], x)


@pytest.mark.parametrize("activation_bits", [0, 4, 8])
@pytest.mark.parametrize("cols", [1, 64, 96, 576, 1536])
def test_a_rotated_input_is_quantized_as_if_rotated_before(isa, cols, activation_bits):
    rotation = Rotation(cols, seed=3)
    layer = Layer(33, cols, 32, CODES[2], activation_bits, rotation=rotation)
    plain = Layer(33, cols, 32, CODES[2], activation_bits)
    for tokens in (1, 4, 19):
        x = activations(tokens, cols)
        before = x.copy()
        y = layer.forward(x)
        assert (x == before).all()
        assert (y == plain.forward(rotation.apply(x))).all()


def test_shared_layers_repeat_on_two_threads(threads):
    """Enough work for the pool, split across the boundary between the layers."""
    rotation = Rotation(1024, seed=1)
    rows = [2100, 70, 1990]
    layers = [
        Layer(r, 1024, 64, code, rotation=rotation)
        for r, code in zip(rows, CODES[2:5], strict=True)
    ]
    handles = tuple(layer.handle for layer in layers)
    for tokens in (1, 4, 200):
        x = activations(tokens, 1024)
        results = []
        for count in (1, 2, 3):
            _core.set_num_threads(threads=count)
            y = np.empty(tokens * sum(rows), np.float32)
            _core.linears_forward(handles, x, y)
            results.append(y)
        assert (results[0] == results[1]).all()
        assert (results[0] == results[2]).all()


def test_panels_need_no_alignment(isa):
    layer = Layer(40, 200, 64, (3, 16, True, 0))
    shifted = np.zeros(len(layer.panels) + 1, np.uint8)[1:]
    shifted[:] = layer.panels
    other = packed_layer(shifted, None, layer.bias, None, activation_bits=8, **layer.spec)
    for tokens in (1, 9):
        x = activations(tokens, 200)
        y = np.empty((tokens, 40), np.float32)
        _core.linear_forward(other, x, y)
        assert (y == layer.forward(x)).all()


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_layer(tokens, with_bias):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(19, 70)).astype(np.float32)
    bias = rng.normal(size=19).astype(np.float32) if with_bias else None
    x = activations(tokens, 70)
    y = np.full((tokens + 2, 19), np.nan, np.float32)
    _core.linear_forward(dense_layer(weight, bias, None), x, y[1:-1])
    expected, bound = oracle.float_linear(weight, x, bias)
    assert (abs(y[1:-1] - expected) <= bound).all()
    assert np.isnan(y[[0, -1]]).all()


def test_a_layer_keeps_its_arrays_alive():
    layer = dense_layer(np.ones((3, 1000), np.float32), None, None)
    y = np.empty((1, 3), np.float32)
    _core.linear_forward(layer, np.ones((1, 1000), np.float32), y)
    assert (y == 1000).all()


def test_parts_that_do_not_fit_are_refused():
    layer = Layer(20, 100, 64, (4, 16, False, 7.5))
    make = packed_layer
    x, y = np.zeros((1, 100), np.float32), np.zeros((1, 20), np.float32)
    with pytest.raises(ValueError, match="activation_bits is 5, expected 0, 4 or 8"):
        make(layer.panels, None, None, None, activation_bits=5, **layer.spec)
    with pytest.raises(ValueError, match="axis 0 of bias has size 19, expected rows = 20"):
        make(layer.panels, None, y[0, :19], None, activation_bits=8, **layer.spec)
    with pytest.raises(ValueError, match="axis 1 of x has size 20, expected cols = 100"):
        _core.linear_forward(layer.handle, y.copy(), y)
    with pytest.raises(ValueError, match="axis 1 of y has size 100, expected rows = 20"):
        _core.linear_forward(layer.handle, x, x.copy())
    with pytest.raises(TypeError, match=r"layer is not a lowbitq\.linear"):
        _core.linear_forward(object(), x, y)
    with pytest.raises(ValueError, match="axis 0 of y has size 20, expected tokens times all rows"):
        _core.linears_forward((layer.handle, layer.handle), x, y[0])
    with pytest.raises(ValueError, match="axis 1 of x has size 20, expected cols = 100"):
        _core.linears_forward((layer.handle,), y.copy(), y[0])
    with pytest.raises(ValueError, match="9 layers, expected at most 8"):
        _core.linears_forward((layer.handle,) * 9, x, y[0])
    with pytest.raises(TypeError, match=r"layers\[1\] is not a lowbitq\.linear"):
        _core.linears_forward((layer.handle, None), x, y[0])
