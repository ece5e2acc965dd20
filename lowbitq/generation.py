"""Text generation: choosing tokens from logits, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq._core import NumericalError
from lowbitq.models.config import ModelConfig
from lowbitq.models.tokens import check_count, check_sliding_window, token_array

Tokens: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


class _Tokenizer(Protocol):
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str) -> NDArray[np.int32]: ...
    def stream(
        self, tokens: Iterable[int], *, after: ArrayLike, skip_special: bool
    ) -> Iterator[str]: ...


class Generator(Protocol):
    """The interface that `generate` needs; `lowbitq.Model` has it."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> _Tokenizer | None: ...
    def new_cache(self, capacity: int, *, bits: int) -> Any: ...
    def step(self, tokens: NDArray[np.int32], cache: Any) -> NDArray[np.float32]: ...


def sample(
    logits: ArrayLike,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: np.random.Generator | None = None,
) -> int:
    """Choose the next token.

    The probability of token i is ``softmax(logits / temperature)[i]``, set to zero outside the
    `top_k` most probable tokens, renormalised, and set to zero outside the smallest set of most
    probable tokens whose total reaches `top_p`.

    Parameters
    ----------
    logits : array_like of shape (vocab,)
        Minus infinity forbids a token.
    temperature : float, default=0.0
        0 takes the largest logit (the lowest token if several are equal) and ignores the options
        below.
    top_k : int, default=None
        At least 1. Among equal logits at the border, lower tokens are kept.
    top_p : float, default=None
        In (0, 1].
    generator : numpy.random.Generator, default=None
        Source of one uniform number. Required unless `temperature` is 0.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If an argument is out of range.
    NumericalError
        If a logit is NaN or plus infinity, or no token is allowed.

    References
    ----------
    A. Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (`top_p`).

    Examples
    --------
    >>> sample([0.0, 2.0, 2.0])
    1
    >>> generator = np.random.default_rng(0)
    >>> [sample([0.0, 2.0, 2.0], temperature=1, top_k=2, generator=generator) for _ in range(5)]
    [2, 1, 1, 1, 2]
    """
    _check_options(temperature, top_k, top_p)
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"logits have shape {values.shape}, expected (vocab,)")
    best = int(values.argmax())
    if not math.isfinite(values[best]):  # argmax returns a NaN if there is one
        raise NumericalError(f"the largest logit is {values[best]} (token {best})")
    if temperature == 0:
        return best
    if generator is None:
        raise ValueError(f"temperature = {temperature} needs a random generator")

    with np.errstate(over="ignore"):  # with a tiny temperature, to minus infinity
        probability = np.exp((values - values[best]) / temperature)
    kept = np.flatnonzero(probability)
    if top_k is not None and top_k < kept.size:
        kept = kept[_largest(values[kept], top_k)]
    if top_p is not None:
        kept = kept[_nucleus(probability[kept], top_p)]
    cumulative = probability[kept].cumsum()
    drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(kept[min(int(drawn), kept.size - 1)])  # the product may round up to the total


@overload
def generate(
    model: Generator,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    cache_bits: int = 32,
    on_token: Callable[[str], object] | None = None,
) -> str: ...


@overload
def generate(
    model: Generator,
    prompt: Tokens,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: None = None,
    cache_bits: int = 32,
    on_token: Callable[[int], object] | None = None,
) -> NDArray[np.int32]: ...


@overload
def generate(
    model: Generator,
    prompt: str | Tokens,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    cache_bits: int = 32,
    on_token: Callable[[Any], object] | None = None,
) -> str | NDArray[np.int32]: ...


