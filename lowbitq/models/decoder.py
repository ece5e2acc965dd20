"""Model: a network of arrays and linear layers, run by the C decoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core, generation, gradients
from lowbitq.generation import (
    Messages,
    Stream,
    TextCallback,
    TextOptions,
    Texts,
    TokenCallback,
    TokenLists,
    TokenOptions,
    Tokens,
)
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.config import ModelConfig
from lowbitq.models.plain import plain, write_hf
from lowbitq.models.slots import EMBEDDING, HEAD, NORMS, SLOTS, TAPS, TO, WHOLE_BLOCK, name_in_block
from lowbitq.models.tokenizer import Tokenizer
from lowbitq.models.tokens import check_sliding_window, token_array
from lowbitq.rotations import Rotation
from lowbitq.tables import as_html

if TYPE_CHECKING:
    from typing_extensions import Unpack

AnyLinear = Linear | QuantizedLinear

# Tokens of a prompt that run at once: enough for the matrix products' full speed, few enough to
# keep a long prompt's scratch small.
_PREFILL = 512


def _once(layers: Iterator[tuple[str, AnyLinear]]) -> Iterable[AnyLinear]:
    """Return the layers; a layer that occurs several times in the model is returned once."""
    return {id(linear): linear for _, linear in layers}.values()


@dataclass(eq=False)
class Block:
    """One block: two norms and seven linear layers.

    Attributes
    ----------
    attention_norm, mlp_norm : ndarray of shape (hidden,), float32, or None
        Gains of the norms before attention and before the MLP; None: ones.
    linears : dict of str to Linear or QuantizedLinear
        ``q_proj k_proj v_proj o_proj gate_proj up_proj down_proj``.
    query_norm, key_norm : ndarray of shape (head_dim,), float32, or None
        Gains of the norms of each head; None: no such norm.
    attention_scale, mlp_scale : float
        Factors of what each half adds to the residual stream.
    rope : bool
        Whether queries and keys are turned by their position.
    """

    attention_norm: NDArray[np.float32] | None
    mlp_norm: NDArray[np.float32] | None
    linears: dict[str, AnyLinear]
    query_norm: NDArray[np.float32] | None = None
    key_norm: NDArray[np.float32] | None = None
    attention_scale: float = 1.0
    mlp_scale: float = 1.0
    rope: bool = True

    @property
    def norms(self) -> list[NDArray[np.float32] | None]:
        """The gains, in the order of `lowbitq.models.slots.NORMS`."""
        return [getattr(self, norm.name) for norm in NORMS]

    def _parts(self) -> list[Any]:
        layers = [self.linears[slot.name] for slot in SLOTS]
        return [*self.norms, *layers, self.attention_scale, self.mlp_scale, self.rope]


@dataclass(eq=False, repr=False)
class Cache:
    """Keys and values of the tokens that a model has seen, for `Model.step`.

    It is valid for the model as it was when `Model.new_cache` made it.

    Attributes
    ----------
    length : int
        Number of tokens in the cache; lower it to drop the last ones.
    capacity : int
        Maximum number of tokens.
    bits : int
        Bits per stored number, 32 or 8.
    nbytes : int
        Memory in bytes when it is full.
    """

    length: int
    capacity: int
    bits: int
    nbytes: int
    handle: Any = field(repr=False)
    decoder: Any = field(repr=False)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Cache cannot be copied or pickled, because its memory belongs to this process; make "
            "another with Model.new_cache and run its tokens through Model.step again"
        )


@dataclass(eq=False, repr=False)
class Model:
    """A LLaMA-like network.

    Attributes
    ----------
    config : ModelConfig
    tokenizer : Tokenizer or None
    embedding : Linear or QuantizedLinear
        Shape (vocab, hidden), without bias; one row per token.
    blocks : list of Block
        A block may occur several times; it is then stored once.
    final_norm : ndarray of shape (hidden,), float32
    head : Linear or QuantizedLinear or None
        None: the embedding.
    residual_rotation : Rotation or None
        Applied after the embedding and undone before the last norm.
    provenance : dict
        Origin of the weights.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    embedding: AnyLinear
    blocks: list[Block]
    final_norm: NDArray[np.float32]
    head: AnyLinear | None = None
    residual_rotation: Rotation | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    _handle: Any = field(default=None, init=False)
    _handle_parts: list[Any] = field(default_factory=list, init=False)

    def __getstate__(self) -> dict[str, Any]:
        # Leaves out the decoder, which is valid in this process only; a copy makes its own.
        return vars(self) | {"_handle": None, "_handle_parts": []}

    def linears(self) -> Iterator[tuple[str, AnyLinear]]:
        """Yield the linear layers of all blocks with their Hugging Face names.

        Yields
        ------
        name : str
            Such as ``"model.layers.3.mlp.up_proj"``.
        linear : Linear or QuantizedLinear
        """
        for i, block in enumerate(self.blocks):
            for slot in SLOTS:
                yield name_in_block(i, slot), block.linears[slot.name]

    def matrices(self) -> Iterator[tuple[str, AnyLinear]]:
        """Yield the embedding, then the layers of `linears`, then the head unless it is tied.

        Yields
        ------
        name : str
            ``"model.embed_tokens"``, ``"model.layers.0.self_attn.q_proj"``, ..., ``"lm_head"``.
        linear : Linear or QuantizedLinear
        """
        yield EMBEDDING, self.embedding
        yield from self.linears()
        if self.head is not None:
            yield HEAD, self.head

    def replace_linear(self, name: str, linear: AnyLinear) -> None:
        """Replace the layer of this name.

        Parameters
        ----------
        name : str
            A name from `matrices`.
        linear : Linear or QuantizedLinear
            A layer of the same shape.

        Raises
        ------
        KeyError
            If the model has no such layer.
        ValueError
            If the shapes differ.
        """
        before = dict(self.matrices()).get(name)
        if before is None:
            raise KeyError(f"the model has no linear layer {name!r}")
        if linear.shape != before.shape:
            raise ValueError(f"linear has shape {linear.shape}, but {name} has {before.shape}")
        if name == EMBEDDING:
            self.embedding = linear
        elif name == HEAD:
            self.head = linear
        else:
            _, _, index, _, key = name.split(".")
            self.blocks[int(index)].linears[key] = linear

    def save(self, path: str | os.PathLike[str], *, dtype: str = "auto") -> None:
        """Write the model to a Hugging Face folder, which `load` and transformers read.

        The folder holds ``config.json``, ``model.safetensors`` and the tokenizer's files. It is
        written atomically. Rotations are multiplied into the weights.

        Parameters
        ----------
        path : str or path-like
            Missing, or an empty folder; `lowbitq.export` can also replace a folder of this kind.
        dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
            Of the weights. ``"auto"``: the narrowest that holds all of them exactly.

        Raises
        ------
        FileExistsError
            If `path` is anything else; it is not touched.
        OSError
            If something cannot be written; the message names it, and nothing is left behind.
        ValueError
            If `dtype` is none of these, a weight is too large for it, or a layer has a bias that
            the model's family has no place for.
        """
        write_hf(plain(self), path, dtype)

    def copy(self) -> Model:
        """Return a copy whose blocks can be changed; arrays and layers are shared."""
        blocks = [replace(block, linears=dict(block.linears)) for block in self.blocks]
        return replace(self, blocks=blocks, provenance=dict(self.provenance))

    @property
    def parameters(self) -> int:
        """Number of weights, biases and gains; a tied head counts once."""
        weights = sum(linear.shape[0] * linear.shape[1] for linear in _once(self.matrices()))
        return weights + sum(vector.size for vector in self._vectors())

    def _vectors(self) -> Iterator[NDArray[np.float32]]:
        """Yield all gains and biases."""
        yield self.final_norm
        gains = {id(gain): gain for block in self.blocks for gain in block.norms}
        yield from (gain for gain in gains.values() if gain is not None)
        yield from (linear.bias for linear in _once(self.matrices()) if linear.bias is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the blocks' linear layers, everything counted."""
        layers = _once(self.linears())
        sizes = [(linear.bits_per_weight, np.prod(linear.shape)) for linear in layers]
        return float(sum(b * n for b, n in sizes) / sum(n for _, n in sizes))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, biases, norms and the embedding."""
        weights = sum(linear.nbytes for linear in _once(self.matrices()))
        return weights + sum(vector.nbytes for vector in self._vectors())

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}({c.family}: {c.layers} layers, hidden {c.hidden_size}, "
            f"ffn {c.intermediate_size}, heads {c.heads}/{c.kv_heads}, "
            f"{self.parameters / 1e6:.1f}M parameters)"
        )

    def _repr_html_(self) -> str:
        rows = [
            {
                "matrix": name,
                "rows": linear.shape[0],
                "columns": linear.shape[1],
                "bits per weight": linear.bits_per_weight,
                "MB": linear.nbytes / 1e6,
            }
            for name, linear in self.matrices()
        ]
        caption = f"{self!r}, {self.nbytes / 1e6:.1f} MB"
        return as_html(list(rows[0]), rows, caption=caption, bars=["bits per weight", "MB"], most=9)

    def embed(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Look up tokens.

        Parameters
        ----------
        tokens : array_like of shape (t,), integers

        Returns
        -------
        ndarray of shape (t, hidden), float32
            The residual stream that enters block 0, rotated if the model is.
        """
        tokens = self._tokens(tokens)
        x = np.empty((len(tokens), self.config.hidden_size), np.float32)
        _core.decoder_embed(self.handle, tokens, x)
        return x

    def block_forward(
        self,
        index: int,
        hidden: NDArray[np.float32],
        taps: dict[str, NDArray[np.float32]] | None = None,
        *,
        steps: int = WHOLE_BLOCK,
    ) -> None:
        """Run one block, or some steps of it, on one window, without a cache.

        Parameters
        ----------
        index : int
            Index of the block.
        hidden : ndarray of shape (t, hidden), float32
            The residual stream; changed in place.
        taps : dict, default=None
            Receives the inputs of the linear layers before their own rotations, as float32 arrays
            of t rows: ``"qkv"``, ``"o"``, ``"mlp"`` (gate and up) and ``"down"``. Arrays that it
            already holds are overwritten.
        steps : int, default=WHOLE_BLOCK
            Sum of `TO` and `FROM` of `lowbitq.models.slots`: steps that end with the inputs of some
            layers, or go on from a tap that was filled before.

        Raises
        ------
        ValueError
            If `index`, a shape or the steps do not fit.
        """
        seen: list[Any] = [None] * len(TAPS)
        if taps is not None:
            linears = self.blocks[index].linears
            for tap, slots in TAPS.items():
                if tap not in taps and steps & TO[tap]:
                    taps[tap] = np.empty((len(hidden), linears[slots[0].name].shape[1]), np.float32)
            seen = [taps.get(tap) for tap in TAPS]
        arrays = [hidden, *seen, *[None] * 7]  # what a way back needs is not asked for
        _core.decoder_block(self.handle, *arrays, block=index, steps=steps)

    def hidden(
        self, tokens: ArrayLike, *, moments: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """Return the input of the head.

        Parameters
        ----------
        tokens : array_like of shape (t,), integers
        moments : ndarray of shape (blocks, 4, 5), float64, default=None
            Added to, as `lowbitq.monitoring.Moments` describes it.

        Returns
        -------
        ndarray of shape (t, hidden), float32
            Output of the last norm.

        Raises
        ------
        ValueError
            If a token is not in the vocabulary, there are none, or they exceed a sliding window.
        """
        tokens = self._tokens(tokens)
        hidden = np.empty((len(tokens), self.config.hidden_size), np.float32)
        _core.decoder_forward(self.handle, tokens, None, hidden, None, moments, past=0)
        return hidden

    def finish(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the last norm to the residual stream (t, hidden); undo the model's rotation."""
        result = np.empty_like(hidden)
        _core.decoder_finish(self.handle, hidden, result)
        return result

    def head_logits(
        self, hidden: NDArray[np.float32], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return the logits of tokens.

        Parameters
        ----------
        hidden : ndarray of shape (t, hidden), float32
            The result of `hidden`.
        out : ndarray of shape (t, vocab), float32, default=None
            Written and returned; fastest if 64-byte aligned. None: a new array.

        Returns
        -------
        ndarray of shape (t, vocab), float32
        """
        if out is None:
            out = np.empty((len(hidden), self.config.vocab_size), np.float32)
        _core.decoder_head(self.handle, hidden, out)
        return out

    def logits(
        self, tokens: ArrayLike, *, moments: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """Run the whole network.

        Parameters
        ----------
        tokens : array_like of shape (t,), integers
        moments : ndarray of shape (blocks, 4, 5), float64, default=None
            As for `hidden`.

        Returns
        -------
        ndarray of shape (t, vocab), float32
            Row i predicts token i + 1. It takes 4 t vocab bytes; for long windows and large
            vocabularies, pass pieces of `hidden`'s result to `head_logits`.

        Raises
        ------
        ValueError
            If a token is not in the vocabulary, there are none, or they exceed a sliding window.
        """
        tokens = self._tokens(tokens)
        logits = np.empty((len(tokens), self.config.vocab_size), np.float32)
        _core.decoder_forward(self.handle, tokens, None, None, logits, moments, past=0)
        return logits

    def new_cache(self, capacity: int, *, bits: int = 32) -> Cache:
        """Return an empty cache.

        Parameters
        ----------
        capacity : int
            Maximum number of tokens. Memory is allocated as they arrive.
        bits : int, default=32
            32 keeps keys and values as float32: 8 kv_heads head_dim layers bytes per token. 8
            rounds them to int8, with a scale for each token and head: about a quarter of the memory
            and of the traffic that makes long texts slow. Biases of the key and value layers are
            stored separately, in float32. The mean Kullback-Leibler divergence over 512 tokens of
            WikiText-2 is then 0.0002 nats, for SmolLM2-135M and for Qwen2.5-Coder-0.5B, whose keys
            have biases of up to 200.

        Returns
        -------
        Cache

        Raises
        ------
        ValueError
            If `capacity` is less than one or `bits` is neither 8 nor 32.
        """
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, expected at least 1")
        if bits not in (8, 32):
            raise ValueError(f"bits is {bits}, expected 8 or 32")
        decoder = self.handle
        handle, nbytes = _core.cache(decoder, capacity=capacity, bits=bits)
        return Cache(0, capacity, bits, nbytes, handle, decoder)

    def step(
        self, tokens: ArrayLike, cache: Cache, *, moments: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """Run the network on tokens that follow those in the cache.

        Parameters
        ----------
        tokens : array_like of shape (t,), integers
            A prompt, or only the last chosen token.
        cache : Cache
            Extended by t tokens.
        moments : ndarray of shape (blocks, 4, 5), float64, default=None
            As for `hidden`.

        Returns
        -------
        ndarray of shape (vocab,), float32
            Logits of the token after the last one.

        Raises
        ------
        ValueError
            If a token is not in the vocabulary, there are none, or the cache has no room for them.
        """
        tokens = self._tokens(tokens, cache.length)
        if cache.length + len(tokens) > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.length} of at most {cache.capacity} tokens, "
                f"no room for {len(tokens)}"
            )
        logits = np.empty((1, self.config.vocab_size), np.float32)
        nothing = logits[:0]
        for start in range(0, len(tokens), _PREFILL):
            chunk = tokens[start : start + _PREFILL]
            out = logits if start + _PREFILL >= len(tokens) else nothing
            past = cache.length
            _core.decoder_forward(cache.decoder, chunk, cache.handle, None, out, moments, past=past)
            cache.length += len(chunk)
        return logits.reshape(-1)

    @overload
    def generate(self, prompt: str | Messages, **options: Unpack[TextCallback]) -> str: ...

    @overload
    def generate(self, prompt: Tokens, **options: Unpack[TokenCallback]) -> NDArray[np.int32]: ...

    @overload
    def generate(self, prompt: Texts, **options: Unpack[TextOptions]) -> list[str]: ...

    @overload
    def generate(
        self, prompt: TokenLists, **options: Unpack[TokenOptions]
    ) -> list[NDArray[np.int32]]: ...

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a text, messages, tokens, or a list of these.

        The options are `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`, `seed`, `stop`, `cache_bits` and `on_token`; see
        `lowbitq.generation.generate`.
        """
        return generation.generate(self, prompt, **options)

    @overload
    def stream(self, prompt: str | Messages, **options: Unpack[TextOptions]) -> Stream[str]: ...

    @overload
    def stream(self, prompt: Tokens, **options: Unpack[TokenOptions]) -> Stream[int]: ...

    def stream(self, prompt: Any, **options: Any) -> Any:
        """Return an iterator over the pieces of one continuation, made as they are asked for.

        The options are those of `generate` without `on_token`; see `lowbitq.generation.stream`.
        """
        return generation.stream(self, prompt, **options)

    def gradients(
        self,
        tokens: ArrayLike,
        loss: Any = "ce",
        *,
        of: Iterable[str] = ("weight", "bias", "norm"),
        **options: Any,
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Yield gradients of a loss, block by block; see `lowbitq.gradients.gradients`."""
        return gradients.gradients(self, tokens, loss, of=of, **options)

    def _tokens(self, tokens: ArrayLike, past: int = 0) -> NDArray[np.int32]:
        """Return tokens as the C decoder expects them."""
        array = token_array(tokens, self.config.vocab_size)
        if not array.size:
            raise ValueError(f"tokens has shape {array.shape}, expected (t,) with t >= 1")
        check_sliding_window(past + array.size, self.config)
        return array

    @property
    def handle(self) -> Any:
        """The C decoder of the model in its present state, for `lowbitq._core`."""
        parts: list[Any] = [self.embedding, self.final_norm, self.head, self.residual_rotation]
        for block in self.blocks:
            parts += block._parts()
        before = self._handle_parts
        if len(parts) != len(before) or any(a is not b for a, b in zip(parts, before, strict=True)):
            for name in ("embedding", "head"):
                linear = getattr(self, name)
                if not (isinstance(linear, AnyLinear) or (name == "head" and linear is None)):
                    raise TypeError(f"{name} is a {type(linear).__name__}, expected a Linear")
            frequencies, factor = self.config.rope_frequencies()
            self._handle = _core.decoder(
                self.embedding.handle,
                self.final_norm,
                frequencies,
                None if self.head is None else self.head.handle,
                None if self.residual_rotation is None else self.residual_rotation.handle,
                tuple(_block_handle(block) for block in self.blocks),
                heads=self.config.heads,
                kv_heads=self.config.kv_heads,
                epsilon=self.config.norm_eps,
                rope_factor=factor,
            )
            self._handle_parts = parts
        return self._handle


def _block_handle(block: Block) -> Any:
    return _core.block(
        *block.norms,
        *(block.linears[slot.name].handle for slot in SLOTS),
        attention_scale=block.attention_scale,
        mlp_scale=block.mlp_scale,
        rope=block.rope,
    )
