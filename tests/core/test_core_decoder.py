"""The decoder against a float64 network, and what it refuses."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
from networks import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    NORMS,
    VOCAB,
    block_handle,
    decoder_of,
    dense,
    network_of,
    tokens_of,
)
from packed_parts import code_of, dense_layer, description, pack, packed_layer, random_parts

from lowbitq import _core
from lowbitq.rotations import Rotation

LIMIT = 1e-4  # of the largest logit of a row; what the library promises


def forward(decoder, tokens, rows=None, cache=None, past=0):
    logits = np.full(((rows or len(tokens)) + 2, VOCAB), np.nan, np.float32)
    _core.decoder_forward(decoder, tokens, cache, None, logits[1:-1], None, past=past)
    assert np.isnan(logits[[0, -1]]).all(), "wrote outside logits"
    return logits[1:-1]


def cache_of(decoder, capacity=128, bits=32):
    return _core.cache(decoder, capacity=capacity, bits=bits)[0]


def close(found, expected):
    return (abs(found - expected).max(-1) <= LIMIT * abs(expected).max(-1)).all()


def test_halves_of_a_block_are_added_by_their_scales(isa):
    """The first block runs twice, with its halves scaled by 0.5 and -2."""
    network = network_of(30, blocks=2)
    network["blocks"][0] |= {"attention_scale": 0.5, "mlp_scale": -2.0}
    network["blocks"] = [network["blocks"][0], *network["blocks"]]
    logits = forward(decoder_of(network), tokens_of(30))
    assert close(logits, oracle.decoder(network, tokens_of(30)))


@pytest.mark.parametrize("tokens", [1, 2, 65])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"biases": True, "head": True},
        {"head_norms": True, "blocks": 3},
        {"norms": False},
        {"without_rope": [0], "biases": True},
        {"without_rope": [0, 2], "head_norms": True, "blocks": 3},
    ],
)
def test_decoder_matches_oracle(isa, tokens, options):
    network = network_of(tokens, **options)
    logits = forward(decoder_of(network), tokens_of(tokens))
    assert close(logits, oracle.decoder(network, tokens_of(tokens)))


def test_the_last_rows_are_the_same_rows():
    decoder, tokens = decoder_of(network_of(0)), tokens_of(20)
    whole = forward(decoder, tokens)
    assert close(forward(decoder, tokens, rows=3), whole[-3:])
    hidden, logits = np.empty((3, HIDDEN), np.float32), np.empty((3, VOCAB), np.float32)
    _core.decoder_forward(decoder, tokens, None, hidden, None, None, past=0)
    _core.decoder_head(decoder, hidden, logits)
    assert close(logits, whole[-3:])


def continued(decoder, tokens, cache):
    """Logits of tokens 62 and later: a prompt, two tokens, and the others one by one."""
    found = [forward(decoder, tokens[:63], 1, cache)]
    found.append(forward(decoder, tokens[63:65], 2, cache, past=63))
    later = range(65, len(tokens))
    found += [forward(decoder, tokens[i : i + 1], 1, cache, past=i) for i in later]
    return np.concatenate(found)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    "options", [{"head_norms": True}, {"biases": True}, {"biases": True, "without_rope": [1]}]
)
def test_a_cache_of_garbage_stands_for_the_tokens_before(isa, bits, options):
    network = network_of(1, head=True, **options)
    network["embedding"][-1] = np.nan
    decoder, tokens = decoder_of(network), tokens_of(100) % (VOCAB - 1)
    cache = cache_of(decoder, bits=bits)
    assert np.isnan(forward(decoder, np.full(128, VOCAB - 1, np.int32), 1, cache)).all()
    found, expected = continued(decoder, tokens, cache), oracle.decoder(network, tokens)[62:]
    if bits == 32:
        assert close(found, expected)
    else:  # keys and values are off by at most half a step, 1 / 254 of the largest
        error = abs(found - expected).max(-1) / abs(expected).max(-1)
        assert LIMIT < error.max() < 1 / 127


def biased_network(pair, size, head_norms):
    """Keys and values with constants of `size`, read by small weights, so that scores and outputs
    are as large as without constants."""
    network = network_of(15, biases=True, head_norms=head_norms)
    for block in network["blocks"]:
        (query, query_bias), (output, _) = block["q_proj"], block["o_proj"]
        for channel in (pair, pair + HEAD_DIM // 2):
            query[channel::HEAD_DIM] /= size
            query_bias[channel::HEAD_DIM] /= size
            block["k_proj"][1][channel] = -size
        block["k_proj"][1][HEAD_DIM + pair] = size
        block["v_proj"][1][::HEAD_DIM] = size
        output[:, ::HEAD_DIM] /= size
    return network


@pytest.mark.parametrize("pair", [0, 1, 4])  # turns by 1, 0.25 and 0.004 radians per position
@pytest.mark.parametrize("size", [10, 1000])
def test_biases_of_keys_and_values_cost_8_bits_nothing(isa, pair, size):
    decoder = decoder_of(biased_network(pair, size, head_norms=False), rope_factor=1.3)
    tokens = tokens_of(150)
    exact, found = (continued(decoder, tokens, cache_of(decoder, 192, bits)) for bits in (32, 8))
    error = abs(found - exact).max(-1) / abs(exact).max(-1)
    assert LIMIT < error.max() < 1 / 127  # as without biases


def test_a_bias_before_a_norm_of_keys_is_no_constant(isa):
    decoder = decoder_of(biased_network(1, 3, head_norms=True))
    tokens = tokens_of(150)
    exact, found = (continued(decoder, tokens, cache_of(decoder, 192, bits)) for bits in (32, 8))
    error = abs(found - exact).max(-1) / abs(exact).max(-1)
    assert LIMIT < error.max() < 1 / 127


def test_a_cache_of_8_bits_takes_a_quarter():
    decoder = decoder_of(network_of(1))
    (_, large), (_, small) = (_core.cache(decoder, capacity=64, bits=bits) for bits in (32, 8))
    numbers = 2 * KV_HEADS * 64 * (HEAD_DIM + 16)  # blocks; values are padded to 16
    assert large == 4 * numbers
    assert small == numbers + 2 * KV_HEADS * 64 * 2 * 4  # a scale for each key and value


def test_a_residual_rotation_is_undone():
    """Rotated layers of a rotated stream: each is applied and undone in its place."""
    network, rotation = network_of(2, norms=False), Rotation(HIDDEN, seed=3)
    R = rotation.matrix().astype(np.float32)
    turned = network | {"blocks": []}
    for block in network["blocks"]:
        new = dict(block)
        for name in LAYERS:
            weight = block[name][0]
            reads = name not in ("o_proj", "down_proj")
            new[name] = (np.ascontiguousarray(weight @ R.T if reads else R @ weight), None)
        turned["blocks"].append(new)
    tokens = tokens_of(30)
    logits = forward(decoder_of(turned, rotation.handle), tokens)
    assert close(logits, oracle.decoder(network, tokens))


PACKED = [
    description(VOCAB, HIDDEN, 8, 16, has_offset=True),
    description(VOCAB, HIDDEN, 8, 16, zero=127.5),
    description(VOCAB, HIDDEN, 3, zero=3.5),
    description(VOCAB, HIDDEN, 4, 16, scale_bits=4, unit=0.03, zero=7.5),
    description(VOCAB, HIDDEN, 2, scale_bits=8, unit=0.03, zero=1.5),
    description(VOCAB, HIDDEN, 1, scale_bits=0, unit=0.5, zero=0.5),
]


def packed_embedding(spec, levels=None, activation_bits=0):
    """A layer and the weights it represents."""
    panels = pack(spec, *random_parts(spec))
    weight = np.empty((VOCAB, HIDDEN), np.float32)
    _core.packed_dequantize(code_of(spec, levels), panels, weight, group=spec["group"])
    layer = packed_layer(panels, levels, None, None, **spec, activation_bits=activation_bits)
    return layer, weight


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("spec", PACKED, ids=lambda spec: f"{spec['bits']}")
def test_rows_of_a_packed_embedding_are_those_of_its_matrix(spec, table):
    if spec["bits"] == 8 and table:
        pytest.skip("no table of 256 levels")
    levels = np.linspace(-1, 2, 1 << spec["bits"], dtype=np.float32) if table else None
    layer, weight = packed_embedding(spec, levels)
    tokens = np.array([0, 49, 15, 16, 17, 33, 0, 32], np.int32)
    x = np.full((len(tokens) + 2, HIDDEN), np.nan, np.float32)
    _core.decoder_embed(decoder_of(network_of(8), embedding=layer), tokens, x[1:-1])
    assert (x[1:-1] == weight[tokens]).all()
    assert np.isnan(x[[0, -1]]).all(), "wrote outside x"


def test_a_packed_embedding_is_the_head_too(isa):
    layer, weight = packed_embedding(PACKED[0])
    network = network_of(9) | {"embedding": weight}
    logits = forward(decoder_of(network, embedding=layer), tokens_of(30))
    assert close(logits, oracle.decoder(network, tokens_of(30)))


@pytest.mark.parametrize("residual", [False, True])
def test_rows_of_a_rotated_embedding_are_those_of_the_product(residual):
    """W R is the embedding where a layer W has the input rotation R."""
    network, rotation = network_of(11, blocks=0), Rotation(HIDDEN, seed=4)
    layer = dense_layer(rotation.apply(network["embedding"]), None, rotation.handle)
    stream = Rotation(HIDDEN, seed=5) if residual else None
    decoder = decoder_of(network, stream and stream.handle, embedding=layer)
    x = np.empty((30, HIDDEN), np.float32)
    _core.decoder_embed(decoder, tokens_of(30), x)
    expected = network["embedding"][tokens_of(30)]
    assert close(x, stream.apply(expected) if residual else expected)
    assert close(forward(decoder, tokens_of(30)), oracle.decoder(network, tokens_of(30)))


@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_a_packed_head_quantizes_its_input_as_any_layer(isa, tokens):
    layer, _ = packed_embedding(PACKED[0], activation_bits=8)
    decoder = decoder_of(network_of(10), embedding=layer)
    y = np.random.default_rng(tokens).standard_normal((tokens, HIDDEN), dtype=np.float32)
    logits, expected = np.full((2, tokens, VOCAB), np.nan, np.float32)
    _core.decoder_head(decoder, y, logits)
    _core.linear_forward(layer, y, expected)
    assert (logits == expected).all()


def quantized_decoder(**options):
    """Two blocks of 2-bit layers that quantize their inputs."""
    network = network_of(12, **options)
    blocks = []
    for i, block in enumerate(network["blocks"]):
        layers = []
        for j, name in enumerate(LAYERS):
            spec = description(*block[name][0].shape, 2, has_offset=True)
            panels = pack(spec, *random_parts(spec, seed=7 * i + j))
            bias = block[name][1]
            layers.append(packed_layer(panels, None, bias, None, **spec, activation_bits=8))
        gains = (block[name] for name in NORMS)
        blocks.append(_core.block(*gains, *layers, attention_scale=1.0, mlp_scale=1.0, rope=True))
    return _core.decoder(
        dense(network["embedding"]),
        network["final_norm"],
        network["frequency"],
        None,
        None,
        tuple(blocks),
        heads=HEADS,
        kv_heads=KV_HEADS,
        epsilon=1e-5,
        rope_factor=1.0,
    )


@pytest.mark.parametrize("bits", [None, 8, 32])
@pytest.mark.parametrize("options", [{"head_norms": True}, {"biases": True}])
def test_batches_of_a_window_do_not_change_a_bit(isa, bits, options):
    """A batch is 256 tokens per thread: three of them, two, and all tokens at once."""
    decoder, tokens = quantized_decoder(**options), tokens_of(600)
    threads = _core.config()["threads"]
    results = []
    for count in (1, 2, 3):
        _core.set_num_threads(threads=count)
        cache = cache_of(decoder, 640, bits) if bits else None
        hidden = np.empty((len(tokens), HIDDEN), np.float32)
        _core.decoder_forward(decoder, tokens, cache, hidden, None, None, past=0)
        results.append(hidden)
    _core.set_num_threads(threads=threads)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()
    assert (abs(results[0]).max(-1) > 0).all()


def test_taps_of_batches_are_those_of_the_window(isa):
    decoder = quantized_decoder(head_norms=True)
    x = np.random.default_rng(13).standard_normal((600, HIDDEN), dtype=np.float32)
    threads = _core.config()["threads"]
    results = []
    for count in (1, 3):
        _core.set_num_threads(threads=count)
        widths = (HIDDEN, HEADS * HEAD_DIM, HIDDEN, INNER)
        arrays = [x.copy(), *(np.full((600, width), np.nan, np.float32) for width in widths)]
        _core.decoder_block(decoder, *arrays, *[None] * 7, block=1, steps=63)
        results.append(arrays)
    _core.set_num_threads(threads=threads)
    for batches, whole in zip(*results, strict=True):
        assert (batches == whole).all()


def moments_of(decoder, tokens, threshold, cache=None, past=0):
    moments = np.zeros((2, 4, 5))
    moments[..., 0] = threshold
    hidden = np.empty((len(tokens), HIDDEN), np.float32)
    _core.decoder_forward(decoder, tokens, cache, hidden, None, moments, past=past)
    return moments, hidden


def test_moments_are_those_of_the_taps(isa):
    """Of all tokens but the first, exactly counted; float32 sums over a token."""
    network = network_of(17)
    decoder, tokens = decoder_of(network), tokens_of(70)
    found, hidden = moments_of(decoder, tokens, [0.5, 0.1, 1.0, 0.05])
    plain = np.empty_like(hidden)
    _core.decoder_forward(decoder, tokens, None, plain, None, None, past=0)
    assert np.array_equal(hidden, plain)
    x = np.empty((70, HIDDEN), np.float32)
    _core.decoder_embed(decoder, tokens, x)
    for block in range(2):
        taps = [np.empty((70, n), np.float32) for n in (HIDDEN, HEADS * HEAD_DIM, HIDDEN, INNER)]
        _core.decoder_block(decoder, x, *taps, *[None] * 7, block=block, steps=63)
        for tap, moments in zip(taps, found[block], strict=True):
            size = abs(tap[1:])
            assert moments[1] == size.size
            assert moments[2] == (size > np.float32(moments[0])).sum()
            assert np.isclose(moments[3], size.sum(dtype=float), rtol=1e-5)
            assert moments[4] == size.max()


def test_moments_do_not_depend_on_threads_or_pieces(isa):
    decoder, tokens = quantized_decoder(), tokens_of(600)
    threads, found = _core.config()["threads"], []
    for count in (1, 3):
        _core.set_num_threads(threads=count)
        found.append(moments_of(decoder, tokens, 0.3)[0])
    _core.set_num_threads(threads=threads)
    assert np.array_equal(*found)
    cache, total = cache_of(decoder, 640), np.zeros((2, 4, 5))
    for first, last in ((0, 1), (1, 100), (100, 600)):
        moments, _ = moments_of(decoder, tokens[first:last], 0.3, cache, first)
        total[..., 1:4] += moments[..., 1:4]
    assert np.array_equal(total[..., 1], found[0][..., 1])
    assert (abs(total[..., 2] - found[0][..., 2]) <= 3).all()  # attention rounds otherwise
    assert np.allclose(total[..., 3], found[0][..., 3], rtol=1e-3)


def test_a_cache_goes_on_in_a_decoder_that_stores_alike():
    network, other, tokens = network_of(18), network_of(19), tokens_of(30)
    parts = decoder_of(network), decoder_of(other)
    cache = cache_of(parts[0])
    forward(parts[0], tokens[:20], cache=cache)
    mixed = forward(parts[1], tokens[20:], cache=cache, past=20)
    again = cache_of(parts[0])
    assert not np.allclose(mixed, forward(parts[0], tokens[:10], cache=again))
    longer = decoder_of(network | {"frequency": network["frequency"] / 2})
    with pytest.raises(ValueError, match="the cache was made for another decoder"):
        forward(longer, tokens[20:], cache=cache, past=20)
    three = decoder_of(network_of(18, blocks=3))
    with pytest.raises(ValueError, match="the cache was made for another decoder"):
        forward(three, tokens[20:], cache=cache, past=20)
    unturned = decoder_of(network_of(18, without_rope=[1]))
    with pytest.raises(ValueError, match="the cache was made for another decoder"):
        forward(unturned, tokens[20:], cache=cache, past=20)


def test_one_block_without_rope_ignores_the_order_of_earlier_tokens(isa):
    decoder, tokens = decoder_of(network_of(31, blocks=1, without_rope=[0])), tokens_of(40)
    shuffled = np.append(tokens[-2::-1], tokens[-1:])
    assert close(forward(decoder, shuffled, 1), forward(decoder, tokens, 1))
    turned = decoder_of(network_of(31, blocks=1))
    assert not close(forward(turned, shuffled, 1), forward(turned, tokens, 1))


def test_two_threads_may_run_one_decoder():
    decoder = decoder_of(network_of(3))
    inputs = [tokens_of(n) for n in (40, 41, 42, 43)]
    expected = [forward(decoder, tokens) for tokens in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda tokens: forward(decoder, tokens), inputs))
            assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_the_handle_keeps_its_parts_alive():
    decoder, tokens = decoder_of(network_of(4)), tokens_of(9)  # nothing else holds the network
    gc.collect()
    ballast = [np.full((VOCAB, HIDDEN), np.nan, np.float32) for _ in range(50)]
    assert close(forward(decoder, tokens), oracle.decoder(network_of(4), tokens))
    del ballast


def test_layers_that_do_not_fit_are_refused():
    network = network_of(5)
    wrong = network["blocks"][1] | {"up_proj": network["blocks"][1]["q_proj"]}
    with pytest.raises(ValueError, match=r"gate_proj of block 1 is \(40, 24\), expected \(60"):
        decoder_of(network, blocks=[network["blocks"][0], wrong])
    wrong = network["blocks"][0] | {"attention_norm": np.ones(9, np.float32)}
    with pytest.raises(ValueError, match=r"axis 0 .* of mlp_norm has size 24, expected 9"):
        block_handle(wrong)
    wrong["mlp_norm"] = None
    with pytest.raises(ValueError, match="norms of block 0 have 9 and 0 gains, expected 24 and 10"):
        decoder_of(network, blocks=[wrong])
    with pytest.raises(ValueError, match="6 heads do not share 4 key heads evenly"):
        decoder_of(network, kv_heads=4)
    with pytest.raises(ValueError, match=r"q_proj of block 0 is \(60, 24\), expected \(36, 24\)"):
        decoder_of(network, frequency=np.ones(3))
    with pytest.raises(ValueError, match="the residual rotation has order 8, expected 24"):
        decoder_of(network, Rotation(8).handle)
    with pytest.raises(ValueError, match=r"the head is \(50, 23\), expected \(50, 24\)"):
        decoder_of(network, head=np.zeros((VOCAB, HIDDEN - 1), np.float32))
    with pytest.raises(ValueError, match=r"the embedding is \(50, 25\), expected \(50, 24\)"):
        decoder_of(network, embedding=dense(np.zeros((VOCAB, HIDDEN + 1), np.float32)))
    layer = dense_layer(network["embedding"], np.zeros(VOCAB, np.float32), None)
    with pytest.raises(ValueError, match="the embedding has a bias, expected none"):
        decoder_of(network, embedding=layer)


def test_handles_of_another_kind_are_refused():
    network = network_of(6)
    decoder = decoder_of(network)
    with pytest.raises(TypeError, match=r"decoder is not a lowbitq\.decoder"):
        _core.decoder_head(Rotation(8).handle, np.zeros((1, 1), np.float32), None)
    args = [dense(network["embedding"]), network["final_norm"], network["frequency"], None, None]
    options = {"heads": 6, "kv_heads": 2, "epsilon": 0.0, "rope_factor": 1.0}
    with pytest.raises(TypeError, match=r"blocks\[0\] is not a lowbitq.block"):
        _core.decoder(*args, (decoder,), **options)
    with pytest.raises(TypeError, match="blocks is not a tuple"):
        _core.decoder(*args, [], **options)


def test_bad_calls_are_refused():
    decoder = decoder_of(network_of(7))
    cache = cache_of(decoder)
    logits = np.empty((2, VOCAB), np.float32)
    two = tokens_of(2)

    def call(tokens=two, cache=None, hidden=None, logits=logits, past=0):
        _core.decoder_forward(decoder, tokens, cache, hidden, logits, None, past=past)

    with pytest.raises(ValueError, match=r"tokens\[1\] is 50, expected 0 to 49"):
        call(np.array([0, 50], np.int32))
    with pytest.raises(ValueError, match=r"tokens\[0\] is -1, expected 0 to 49"):
        call(np.array([-1, 0], np.int32))
    with pytest.raises(ValueError, match="2 rows of only 1 tokens"):
        call(two[:1])
    with pytest.raises(ValueError, match="there are no tokens"):
        call(two[:0], logits=logits[:0])
    with pytest.raises(ValueError, match="axis 1 of logits has size 49, expected vocab = 50"):
        call(logits=np.empty((2, VOCAB - 1), np.float32))
    with pytest.raises(ValueError, match="axis 1 of hidden has size 9, expected hidden = 24"):
        call(hidden=np.empty((2, 9), np.float32))
    with pytest.raises(ValueError, match="holds 127 of at most 128 tokens, no room for 2"):
        call(cache=cache, past=127)
    with pytest.raises(ValueError, match="the cache was made for another decoder"):
        call(cache=cache_of(decoder_of(network_of(7, blocks=3))))
    with pytest.raises(TypeError, match=r"cache is not a lowbitq\.cache"):
        call(cache=decoder)
    with pytest.raises(ValueError, match="bits is 16, expected 8 or 32"):
        cache_of(decoder, bits=16)
    with pytest.raises(ValueError, match="capacity is 0, expected 1 to"):
        cache_of(decoder, capacity=0)
