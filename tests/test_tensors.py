"""QuantizedTensor: parts in, parts out, products, files that lie."""

from __future__ import annotations

import json
import pickle

import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowbitq import FormatError, quantize
from lowbitq.formats import Format
from lowbitq.tensors import QuantizedTensor

FORMATS = [
    *("int1g32", "int2g16s4", "int2g64", "int3g64sym", "int3g128", "int4", "int4g64", "int4g32s8"),
    *("int4g64symz8", "int3g32symz2.25", "int4tensorsymz8", "int4g32s8z7"),
    *("int5g64", "int8tensor", "int8sym", "ternary", "ternaryg32", "binaryg64", "nf4g64"),
    *("log3g32", "log2s8", "kmeans1", "kmeans3g128", "kmeans4tensor"),
]
SIZES = [(1, 1), (17, 100), (64, 576)]


def random_tensor(text, rows, cols, seed=0):
    """A tensor and the parts it was packed from."""
    format = Format.parse(text)
    rng = np.random.default_rng([seed, rows, cols])
    shape = rows, format.groups(cols)
    codes = rng.integers(0, format.level_count, (rows, cols)).astype(np.uint8)
    unit, zero = np.float32(0.0123), np.float32(format.zero_level)
    if format.scale_bits == 16:
        scale = rng.uniform(0.01, 1, shape).astype(np.float16).astype(np.float32)
    elif format.scale_bits == 0:
        scale = np.full((rows, 1), unit)
    else:
        scale = unit * rng.integers(0, 1 << format.scale_bits, shape).astype(np.float32)
    stored = not format.symmetric and not format.per_tensor
    offset = rng.normal(size=shape).astype(np.float16).astype(np.float32) if stored else None
    table = format.kind in ("nf", "log", "kmeans")
    levels = np.sort(rng.normal(size=1 << format.bits)).astype(np.float32) if table else None
    tensor = QuantizedTensor.pack(
        format,
        codes,
        None if format.per_tensor else scale,
        offset,
        levels=levels,
        unit=unit,
    )
    return tensor, (codes, scale, -zero * scale if offset is None else offset, levels)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_parts_come_back(text, rows, cols):
    tensor, (codes, scale, offset, levels) = random_tensor(text, rows, cols)
    assert tensor.shape == (rows, cols)
    assert (tensor.codes == codes).all()
    assert (tensor.scale == scale).all()
    assert (tensor.offset == offset).all()
    exact = oracle.decode(codes, scale, offset, tensor.format.group or cols, levels)
    error = abs(tensor.dequantize() - exact)
    assert (error <= oracle.U * 1.01 * abs(exact)).all()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_product_agrees_with_dequantized_matrix(isa, text, rows, cols):
    tensor, _ = random_tensor(text, rows, cols)
    x = np.random.default_rng(1).normal(size=(cols, 3)).astype(np.float32)
    y, bound = oracle.float_linear(tensor.dequantize(), x.T, None)
    assert (abs(tensor @ x - y.T) <= bound.T).all()
    assert (abs(tensor @ x[:, 0] - y[0]) <= bound[0]).all()


@pytest.mark.parametrize("text", FORMATS)
def test_everything_stored_counts(text):
    for rows, cols in SIZES:
        tensor, _ = random_tensor(text, rows, cols)
        arrays, _ = tensor.to_arrays()
        shared = tensor.nbytes - arrays["panels"].nbytes
        learned = arrays["levels"].nbytes if tensor.format.kind == "kmeans" else 0
        assert learned <= shared <= learned + 8
        assert tensor.bits_per_weight == 8 * tensor.nbytes / (rows * cols)


def test_bits_per_weight_of_familiar_formats():
    for text, bits in [
        ("int4g64", 4.5),
        ("int4g64sym", 4.25),
        ("int3g64", 3.5),
        ("int2g128", 2.25),
    ]:
        assert random_tensor(text, 64, 256)[0].bits_per_weight == bits


@pytest.mark.parametrize("text", FORMATS)
def test_files_give_the_tensor_back(text):
    tensor, _ = random_tensor(text, 17, 100)
    arrays, metadata = tensor.to_arrays()
    again = QuantizedTensor.from_arrays(arrays, json.loads(json.dumps(metadata)))
    assert again.format == tensor.format
    assert (again.unit, again.zero) == (tensor.unit, tensor.zero)
    assert again.panels is tensor.panels
    assert (again.dequantize() == tensor.dequantize()).all()


def test_a_zero_beside_the_format_moves_into_it():
    """Saved and pickled tensors had the zero of a symmetric format in a field of its own."""
    tensor, _ = random_tensor("int4g64symz8", 17, 100)
    arrays, metadata = tensor.to_arrays()
    assert (metadata["format"], metadata["zero"]) == ("int4g64symz8", 8.0)
    earlier = QuantizedTensor.from_arrays(arrays, {**metadata, "format": "int4g64sym"})
    assert earlier.format == tensor.format
    assert (earlier.dequantize() == tensor.dequantize()).all()
    again = pickle.loads(pickle.dumps(tensor))
    assert (again.format, again.zero) == (tensor.format, 8.0)
    for changes in [
        {"zero": 7.5},
        {"format": "int4g64sym", "zero": -1.0},
        {"format": "int4g64sym", "zero": 16.0},
        {"format": "int4g64sym", "zero": float("nan")},
    ]:
        with pytest.raises(FormatError, match="damaged packed matrix: zero is"):
            QuantizedTensor.from_arrays(arrays, {**metadata, **changes})
    for text in ["int4g64", "ternaryg64", "nf4g64"]:
        arrays, metadata = random_tensor(text, 17, 100)[0].to_arrays()
        with pytest.raises(FormatError, match="does not let it be chosen"):
            QuantizedTensor.from_arrays(arrays, {**metadata, "zero": 2.0})


