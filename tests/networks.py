"""Small networks as dicts of arrays, for oracle.decoder and for the decoder in C."""

from __future__ import annotations

import numpy as np
from packed_parts import dense_layer

from lowbitq import _core

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 50, 24, 40, 6, 2, 10


def network_of(
    seed, *, biases=False, head_norms=False, norms=True, head=False, blocks=2, without_rope=()
):
    """The blocks at indices `without_rope` leave it out."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = [(q, HIDDEN), (kv, HIDDEN), (kv, HIDDEN), (HIDDEN, q)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    sizes = [HIDDEN, HIDDEN, HEAD_DIM, HEAD_DIM]
    present = [norms, norms, head_norms, head_norms]
    return {
        "embedding": normal(VOCAB, HIDDEN),
        "final_norm": 1 + normal(HIDDEN) / 5,
        "head": normal(VOCAB, HIDDEN) if head else None,
        "frequency": 1000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "epsilon": 1e-5,
        "blocks": [
            {
                n: 1 + normal(size) / 5 if there else None
                for n, size, there in zip(NORMS, sizes, present, strict=True)
            }
            | {
                n: (
                    normal(*shape) / np.float32(shape[1] ** 0.5),
                    normal(shape[0]) if biases else None,
                )
                for n, shape in zip(LAYERS, shapes, strict=True)
            }
            | {"rope": index not in without_rope}
            for index in range(blocks)
        ],
    }


def block_handle(block):
    layers = [dense_layer(*block[name], None) for name in LAYERS]
    scales = {name: block.get(name, 1.0) for name in ("attention_scale", "mlp_scale")}
    rope = block.get("rope", True)
    return _core.block(*(block[name] for name in NORMS), *layers, **scales, rope=rope)


def dense(weight):
    return None if weight is None else dense_layer(weight, None, None)


def decoder_of(network, rotation=None, embedding=None, rope_factor=1.0, **changes):
    network = network | changes
    return _core.decoder(
        embedding or dense(network["embedding"]),
        network["final_norm"],
        network["frequency"],
        dense(network["head"]),
        rotation,
        tuple(block_handle(block) for block in network["blocks"]),
        heads=network["heads"],
        kv_heads=network["kv_heads"],
        epsilon=network["epsilon"],
        rope_factor=rope_factor,
    )


def tokens_of(count):
    return np.random.default_rng(count).integers(0, VOCAB, count).astype(np.int32)
