"""Layers of several copies: rotations, weights, activations, adapters, and what they share."""

from __future__ import annotations

import numpy as np
import pytest
from packed_parts import code_of, dense_layer, description, pack, packed_copy, random_parts

from lowbitq import _core
from lowbitq.rotations import Rotation

ROWS, COLS, GROUP = 50, 200, 64
EPSILON = np.finfo(np.float32).eps


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


class Copy:
    """A copy with random parts, and its matrix and activations in float64."""

    def __init__(
        self, seed, *, rows=ROWS, code_bits=2, input=None, output=None, weighted=False, **how
    ):
        self.spec = description(rows, COLS, code_bits, GROUP, 16, True)
        codes, scale, offset = random_parts(self.spec, seed)
        offset -= scale * np.float32((1 << code_bits) / 2)
        offset = offset.astype(np.float16).astype(np.float32)
        panels = pack(self.spec, codes, scale, offset)
        self.matrix = np.empty((rows, COLS), np.float32)
        _core.packed_dequantize(code_of(self.spec), panels, self.matrix, group=GROUP)
        self.input, self.output, self.how = input, output, how
        self.weight = normal(rows, seed=seed) if weighted else None
        if "zero" in how:
            how = {**how, "sums": self.matrix.sum(1, dtype=np.float64).astype(np.float32)}
        handles = {
            name: rotation and rotation.handle
            for name, rotation in (("input", input), ("output", output))
        }
        self.handle = packed_copy(panels, self.spec, weight=self.weight, **handles, **how)

    def rounded(self, x):
        """What the matrix is multiplied by, from the formula in linear.h, and the zero."""
        x = x if self.input is None else self.input.apply(x)
        bits = self.how.get("bits", 8)
        if not bits:
            return x.astype(np.float64), 0.0
        limit, x = (1 << (bits - 1)) - 1, x.astype(np.float64)
        zero = 0.0
        if "zero" in self.how:
            zero = self.how["zero"]
            zero = (x.max(1) + x.min(1))[:, None] / 2 if zero is None else zero
        result = np.empty_like(x)
        for begin in range(0, COLS, GROUP):
            part = (x - zero)[:, begin : begin + GROUP]
            scale = self.how.get("clip", 1.0) * abs(part).max(1, keepdims=True) / limit
            scale = self.how.get("scale", 0.0) or scale
            result[:, begin : begin + GROUP] = np.clip(np.rint(part / scale), -limit, limit) * scale
        return result + zero, zero

    def forward(self, x):
        """The result in float64, and the sum of all magnitudes added."""
        rounded, zero = self.rounded(x)
        y = rounded @ self.matrix.T
        size = (abs(rounded - zero) + abs(zero)) @ abs(self.matrix).T
        if self.output is not None:
            back = self.output.apply(np.eye(len(self.matrix), dtype=np.float32)).astype(np.float64)
            y, size = y @ back.T, size @ abs(back).T
        weight = 1 if self.weight is None else self.weight.astype(np.float64)
        return weight * y, abs(weight) * size


def layer_of(copies, bias=None, U=None, V=None):
    return _core.linear(tuple(copy.handle for copy in copies), bias, U, V)


def forward(handle, x, rows=ROWS):
    y = np.full((len(x) + 2, rows), np.nan, np.float32)
    _core.linear_forward(handle, x, y[1:-1])
    assert np.isnan(y[[0, -1]]).all(), "wrote outside y"
    return y[1:-1]


def check(copies, x, bias=None, U=None, V=None):
    """The sum, within the rounding errors of a row's additions."""
    y = forward(layer_of(copies, bias, U, V), x)
    parts = [copy.forward(x) for copy in copies]
    expected, size = sum(p[0] for p in parts), sum(p[1] for p in parts)
    if U is not None:
        expected = expected + x.astype(np.float64) @ V @ U.T
        size = size + abs(x) @ abs(V) @ abs(U).T
    if bias is not None:
        expected, size = expected + bias, size + abs(bias)
    assert (abs(y - expected) <= 4 * COLS * EPSILON * size + 1e-30).all()
    return y