def generate(
    model: Generator,
    prompt: str | Tokens,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    cache_bits: int = 32,
    on_token: Callable[[Any], object] | None = None,
) -> str | NDArray[np.int32]:
    """Continue a text.

    Parameters
    ----------
    model : Model
        The end tokens of its configuration and of its tokenizer end the text.
    prompt : str or array_like of shape (t,), integer
        For a conversation, use ``model.tokenizer.chat``.
    max_new_tokens : int, default=64
        Together with the prompt, at most ``model.config.max_positions`` and the sliding window.
    temperature, top_k, top_p
        As in `sample`. The default always takes the most probable token.
    seed : int, default=0
        Equal seeds give equal texts.
    stop : str or sequence of str, default=None
        The text ends before the first of these that is completed. Only for a string prompt.
    cache_bits : int, default=32
        Bits per number in the key-value cache, 8 or 32; `Model.new_cache` says what 8 costs.
    on_token : callable, default=None
        Called with each piece of text once it is complete, or with each token if the prompt is
        tokens. Special tokens are not shown, and text that may begin a `stop` is held back.

    Returns
    -------
    str or ndarray of shape (n,), int32
        The continuation, in the form of the prompt, without the token that ended it.

    Raises
    ------
    TypeError
        If `prompt` is neither a string nor integers, or an option is of another type.
    ValueError
        If an argument is out of range or the prompt is empty or too long.
    NumericalError
        If the model's logits have a NaN or plus infinity.

    Examples
    --------
    A model that counts; 3 is its end token:

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(
    ...     config=SimpleNamespace(
    ...         vocab_size=4, max_positions=99, sliding_window=None, eos_token_ids=(3,)
    ...     ),
    ...     tokenizer=None,
    ...     new_cache=lambda capacity, bits: None,
    ...     step=lambda tokens, cache: np.eye(4, dtype=np.float32)[tokens[-1] + 1],
    ... )
    >>> generate(model, [0])
    array([1, 2], dtype=int32)
    """
    _check_options(temperature, top_k, top_p)
    check_count("max_new_tokens", max_new_tokens, 1)
    check_count("seed", seed, 0)
    generator = np.random.default_rng(seed)
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop is {stop!r}, expected non-empty texts")
    tokens = _prompt_tokens(model, prompt, max_new_tokens)

    def choose(logits: NDArray[np.float32]) -> int:
        return sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )

    cache = model.new_cache(tokens.size + max_new_tokens - 1, bits=cache_bits)
    continuation = _continuation(model, tokens, cache, max_new_tokens, choose)
    if isinstance(prompt, str):
        assert model.tokenizer is not None  # _prompt_tokens used it
        pieces = model.tokenizer.stream(continuation, after=tokens, skip_special=True)
        return "".join(_handed_on(_before_stop(pieces, stops), on_token))
    if stops:
        raise ValueError("stop needs a string prompt, found tokens")
    return np.array(list(_handed_on(continuation, on_token)), dtype=np.int32)


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, expected a number of at least 0")
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")


def _prompt_tokens(
    model: Generator, prompt: str | Tokens, max_new_tokens: int
) -> NDArray[np.int32]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("prompt is a string, but the model has no tokenizer: give tokens")
        tokens = model.tokenizer.encode(prompt)
    else:
        tokens = token_array(prompt, model.config.vocab_size, name="prompt")
    if not tokens.size:
        raise ValueError("prompt has no tokens: there is nothing to continue")
    if tokens.size + max_new_tokens > model.config.max_positions:
        raise ValueError(
            f"prompt has {tokens.size} tokens; with max_new_tokens = {max_new_tokens} this exceeds "
            f"the model's {model.config.max_positions} positions"
        )
    check_sliding_window(tokens.size + max_new_tokens - 1, model.config)  # the last is not read
    return tokens


def _continuation(
    model: Generator,
    tokens: NDArray[np.int32],
    cache: Any,
    max_new_tokens: int,
    choose: Callable[[NDArray[np.float32]], int],
) -> Iterator[int]:
    """Yield new tokens until an end token, which is left out, or until there are enough."""
    ends = {*model.config.eos_token_ids, *(model.tokenizer.eos_ids if model.tokenizer else ())}
    for _ in range(max_new_tokens):
        token = choose(model.step(tokens, cache))
        if token in ends:
            return
        yield token
        tokens = np.array([token], dtype=np.int32)


def _before_stop(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """Yield the pieces up to the first stop; hold back an end of text that may begin one."""
    held = ""
    for piece in pieces:
        held += piece
        # Compare ends, so that the result does not depend on how the text is cut into pieces.
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        ready = min(found)[1] if found else len(held) - max(begun, default=0)
        if ready:
            yield held[:ready]
        if found:
            return
        held = held[ready:]
    if held:
        yield held


def _handed_on(items: Iterator[Any], on_token: Callable[[Any], object] | None) -> Iterator[Any]:
    for item in items:
        if on_token is not None:
            on_token(item)
        yield item


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` largest values; among equal ones, the first."""
    border = np.partition(values, values.size - count)[values.size - count]
    chosen: NDArray[np.bool_] = values > border
    equal = np.flatnonzero(values == border)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Mark the fewest largest weights whose sum reaches `top_p` of the total."""
    order = np.argsort(-weights, kind="stable")
    cumulative = weights[order].cumsum()
    count = 1 + int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left"))
    chosen = np.zeros(weights.size, dtype=np.bool_)
    chosen[order[:count]] = True
    return chosen
