"""Gradients in C against central differences of float64 formulas."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from networks import NORMS, decoder_of, network_of, tokens_of

from lowbitq import _core
from lowbitq.models.slots import SLOTS
from lowbitq.rotations import Rotation


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def slope(function, at, direction, step=1e-5):
    """Derivative of a float64 function along a direction, to step^4."""
    at, direction = at.astype(float), direction.astype(float)
    far, near = (
        (function(at + h * direction) - function(at - h * direction)) / (2 * h)
        for h in (step, step / 2)
    )
    return (4 * near - far) / 3


def agrees(found, function, at, seed=0, tolerance=1e-3):
    """The gradient along itself and along random directions."""
    rng = np.random.default_rng(seed)
    size = np.sqrt((found.astype(float) ** 2).sum())
    assert size > 0
    for direction in (found / size, rng.standard_normal(at.shape) / np.sqrt(at.size)):
        expected = slope(function, at, direction)
        assert abs((found * direction).sum(dtype=float) - expected) <= tolerance * size


@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (33, 24), (40, 576)])
def test_norm(isa, rows, cols):
    x, g, gain = normal(rows, cols), normal(rows, cols, seed=1), 1 + normal(cols) / 5
    for chosen in (gain, None):
        before = normal(rows, cols, seed=2)
        dx, dgain = before.copy(), np.zeros(cols, np.float32)
        _core.rmsnorm_backward(x, chosen, g, dgain, dx, epsilon=1e-5)

        def value(x, gain, g=g):
            return (oracle.rmsnorm(x, gain, 1e-5)[0] * g).sum()

        agrees(dx - before, lambda x, c=chosen: value(x, c), x)
        if chosen is not None:
            agrees(dgain, lambda gain: value(x, gain), gain)


def test_norm_of_huge_and_tiny_rows():
    x, g = normal(3, 64), normal(3, 64, seed=1)
    sizes = np.array([[1], [2.0**80], [2.0**-80]], np.float32)
    dx = np.zeros_like(x)
    same = np.repeat(x[:1], 3, axis=0)
    _core.rmsnorm_backward(same * sizes, None, np.repeat(g[:1], 3, axis=0), None, dx, epsilon=0.0)
    assert np.allclose(dx * sizes, dx[:1], rtol=1e-5)


def test_swiglu():
    gate, up, g = (normal(7, 100, seed=s) for s in range(3))
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    _core.swiglu_backward(gate, up, g, dgate, dup)
    agrees(dgate, lambda gate: (oracle.swiglu(gate, up)[0] * g).sum(), gate)
    agrees(dup, lambda up: (oracle.swiglu(gate, up)[0] * g).sum(), up)
    again = gate.copy(), up.copy()
    _core.swiglu_backward(*again, g, *again)
    assert (again[0] == dgate).all()
    assert (again[1] == dup).all()


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "d"),
    [(1, 2, 1, 4), (37, 6, 2, 10), (300, 4, 4, 16), (600, 2, 1, 4)],
)
def test_attention(isa, tokens, heads, kv_heads, d):
    q, k, v, g = (
        normal(tokens, h, d, seed=s) for s, h in enumerate((heads, kv_heads, kv_heads, heads))
    )
    found = [np.full_like(a, np.nan) for a in (q, k, v)]
    _core.attention_backward(q, k, v, g, None, *found, weight=0.0)
    parts = [q, k, v]
    for i, gradient in enumerate(found):

        def value(changed, i=i):
            return (oracle.attention(*parts[:i], changed, *parts[i + 1 :])[0] * g).sum()

        if tokens > 1 or i == 2:
            agrees(gradient, value, parts[i])


def map_of(q, k):
    """The handle of a map, with log-sums of the oracle."""
    width = q.shape[2]
    wide = np.repeat(k[0].astype(float), q.shape[1] // k.shape[1], axis=0)
    first = np.einsum("thd,hd->ht", q.astype(float), wide) / np.sqrt(width)
    logs = oracle.attention_logs(q, k)[:, :, 0]
    return _core.attention_map(q, k, np.ascontiguousarray(((first - logs) / np.log(2)).T, "f4"))


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "d"), [(37, 6, 2, 10), (130, 4, 4, 16), (520, 2, 1, 4)]
)
def test_attention_with_a_target(isa, tokens, heads, kv_heads, d):
    q, k, v = (normal(tokens, h, d, seed=s) for s, h in enumerate((heads, kv_heads, kv_heads)))
    other = normal(tokens, heads, d + 2, seed=5), normal(tokens, heads, d + 2, seed=6)
    found = [np.full_like(a, np.nan) for a in (q, k, v)]
    _core.attention_backward(q, k, v, np.zeros_like(q), map_of(*other), *found, weight=0.7)

    def value(q, k):
        return 0.7 * oracle.attention_divergence(q, k, *other).sum()

    agrees(found[0], lambda changed: value(changed, k), q)
    agrees(found[1], lambda changed: value(q, changed), k)
    assert (found[2] == 0).all()


def test_the_pull_of_a_target_is_added():
    q, k, v, g = (normal(150, h, 10, seed=s) for s, h in enumerate((6, 2, 2, 6)))
    target = map_of(normal(150, 6, 10, seed=5), normal(150, 2, 10, seed=6))
    found = {}
    for name, arguments in {
        "both": (g, target),
        "output": (g, None),
        "pull": (np.zeros_like(g), target),
        "itself": (g, map_of(q, k)),
    }.items():
        found[name] = [np.empty_like(a) for a in (q, k, v)]
        _core.attention_backward(q, k, v, *arguments, *found[name], weight=0.7)
    for both, output, pull, itself in zip(*found.values(), strict=True):
        assert abs(output + pull - both).max() <= 1e-5 * abs(both).max()
        assert abs(output - itself).max() <= 1e-5 * abs(output).max()
    with pytest.raises(ValueError, match="the target has 149 tokens of 6 heads, expected 150 of 6"):
        _core.attention_backward(q, k, v, g, map_of(q[1:], k[1:]), *found["both"], weight=1.0)


@pytest.mark.parametrize("target", [False, True])
def test_bits_do_not_depend_on_threads(target):
    q, k, v, g = (normal(700, h, 16, seed=h) for h in (6, 2, 2, 6))
    v = normal(700, 2, 16, seed=9)
    other = map_of(normal(700, 6, 16, seed=3), normal(700, 2, 16, seed=4)) if target else None
    before = _core.config()["threads"]
    results = []
    try:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads=threads)
            found = [np.empty_like(a) for a in (q, k, v)]
            _core.attention_backward(q, k, v, g, other, *found, weight=0.3)
            results.append(found)
    finally:
        _core.set_num_threads(threads=before)
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(results[0], other, strict=True))


def dense_copy(weight, input, output, fusion):
    handles = (r if r is None else r.handle for r in (input, output))
    return _core.copy_dense(weight, *handles, fusion)


@pytest.mark.parametrize("plain", [True, False])
def test_linear(plain):
    rows, cols, tokens, rank = 12, 20, 9, 3
    R, P = Rotation(cols, seed=1), Rotation(rows, "orthogonal", seed=2)
    shapes = (
        [(None, None, None)]
        if plain
        else [(R, None, normal(rows)), (R, P, None), (None, P, 1 + normal(rows, seed=3))]
    )
    weights = [normal(rows, cols, seed=i) for i in range(len(shapes))]
    U, V = (None, None) if plain else (normal(rows, rank), normal(cols, rank))
    bias, x, g = normal(rows, seed=4), normal(tokens, cols, seed=5), normal(tokens, rows, seed=6)
    copies = tuple(dense_copy(w, *shape) for w, shape in zip(weights, shapes, strict=True))
    layer = _core.linear(copies, bias, U, V)
    dense, fusion = (
        [np.zeros_like(w) for w in weights],
        [None if s[2] is None else np.zeros_like(s[2]) for s in shapes],
    )
    db, dx = np.zeros_like(bias), np.full_like(x, np.nan)
    adapter = [None if a is None else np.zeros_like(a) for a in (U, V)]
    sinks = tuple(
        _core.copy_gradient(*pair, None, None) for pair in zip(dense, fusion, strict=True)
    )
    _core.linear_backward(layer, x, g, _core.linear_gradient(sinks, db, *adapter), dx)

    def output(parts):
        W, f, b, u, v, x = parts
        y = np.zeros((tokens, rows)) + b
        for w, weight, (r, p, _) in zip(W, f, shapes, strict=True):
            z = (x if r is None else x @ r.matrix().astype(float).T) @ w.T
            z = z if p is None else z @ p.matrix().astype(float)
            y += z if weight is None else z * weight
        return ((y if u is None else y + x @ v @ u.T) * g).sum()

    parts = [[w.astype(float) for w in weights], [s[2] for s in shapes], bias, U, V, x]
    for i, found in [(2, db), (3, adapter[0]), (4, adapter[1]), (5, dx)]:
        if found is not None:
            agrees(found, lambda a, i=i: output([*parts[:i], a, *parts[i + 1 :]]), parts[i])
    for i, kinds in [(0, dense), (1, fusion)]:
        for j, found in enumerate(kinds):
            if found is None:
                continue

            def changed(a, i=i, j=j):
                return output([*parts[:i], [*parts[i][:j], a, *parts[i][j + 1 :]], *parts[i + 1 :]])

            agrees(found, changed, np.asarray(parts[i][j], np.float32))


def test_a_packed_layer_has_no_gradients():
    from lowbitq.linears import QuantizedLinear
    from lowbitq.quantizers import quantize

    layer = QuantizedLinear.of(quantize(normal(16, 64), "int4g64"))
    sink = _core.linear_gradient((_core.copy_gradient(None, None, None, None),), None, None, None)
    with pytest.raises(ValueError, match="copy 0 is packed: gradients need dense weights"):
        _core.linear_backward(layer.handle, normal(2, 64), normal(2, 16), sink, normal(2, 64))


def test_gradients_of_another_shape_are_refused():
    layer = _core.linear((_core.copy_dense(normal(4, 6), None, None, None),), None, None, None)
    for dense, bias, message in [
        (normal(4, 5), None, r"gradients are \(4, 5\) .*the layer is \(4, 6\)"),
        (None, normal(5), r"gradients are \(5, 0\)"),
    ]:
        sink = _core.linear_gradient(
            (_core.copy_gradient(dense, None, None, None),), bias, None, None
        )
        with pytest.raises(ValueError, match=message):
            _core.linear_backward(layer, normal(2, 6), normal(2, 4), sink, normal(2, 6))
    with pytest.raises(ValueError, match="different numbers of rows"):
        _core.linear_gradient(
            (_core.copy_gradient(normal(4, 5), None, None, None),), normal(3), None, None
        )


# --- a whole network ------------------------------------------------------------------------------

NETWORKS = {
    "plain": {},
    "qwen2": {"biases": True, "head": True},
    "qwen3": {"head_norms": True, "head": True},
    "fused": {"norms": False, "biases": True},
    "smollm3": {"without_rope": [1]},
    "norms without rope": {"without_rope": [0], "head_norms": True},
}


def loss_of(network, tokens):
    logits = oracle.decoder(network, tokens)[:-1]
    return oracle.cross_entropy(logits, tokens[1:])[0].sum()


@pytest.mark.parametrize("known", [0, 3, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(isa, name, known):
    network, tokens = network_of(3, **NETWORKS[name]), tokens_of(21)
    network["blocks"][0] |= {"attention_scale": 0.5, "mlp_scale": 2.0}
    found = network_gradients(decoder_of(network), network, tokens, known)
    for index, key, gradient in found:
        place = network if index is None else network["blocks"][index]
        at = place[key][0] if isinstance(place[key], tuple) else place[key]

        def value(changed, place=place, key=key):
            before = place[key]
            place[key] = (changed, before[1]) if isinstance(before, tuple) else changed
            try:
                return loss_of(network, tokens)
            finally:
                place[key] = before

        agrees(gradient, value, at)
    for index, key, gradient in found.biases:
        place = network["blocks"][index]

        def of_bias(changed, place=place, key=key):
            before = place[key]
            place[key] = before[0], changed
            try:
                return loss_of(network, tokens)
            finally:
                place[key] = before

        agrees(gradient, of_bias, place[key][1])


def test_a_bias_of_keys_that_are_not_turned_has_no_gradient(isa):
    """It adds the same to all scores of a query."""
    network, tokens = network_of(5, biases=True, blocks=1, without_rope=[0]), tokens_of(21)
    found = network_gradients(decoder_of(network), network, tokens, 0)
    size = {key: abs(gradient).max() for _, key, gradient in found.biases}
    assert size["k_proj"] < 1e-5 * size["q_proj"]


@pytest.mark.parametrize("name", NETWORKS)
def test_block_with_a_target(name):
    network, x = network_of(4, blocks=1, **NETWORKS[name]), normal(21, 24)
    [block] = network["blocks"]
    other = normal(21, network["heads"], 10, seed=5), normal(21, network["kv_heads"], 10, seed=6)
    norms = [None if block[n] is None else np.zeros_like(block[n]) for n in NORMS]
    sinks, found = [], dict(zip(NORMS, norms, strict=True))
    for slot in SLOTS:
        weight = np.zeros_like(block[slot.name][0])
        copy = _core.copy_gradient(weight, None, None, None)
        sinks.append(_core.linear_gradient((copy,), None, None, None))
        found[slot.name] = weight
    dx, nothing = np.zeros_like(x), [None] * 8
    gradient = _core.block_gradient(*norms, *sinks)
    arrays = [x, *nothing, gradient, *nothing[:7], map_of(*other), dx]
    _core.block_backward(decoder_of(network), *arrays, block=0, weight=0.7)

    def value(x, **changed):
        q, k, _ = oracle.projections(network, block | changed, x)
        return 0.7 * oracle.attention_divergence(q, k, *other).sum()

    agrees(dx, value, x)
    for key in ("q_proj", "k_proj"):
        bias = block[key][1]
        agrees(found[key], lambda w, n=key, b=bias: value(x, **{n: (w, b)}), block[key][0])
    for key in ("attention_norm", "query_norm", "key_norm"):
        if found[key] is not None:
            agrees(found[key], lambda gain, n=key: value(x, **{n: gain}), block[key])
    assert not any(found[key].any() for key in ("v_proj", "o_proj", "up_proj", "down_proj"))


class Found(list):
    biases: list


def network_gradients(decoder, network, tokens, known):
    """Gradients by name, through the pieces that lowbitq.gradients joins."""
    hidden = network["embedding"].shape[1]
    x = np.empty((len(tokens), hidden), np.float32)
    _core.decoder_embed(decoder, tokens, x)
    width = network["heads"] * 2 * len(network["frequency"])
    inputs, traces = [], []
    for index in range(len(network["blocks"])):
        block = network["blocks"][index]
        widths = [width, network["heads"], hidden]
        widths += [block[slot.name][0].shape[0] for slot in SLOTS if slot.tap in ("qkv", "mlp")]
        trace = [np.empty((len(tokens), w), np.float32) for w in widths]
        inputs.append(x.copy())
        seen = [None, trace[0], None, None, *trace[1:]]
        _core.decoder_block(decoder, x, *seen, block=index, steps=63)
        traces.append([*trace[:known], *[None] * (len(trace) - known)])
    y, dx, dy = (np.empty_like(x) for _ in range(3))
    _core.decoder_finish(decoder, x, y)
    result = Found()
    result.biases = []
    head = np.zeros_like(network["embedding"])
    final_norm = np.zeros(hidden, np.float32)
    target = np.append(tokens[1:], np.int32(-1)).astype(np.int32)
    sink = _core.linear_gradient((_core.copy_gradient(head, None, None, None),), None, None, None)
    losses = np.empty(len(tokens))
    weights = {
        "forward": 0.0,
        "reverse": 0.0,
        "jensen_shannon": 0.0,
        "cross_entropy": 1.0,
        "temperature": 1.0,
    }
    _core.head_backward(decoder, y, None, None, target, None, None, sink, losses, dy, **weights)
    assert abs(losses.sum() - loss_of(network, tokens)) < 1e-4 * losses.sum()
    _core.finish_backward(decoder, x, dy, final_norm, dx)
    result.append((None, "final_norm", final_norm))
    for index in reversed(range(len(network["blocks"]))):
        block = network["blocks"][index]
        norms = [None if block[n] is None else np.zeros_like(block[n]) for n in NORMS]
        sinks = []
        for slot in SLOTS:
            weight, bias = (None if a is None else np.zeros_like(a) for a in block[slot.name])
            result.append((index, slot.name, weight))
            if bias is not None:
                result.biases.append((index, slot.name, bias))
            copy = _core.copy_gradient(weight, None, None, None)
            sinks.append(_core.linear_gradient((copy,), bias, None, None))
        gradient = _core.block_gradient(*norms, *sinks)
        nothing = [None] * len(SLOTS)
        _core.block_backward(
            decoder,
            inputs[index],
            *traces[index],
            gradient,
            *nothing,
            None,
            dx,
            block=index,
            weight=0.0,
        )
        result += [(index, n, g) for n, g in zip(NORMS, norms, strict=True) if g is not None]
    if network["head"] is None:
        _core.embed_backward(decoder, tokens, dx, head)
        result.append((None, "embedding", head))
    else:
        table = np.zeros_like(head)
        _core.embed_backward(decoder, tokens, dx, table)
        result += [(None, "head", head), (None, "embedding", table)]
    return result