TURN, OTHER = Rotation(COLS, seed=1), Rotation(COLS, "orthogonal", seed=2)
BACK = Rotation(ROWS, seed=3)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(
    "kinds",
    [
        [{}, {}],
        [{"weighted": True}, {"weighted": True, "code_bits": 3}],
        [{"input": TURN}, {"input": OTHER, "weighted": True}, {"input": TURN}],
        [{"output": BACK}],
        [{"output": BACK, "weighted": True}, {"input": TURN}, {"output": BACK}],
        [{"code_bits": bits} for bits in (4, 1, 8, 3, 2)],
    ],
)
def test_copies_are_summed(isa, kinds, tokens):
    copies = [Copy(seed, **kind) for seed, kind in enumerate(kinds)]
    x, bias = normal(tokens, COLS), normal(ROWS)
    check(copies, x)
    check(copies, x, bias)


@pytest.mark.parametrize("tokens", [1, 9])
def test_float_copies_join_in(isa, tokens):
    """Dense and decoded ones next to quantized ones, with and without weights."""
    dense = normal(ROWS, COLS, seed=7)
    x, bias, weight = normal(tokens, COLS), normal(ROWS), normal(ROWS, seed=9)
    copies = [Copy(0), Copy(1, input=TURN, weighted=True)]
    handles = (
        copies[0].handle,
        _core.copy_dense(dense, OTHER.handle, None, weight),
        copies[1].handle,
        _core.copy_dense(dense, None, BACK.handle, None),
    )
    y = forward(_core.linear(handles, bias, None, None), x)
    turned = OTHER.apply(x).astype(np.float64) @ dense.T * weight
    back = BACK.apply(np.eye(ROWS, dtype=np.float32)).astype(np.float64)
    expected = copies[0].forward(x)[0] + copies[1].forward(x)[0] + turned + bias
    expected += x.astype(np.float64) @ dense.T @ back.T
    assert abs(y - expected).max() <= 1e-5 * abs(expected).max()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_float_copies_in_rotations_are_the_layer(count):
    weight, x = normal(ROWS, COLS), normal(9, COLS, seed=1)
    share, handles = np.full(ROWS, 1 / count, np.float32), []
    for seed in range(count):
        turn = Rotation(COLS, "orthogonal" if seed % 2 else "hadamard", seed)
        handles.append(_core.copy_dense(turn.apply(weight), turn.handle, None, share))
    y = forward(_core.linear(tuple(handles), None, None, None), x)
    expected = x.astype(np.float64) @ weight.T
    assert abs(y - expected).max() <= 1e-5 * abs(expected).max()


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_adapter_is_added(isa, tokens):
    U, V = normal(ROWS, 3), normal(COLS, 3)
    x, bias = normal(tokens, COLS), normal(ROWS)
    check([Copy(0)], x, None, U, V)
    check([Copy(0, input=TURN), Copy(1, output=BACK)], x, bias, U, V)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("how", [
    {"clip": 0.7}, {"clip": 0.9, "bits": 4}, {"scale": 0.02}, {"zero": 0.5}, {"zero": None},
    {"zero": None, "clip": 0.8}, {"scale": 0.125, "zero": -0.25},
])  # fmt: skip
def test_activations_are_clipped_shifted_and_scaled(isa, how, tokens):
    x = normal(tokens, COLS) + np.float32(0.5)
    check([Copy(0, input=TURN, **how)], x)
    check([Copy(0, input=TURN, weighted=True, **how), Copy(1)], x, normal(ROWS))


@pytest.mark.parametrize("tokens", [1, 4, 19])
def test_layers_of_several_copies_share_their_activations(isa, threads, tokens):
    """Layers give the same bits together as alone, regardless of what they share."""
    again = Rotation(COLS, seed=1)  # TURN by value
    layers = [
        [Copy(0), Copy(1, input=TURN)],
        [Copy(2, input=again, rows=17), Copy(3, rows=17), Copy(4, rows=17, weighted=True)],
        [Copy(5), Copy(6), Copy(7, input=again, output=BACK), Copy(8, input=TURN)],
        [Copy(9, clip=0.5), Copy(10, code_bits=8), Copy(11, input=TURN)],
    ]
    rows = [ROWS, 17, ROWS, ROWS]
    handles = [layer_of(copies, normal(r)) for copies, r in zip(layers, rows, strict=True)]
    x = normal(tokens, COLS)
    alone = [forward(handle, x, r) for handle, r in zip(handles, rows, strict=True)]
    for count in (1, 2):
        _core.set_num_threads(threads=count)
        y = np.full(tokens * sum(rows), np.nan, np.float32)
        _core.linears_forward(tuple(handles), x, y)
        assert np.array_equal(y, np.concatenate([one.ravel() for one in alone]))


