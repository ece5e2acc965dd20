"""The table of a block's layers and norms: their names in files, inputs and sizes.

The C decoder has the same table in `csrc/transformer/decoder.h`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbitq.models.config import ModelConfig

# Naming schemes: the key is a field of the entries below, the value a pattern for block `index`.
NAMINGS = {"hf": "model.layers.{index}.{name}", "gguf": "blk.{index}.{name}"}


@dataclass(frozen=True)
class Slot:
    """The place of a linear layer in a block.

    Attributes
    ----------
    name : str
        The key of `Block.linears`.
    hf, gguf : str
        Its name in a Hugging Face block and in a GGUF block.
    tap : str
        Its input, a name in `Model.block_forward`.
    rows, cols : str
        Its sizes, names in `sizes_of`.
    """

    name: str
    hf: str
    gguf: str
    tap: str
    rows: str
    cols: str

    def shape(self, config: ModelConfig) -> tuple[int, int]:
        """(rows, cols) in a model of this configuration."""
        sizes = sizes_of(config)
        return sizes[self.rows], sizes[self.cols]


@dataclass(frozen=True)
class Norm:
    """The place of a norm in a block; `name` is the field of `Block` that holds its gain."""

    name: str
    hf: str
    gguf: str
    size: str


@dataclass(frozen=True)
class Outer:
    """A tensor outside the blocks."""

    hf: str
    gguf: str


# fmt: off
SLOTS = (  # in the order of the forward pass
    Slot("q_proj", "self_attn.q_proj", "attn_q", "qkv", "query", "hidden"),
    Slot("k_proj", "self_attn.k_proj", "attn_k", "qkv", "key", "hidden"),
    Slot("v_proj", "self_attn.v_proj", "attn_v", "qkv", "key", "hidden"),
    Slot("o_proj", "self_attn.o_proj", "attn_output", "o", "hidden", "query"),
    Slot("gate_proj", "mlp.gate_proj", "ffn_gate", "mlp", "inner", "hidden"),
    Slot("up_proj", "mlp.up_proj", "ffn_up", "mlp", "inner", "hidden"),
    Slot("down_proj", "mlp.down_proj", "ffn_down", "down", "hidden", "inner"),
)
NORMS = (
    Norm("attention_norm", "input_layernorm", "attn_norm", "hidden"),
    Norm("mlp_norm", "post_attention_layernorm", "ffn_norm", "hidden"),
    Norm("query_norm", "self_attn.q_norm", "attn_q_norm", "head"),
    Norm("key_norm", "self_attn.k_norm", "attn_k_norm", "head"),
)
# fmt: on
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
OUTER = {
    "embedding": Outer(EMBEDDING, "token_embd"),
    "final_norm": Outer("model.norm", "output_norm"),
    "head": Outer(HEAD, "output"),
}

# The layers that read each input of a block.
TAPS = {
    tap: tuple(slot for slot in SLOTS if slot.tap == tap)
    for tap in dict.fromkeys(slot.tap for slot in SLOTS)
}

# The steps of `_core.decoder_block`: to the inputs of layers, and from there on.
TO = {"qkv": 1, "o": 2, "mlp": 8, "down": 16}
FROM = {"o": 4, "down": 32}
WHOLE_BLOCK = sum(TO.values()) + sum(FROM.values())


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Return a block's sizes: residual stream, all query heads, all key heads, MLP, one head.

    Examples
    --------
    >>> config = ModelConfig("llama", 64, 128, layers=2, heads=4, kv_heads=2, head_dim=16,
    ...                      vocab_size=100)
    >>> sizes_of(config)
    {'hidden': 64, 'query': 64, 'key': 32, 'inner': 128, 'head': 16}
    """
    return {
        "hidden": config.hidden_size,
        "query": config.heads * config.head_dim,
        "key": config.kv_heads * config.head_dim,
        "inner": config.intermediate_size,
        "head": config.head_dim,
    }


def name_in_block(index: int, entry: Slot | Norm, naming: str = "hf") -> str:
    """Return the name of a layer or norm of block `index`.

    Examples
    --------
    >>> name_in_block(3, SLOTS[0]), name_in_block(3, SLOTS[0], "gguf")
    ('model.layers.3.self_attn.q_proj', 'blk.3.attn_q')
    """
    return NAMINGS[naming].format(index=index, name=getattr(entry, naming))