def test_panels_lie_at_a_cache_line():
    assert random_tensor("int3g64", 17, 100)[0].panels.ctypes.data % 64 == 0


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text("int48gsymx", max_size=8),
    st.sampled_from([*FORMATS, 0, -1, 2**31, 2**63, 16, 64, 1e300]),
)


@given(st.dictionaries(st.sampled_from(["format", "rows", "cols", "gamma", "zero", "x"]), JUNK))
@example({"gamma": 3.4028235677973366e38})  # the first number that is no float32
def test_damaged_metadata_is_a_format_error(changes):
    arrays, metadata = random_tensor("kmeans2g32", 5, 40)[0].to_arrays()
    try:
        tensor = QuantizedTensor.from_arrays(arrays, {**metadata, **changes})
    except FormatError:
        return
    assert len(tensor.panels) >= tensor.nbytes - 24
    tensor.dequantize()


def test_damaged_arrays_are_a_format_error():
    arrays, metadata = random_tensor("kmeans2g32", 5, 40)[0].to_arrays()
    panels, levels = arrays["panels"], arrays["levels"]
    for bad in [
        {},
        {"panels": panels},
        {"levels": levels},
        {"panels": panels[:-1], "levels": levels},
        {"panels": np.append(panels, panels), "levels": levels},
        {"panels": panels.view(np.int8), "levels": levels},
        {"panels": panels[None], "levels": levels},
        {"panels": panels[::-1], "levels": levels},
        {"panels": panels, "levels": levels[:3]},
        {"panels": panels, "levels": levels.astype(np.float64)},
        {"panels": panels, "levels": levels * np.float32(np.nan)},
        {"panels": panels, "levels": levels, "extra": levels},
    ]:
        with pytest.raises(FormatError):
            QuantizedTensor.from_arrays(bad, metadata)
    for key in metadata:
        with pytest.raises(FormatError):
            QuantizedTensor.from_arrays(arrays, {k: v for k, v in metadata.items() if k != key})


def test_what_does_not_fit_is_named():
    codes, scale = np.zeros((3, 40), np.uint8), np.ones((3, 2), np.float32)
    pack = QuantizedTensor.pack
    with pytest.raises(ValueError, match="codes has 1 axes, expected 2"):
        pack("int4g32", codes[0], scale, scale)
    with pytest.raises(ValueError, match="format int4g32 expects offset to be an array"):
        pack("int4g32", codes, scale)
    with pytest.raises(ValueError, match="format int4g32sym expects offset to be None"):
        pack("int4g32sym", codes, scale, scale)
    with pytest.raises(ValueError, match="format int4tensor expects scale to be None"):
        pack("int4tensor", codes, scale)
    with pytest.raises(ValueError, match="format int4g32sym expects scale to be an array"):
        pack("int4g32sym", codes)
    with pytest.raises(ValueError, match="levels is None, expected a table with format nf4g32"):
        pack("nf4g32", codes, scale)
    with pytest.raises(ValueError, match="levels is given, expected none with format int4g32sym"):
        pack("int4g32sym", codes, scale, levels=np.zeros(16, np.float32))
    with pytest.raises(TypeError, match="codes has dtype"):
        pack("int4g32sym", codes.astype(np.int64), scale)
    with pytest.raises(ValueError, match="unit"):
        pack("int4tensor", codes, unit=np.nan)
    tensor = pack("int4g32sym", codes, scale)
    with pytest.raises(TypeError, match="x has dtype <U1, expected real numbers"):
        tensor @ np.full(40, "x")
    with pytest.raises(ValueError, match=r"x has shape \(39,\), expected \(40,\) or \(40, t\)"):
        tensor @ np.zeros(39, np.float32)


def test_numpy_sees_the_decoded_matrix():
    weight = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    tensor = quantize(weight, "int4g32")
    matrix = tensor.dequantize()
    x = np.random.default_rng(1).standard_normal((3, 64), np.float32)
    assert np.array_equal(np.asarray(tensor), matrix)
    assert np.asarray(tensor, np.float64).dtype == np.float64
    assert np.array_equal(x @ tensor.T, x @ matrix.T)
    assert np.array_equal(weight - tensor, weight - matrix)
    assert np.array_equal(np.linalg.norm(tensor), np.linalg.norm(matrix))
    assert len(tensor) == 6
    assert np.array_equal(tensor[2], matrix[2])
    assert np.array_equal(tensor[1:5:2], matrix[1:5:2])
    assert np.array_equal(tensor[[5, 0]], matrix[[5, 0]])
    assert tensor[2, 3] == matrix[2, 3]
    assert [row.tolist() for row in tensor] == matrix.tolist()
    with pytest.raises(IndexError):
        tensor[6]
    with pytest.raises(ValueError, match="copy is False"):
        np.asarray(tensor, copy=False)


def test_tensors_are_equal_if_format_codes_and_scales_are():
    weight = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    for format in ("int4g32", "kmeans2g32", "int4g32s4", "int4tensor"):
        tensor, same = quantize(weight, format), quantize(weight.copy(), format)
        assert tensor == same
        assert hash(tensor) == hash(same)
        other = weight.copy()
        other[3, 5] += 1
        assert tensor != quantize(other, format)
    assert quantize(weight, "int4g32") != quantize(weight, "int4g64")
    assert (quantize(weight, "int4") == "int4") is False