def test_equal_rotations_are_told_by_value():
    """As after load, where no two layers share an object."""
    turns = [Rotation(COLS, seed=1) for _ in range(3)]
    layers = [layer_of([Copy(2 * i), Copy(2 * i + 1, input=turns[i])]) for i in range(3)]
    assert _core.linears_inputs(tuple(layers)) == 2
    matrices = [OTHER.apply(np.eye(COLS, dtype=np.float32)) for _ in range(2)]
    dense = [_core.dense_rotation(matrix) for matrix in matrices]
    copies = [_core.copy_dense(np.ones((3, COLS), np.float32), r, None, None) for r in dense]
    layers = [_core.linear((copy,), None, None, None) for copy in copies]
    assert _core.linears_inputs(tuple(layers)) == 1
    for other in (Rotation(COLS, seed=2), OTHER, None):
        pair = [layer_of([Copy(0, input=TURN)]), layer_of([Copy(1, input=other)])]
        assert _core.linears_inputs(tuple(pair)) == 2
    for how in ({"bits": 4}, {"clip": 0.5}, {"scale": 0.1}, {"zero": None}):
        pair = [layer_of([Copy(0)]), layer_of([Copy(0, **how)])]
        assert _core.linears_inputs(tuple(pair)) == 2
        assert _core.linears_inputs((pair[1], layer_of([Copy(1, **how)]))) == 1


def test_an_embedding_may_have_copies_and_an_adapter():
    copies = [Copy(0), Copy(1, input=TURN, weighted=True)]
    U, V = normal(ROWS, 3), normal(COLS, 3)
    embedding = layer_of(copies, None, U, V)
    decoder = decoder_of(embedding)
    x = np.empty((3, COLS), np.float32)
    tokens = np.array([7, 0, 49], np.int32)
    _core.decoder_embed(decoder, tokens, x)
    turn = TURN.apply(np.eye(COLS, dtype=np.float32)).T.astype(np.float64)
    expected = copies[0].matrix + copies[1].weight[:, None] * (copies[1].matrix @ turn) + U @ V.T
    assert abs(x - expected[tokens]).max() <= 1e-5 * abs(expected).max()


def decoder_of(embedding):
    return _core.decoder(
        embedding, np.ones(COLS, np.float32), np.ones(4), None, None, (),
        heads=1, kv_heads=1, epsilon=1e-5, rope_factor=1.0,
    )  # fmt: skip


def test_what_does_not_fit_is_refused():
    copy, small = Copy(0), Copy(1, rows=17)
    with pytest.raises(ValueError, match="a layer has no copies, expected at least one"):
        _core.linear((), None, None, None)
    with pytest.raises(ValueError, match=r"copy 1 is \(17, 200\), the first is \(50, 200\)"):
        layer_of([copy, small])
    with pytest.raises(ValueError, match="only one of U and V is given"):
        layer_of([copy], None, normal(ROWS, 3), None)
    with pytest.raises(ValueError, match="axis 0 of V has size 50, expected cols = 200"):
        layer_of([copy], None, normal(ROWS, 3), normal(ROWS, 3))
    with pytest.raises(ValueError, match="output rotation has order 200, but the layer has 50 row"):
        Copy(0, output=TURN)
    with pytest.raises(ValueError, match="sums are given, but float32 activations have no zero"):
        Copy(0, bits=0, zero=0.5)
    with pytest.raises(ValueError, match=r"scale is 9\.99995e-41, expected 0"):
        Copy(0, scale=1e-40)
    with pytest.raises(ValueError, match="copy 0 of the embedding has an output rotation"):
        decoder_of(layer_of([Copy(0, output=BACK)]))
    with pytest.raises(ValueError, match="9 layers, expected at most 8"):
        _core.linears_inputs((layer_of([copy]),) * 9)


def test_a_layer_keeps_its_copies_alive():
    layer = _core.linear((_core.copy_dense(normal(3, COLS), None, None, None),), None, None, None)
    x = normal(2, COLS)
    assert np.array_equal(
        forward(layer, x, 3), forward(dense_layer(normal(3, COLS), None, None), x, 3)
    )
