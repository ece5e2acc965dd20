"""csrc/codes/trellis.c: rings of words, their levels, and the search for them."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from random_model import random_model, random_tokens

from lowbitq import _core
from lowbitq.compression import compress
from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.linears import Copy, QuantizedLinear
from lowbitq.models import load
from lowbitq.quantizers import adaround, quantize
from lowbitq.tensors import QuantizedTensor

# Of 102,400 samples; the bound is 4^-bits.
MOST_ERROR = {
    "trellis1": 0.288,
    "trellis1w10": 0.291,
    "trellis1.5": 0.144,
    "trellis2": 0.0755,
    "trellis2w10": 0.0765,
    "trellis3": 0.0196,
    "trellis3w14": 0.0190,
    "trellis4": 0.0053,
    "trellis4w14": 0.0050,
}
SIZES = [(1, 1), (17, 33), (64, 64), (130, 200)]


@pytest.fixture(params=MOST_ERROR)
def code(request):
    return request.param


def normal(rows, cols, seed=0):
    return np.random.default_rng([seed, rows, cols]).standard_normal((rows, cols), np.float32)


def random_tensor(text, rows, cols):
    """A tensor of random codes, all scales 1/128."""
    format = Format.parse(text)
    codes = np.random.default_rng(rows).integers(
        0, format.level_count, format.code_shape(rows, cols), np.uint8
    )
    codes[:, 1:] *= np.arange(1, codes.shape[1]) % round(format.bits / format.rate) == 0
    scale = np.full((rows, format.groups(cols)), 2.0**-7, np.float32)
    offset = None if format.symmetric else -scale
    tensor = QuantizedTensor.pack(text, codes, scale, offset, shape=(rows, cols))
    assert (tensor.codes == codes).all()
    return tensor


def levels_of(tensor):
    rows, cols = tensor.shape
    return oracle.trellis_levels(tensor.format.code, tensor.codes)[:rows, :cols]


def values_of(tensor):
    """The matrix by the oracle, in float64."""
    cols = tensor.shape[1]
    levels = levels_of(tensor)
    parts = tensor.scale, tensor.offset, tensor.format.group or cols
    return oracle.decode(levels, *parts)


def test_distortion_of_a_normal_variable(code):
    weight = oracle.normal_quantiles(64 * 1600)
    weight = np.random.default_rng(0).permutation(weight).reshape(512, 200).astype(np.float32)
    for text in (code, f"{code}tensor"):
        assert ((quantize(weight, text).dequantize() - weight) ** 2).mean() <= MOST_ERROR[code]


def test_words_are_the_same_everywhere(isa, code):
    weight = normal(70, 20)
    tensor = quantize(weight, code)
    _core.use_isa(isa="portable")
    assert (quantize(weight, code).codes == tensor.codes).all()


def test_words_err_no_more_than_those_of_the_formula(code):
    """Weights of unlike rows; rows that are missing cost nothing."""
    rows, cols, format = 50, 6, Format.parse(code)
    weight = normal(rows, cols) * np.exp(normal(rows, 1, seed=1))
    tensor = quantize(weight, code)
    order = np.arange(64).reshape(4, 16).T.ravel()  # rows by their places
    scale = np.append(tensor.scale[:, 0].astype(float), np.zeros(64 - rows))[order]
    target = np.append(weight - tensor.offset.astype(float), np.zeros((64 - rows, cols)), 0)[order]
    expected = 0.0
    for k in range(0, cols, format.run):
        expected += oracle.trellis_error(code, target[:, k : k + format.run], scale)
    assert ((values_of(tensor) - weight) ** 2).sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "trellis2",
        "trellis2g64",
        "trellis2g32s8",
        "trellis2tensor",
        "trellis1g32",
        "trellis1.5g64",
        "trellis3g32",
        "trellis4",
    ],
)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_values_are_those_of_the_formula(isa, rows, cols, text):
    tensor = quantize(normal(rows, cols), text)
    assert tensor.codes.shape == tensor.format.code_shape(rows, cols)
    exact = values_of(tensor)
    values = tensor.dequantize()
    assert (values == exact.astype(np.float32)).all()
    arrays, metadata = tensor.to_arrays()
    again = QuantizedTensor.from_arrays(arrays, metadata)
    assert (again.dequantize() == values).all()
    assert tensor.nbytes == tensor.format.stored_bytes(rows, cols)


def test_panels_share_out_the_columns_of_a_step(code):
    format = Format.parse(f"{code}g128")
    apart = round(format.bits / format.rate)
    words = np.random.default_rng(3).integers(0, format.level_count, (128, 256), np.uint8)
    words[:, np.arange(256) % apart > 0] = 0
    scale = np.ones((128, 2), np.float32)
    tensor = QuantizedTensor.pack(format, words, scale, shape=(128, 256))
    steps = tensor.panels.reshape(2, 4, 2, -1)[..., :-32]  # without scales
    for strip, rows in enumerate(words.reshape(2, 64, 256)):
        for step in range(2):
            stored = rows[:, 128 * step : 128 * (step + 1) : apart]
            panels = [panel.tobytes() for panel in steps[strip, :, step]]
            assert panels == oracle.packed_rings(stored, format.bits)
    assert (tensor.codes == words).all()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("others", [[], ["int2g64"], ["trellis1g64", "lattice2g64"]])
def test_products_have_the_same_bits_everywhere(isa, threads, count, others, code):
    """Also in sums of copies, whose other terms come panel by panel."""
    rows, cols = 90, 128
    tensors = [random_tensor(text, rows, cols) for text in (f"{code}g64", *others)]
    x = normal(9, cols)
    for order in (tensors, tensors[::-1]):
        layer = QuantizedLinear(tuple(map(Copy, order)))
        _core.use_isa(isa=isa)
        _core.set_num_threads(threads=count)
        ours = [layer.forward(x[:tokens]) for tokens in (1, 3, 9)]
        _core.use_isa(isa="portable")
        _core.set_num_threads(threads=1)
        expected = layer.forward(x)
        assert all((y == expected[: len(y)]).all() for y in ours)


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize(
    "text",
    [
        "trellis2g64",
        "trellis2",
        "trellis1g32",
        "trellis1.5",
        "trellis1.5g128",
        "trellis3g64",
        "trellis4g16",
    ],
)
@pytest.mark.parametrize(("rows", "cols"), [*SIZES, (130, 1500)])
def test_products_are_within_rounding(isa, rows, cols, text, activation_bits):
    tensor = random_tensor(text, rows, cols)
    layer = QuantizedLinear.of(tensor, activation_bits=activation_bits)
    levels = levels_of(tensor)
    for tokens in (1, 3, 9):
        x = normal(tokens, cols)
        parts = levels, tensor.scale, tensor.offset, tensor.format.group or cols
        y, bound = oracle.quantized_linear(*parts, x, None, (1 << activation_bits - 1) - 1)
        assert (abs(layer.forward(x) - y) <= bound).all()
        y, bound = oracle.float_linear(tensor.dequantize(), x, None)
        assert (abs(tensor @ x.T - y.T) <= bound.T).all()


@pytest.mark.parametrize("order", ["none", "act", "group"])
@pytest.mark.parametrize(
    ("text", "scalar"),
    [("trellis2g64", "int2g64"), ("trellis1.5g64", "int1g64"), ("trellis3g64", "int3g64")],
)
def test_error_feedback_beats_rounding(text, scalar, order):
    weight, hessian = normal(100, 192), oracle.gram(192, 1)
    inputs = feedback(hessian, group=64, run=Format.parse(text).run, order=order)
    tensor, error = gptq(weight, inputs, text, sweeps=2)
    nearest = quantize(weight, text)
    losses = [oracle.output_loss(weight, t.dequantize(), hessian).sum() for t in (nearest, tensor)]
    assert losses[1] < 0.7 * losses[0]
    assert error < gptq(weight, inputs, scalar)[1]


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_without_correlations_feedback_is_rounding(arithmetic):
    weight = normal(70, 40)
    inputs = feedback(np.eye(40), arithmetic=arithmetic)
    tensor, _ = gptq(weight, inputs, "trellis2")
    assert (tensor.panels == quantize(weight, "trellis2").panels).all()


@pytest.mark.parametrize(("format", "most"), [("trellis2g32", 0.2), ("trellis1.5g64", 0.35)])
def test_compressed_models_are_saved_and_loaded(isa, tmp_path, format, most):
    text, tokens = random_tokens(512).reshape(8, 64), random_tokens(64, seed=1)
    model = compress(random_model(layers=1), format, text=text)
    logits = model.logits(tokens)
    model.save(tmp_path / "model")
    assert (load(tmp_path / "model").logits(tokens) == logits).all()
    errors = [record["relative_error"] for record in model.records.values()]
    assert 0 < max(errors) < most


@pytest.mark.parametrize("size", [1e-30, 1e28])
def test_the_unit_of_weights_does_not_matter(size):
    weight = normal(64, 50)
    unit = np.exp2(np.rint(np.log2(size)))
    codes = [quantize((weight * f).astype(np.float32), "trellis2tensor").codes for f in (1, unit)]
    assert (codes[0] == codes[1]).all()


def test_half_bit_words_are_those_of_first_columns():
    codes, scale = np.zeros((64, 128), np.uint8), np.ones((64, 2), np.float32)
    codes[3, 7] = 1
    with pytest.raises(ValueError, match="code of row 3, column 7 is 1, expected at most 0"):
        QuantizedTensor.pack("trellis1.5g64", codes, scale, shape=(64, 128))
    with pytest.raises(ValueError, match="needs groups of multiples of 64 columns, found 32"):
        Format.parse("trellis1.5g32")


def test_what_needs_an_order_of_words_is_refused():
    weight = normal(4, 64)
    with pytest.raises(ValueError, match="range is 'minmax', but format trellis2 has none"):
        quantize(weight, "trellis2", range="minmax")
    with pytest.raises(ValueError, match="trellis2 has no neighbouring levels"):
        adaround(weight, np.eye(64), "trellis2")
