"""Text generation: continuations of prompts, token by token, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq.models.config import ModelConfig
from lowbitq.models.tokens import check_count, check_sliding_window, token_array
from lowbitq.sampling import Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tokens: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Messages: TypeAlias = Sequence[Mapping[str, Any]]
Texts: TypeAlias = list[str] | tuple[str, ...] | Sequence[Messages]
TokenLists: TypeAlias = Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]]

Piece = TypeVar("Piece")


class TokenOptions(TypedDict, total=False):
    """Options of `stream` for a prompt of tokens."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int
    cache_bits: int


class TextOptions(TokenOptions, total=False):
    """Options of `stream` for a text or messages."""

    stop: str | Sequence[str] | None


class TokenCallback(TokenOptions, total=False):
    """Options of `generate` for a prompt of tokens."""

    on_token: Callable[[int], object] | None


class TextCallback(TextOptions, total=False):
    """Options of `generate` for a text or messages."""

    on_token: Callable[[str], object] | None


class _Tokenizer(Protocol):
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str) -> NDArray[np.int32]: ...
    def chat(self, messages: Messages) -> str: ...
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


@dataclass(frozen=True)
class Settings(Sampling):
    """All options of `stream`, checked."""

    max_new_tokens: int = 64
    seed: int = 0
    stop: str | Sequence[str] | None = None
    cache_bits: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_new_tokens", self.max_new_tokens, 1)
        check_count("seed", self.seed, 0)
        if not all(isinstance(text, str) and text for text in self.stops):
            raise ValueError(f"stop is {self.stop!r}, expected non-empty texts")
        if self.cache_bits not in (8, 32):
            raise ValueError(f"cache_bits is {self.cache_bits}, expected 8 or 32")

    @property
    def stops(self) -> list[str]:
        """The texts that end a continuation."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


@dataclass
class _Progress:
    """What is known of a continuation so far; its generators write it and its `Stream` shows it."""

    prompt_tokens: int
    tokens: int = 0
    finish: str | None = None


class Stream(Iterator[Piece]):
    """The pieces of a continuation, each made when it is asked for.

    Closing it, or dropping it unfinished, frees the key-value cache. It is also a context manager
    that closes it.
    """

    def __init__(self, pieces: Steps[Piece, None, None], progress: _Progress) -> None:
        # The generators do not refer to this object: without a cycle, dropping it frees them.
        self._pieces = pieces
        self._progress = progress

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self._progress.prompt_tokens

    @property
    def tokens(self) -> int:
        """Number of tokens chosen so far, including an end token."""
        return self._progress.tokens

    @property
    def finish(self) -> str | None:
        """What ended the continuation; None while it can go on.

        ``"stop"`` is an end token or a text of `stop`, ``"length"`` is `max_new_tokens`.
        """
        return self._progress.finish

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End the continuation and free what it holds."""
        self._pieces.close()

    def __enter__(self) -> Stream[Piece]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@overload
def stream(
    model: Generator, prompt: str | Messages, **options: Unpack[TextOptions]
) -> Stream[str]: ...


@overload
def stream(model: Generator, prompt: Tokens, **options: Unpack[TokenOptions]) -> Stream[int]: ...


def stream(model: Generator, prompt: str | Messages | Tokens, **options: Any) -> Stream[Any]:
    """Continue a text, and yield each piece as soon as it is complete.

    The prompt is checked and encoded at once; the model runs while the pieces are taken.

    Parameters
    ----------
    model, prompt
        As in `generate`, but one prompt.
    **options
        As in `generate`, without `on_token`.

    Returns
    -------
    Stream
        An iterator over str, or over int if the prompt is tokens. Special tokens are not shown,
        and text that may begin a `stop` is held back.

    Raises
    ------
    TypeError, ValueError, NumericalError
        As in `generate`; NumericalError while pieces are taken.

    Examples
    --------
    With the model of `generate`, which counts to its end token:

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(
    ...     config=SimpleNamespace(
    ...         vocab_size=4, max_positions=99, sliding_window=None, eos_token_ids=(3,)
    ...     ),
    ...     tokenizer=None,
    ...     new_cache=lambda capacity, bits: None,
    ...     step=lambda tokens, cache: np.eye(4, dtype=np.float32)[tokens[-1] + 1],
    ... )
    >>> pieces = stream(model, [0])
    >>> list(pieces), pieces.tokens, pieces.finish
    ([1, 2], 3, 'stop')
    """
    return _open(model, prompt, Settings(**options))


@overload
def generate(model: Generator, prompt: str | Messages, **options: Unpack[TextCallback]) -> str: ...


@overload
def generate(
    model: Generator, prompt: Tokens, **options: Unpack[TokenCallback]
) -> NDArray[np.int32]: ...


@overload
def generate(model: Generator, prompt: Texts, **options: Unpack[TextOptions]) -> list[str]: ...


@overload
def generate(
    model: Generator, prompt: TokenLists, **options: Unpack[TokenOptions]
) -> list[NDArray[np.int32]]: ...


def generate(
    model: Generator,
    prompt: str | Messages | Tokens | Texts | TokenLists,
    *,
    on_token: Callable[[Any], object] | None = None,
    **options: Any,
) -> Any:
    """Continue a text.

    Parameters
    ----------
    model : Model
        The end tokens of its configuration and of its tokenizer end the text.
    prompt : str, list of dict, array_like of shape (t,), integer, or a list of these
        A text, messages with ``"role"`` and ``"content"``, which the model's chat template turns
        into a text, or tokens. The prompts of a list are independent: each is continued as it
        would be alone.
    max_new_tokens : int, default=64
        Together with the prompt, at most ``model.config.max_positions`` and the sliding window.
    temperature, top_k, top_p, min_p, repetition_penalty
        As in `lowbitq.sampling.sample`. The default always takes the most probable token.
    seed : int, default=0
        Equal seeds give equal texts.
    stop : str or sequence of str, default=None
        The text ends before the first of these that is completed. Not for tokens.
    cache_bits : int, default=32
        Bits per number in the key-value cache, 8 or 32; `Model.new_cache` says what 8 costs.
    on_token : callable, default=None
        Called with each piece that `stream` would yield. Only for one prompt.

    Returns
    -------
    str, ndarray of shape (n,), int32, or a list of these
        The continuation, without the token that ended it: a text, or tokens if the prompt is
        tokens; for a list, one of each prompt.

    Raises
    ------
    TypeError
        If `prompt` is none of these, or an option is unknown or of another type.
    ValueError
        If an argument is out of range, a prompt is empty or too long, or the chat template refuses
        the messages.
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
    >>> generate(model, [[0], [1]])
    [array([1, 2], dtype=int32), array([2], dtype=int32)]
    """
    settings = Settings(**options)
    if not _is_batch(prompt):
        pieces = _open(model, prompt, settings)
        return _collected(_handed_on(pieces, on_token), _is_text(prompt))
    if on_token is not None:
        raise ValueError(f"on_token is for one prompt, found a list of {len(prompt)}")
    # All of them are checked before the model runs.
    streams = [
        _open(model, one, settings, name=f"prompt[{number}]") for number, one in enumerate(prompt)
    ]
    return [_collected(pieces, _is_text(one)) for one, pieces in zip(prompt, streams, strict=True)]


def room(config: ModelConfig) -> int:
    """Return how many tokens a prompt and its continuation may have together.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> room(SimpleNamespace(max_positions=99, sliding_window=None))
    99
    """
    if config.sliding_window is None:
        return config.max_positions
    return min(config.max_positions, config.sliding_window + 1)  # the last token is not read


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or _is_messages(prompt)


def _is_batch(prompt: Any) -> bool:
    """Whether it is a list of prompts: texts, messages or tokens."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return isinstance(prompt[0], str | list | tuple) or np.ndim(prompt[0]) > 0


def _open(model: Generator, prompt: Any, settings: Settings, name: str = "prompt") -> Stream[Any]:
    """Check and encode a prompt, and return the stream of its continuation."""
    if settings.stops and not _is_text(prompt):
        raise ValueError(f"stop needs a text, but {name} is tokens")
    tokens = _prompt_tokens(model, prompt, name)
    _check_room(model.config, tokens.size, settings.max_new_tokens, name)
    progress = _Progress(tokens.size)
    if _is_text(prompt):
        return Stream(_text_pieces(model, tokens, settings, progress), progress)
    return Stream(_continuation(model, tokens, settings, progress), progress)


def _prompt_tokens(model: Generator, prompt: Any, name: str) -> NDArray[np.int32]:
    if _is_text(prompt):
        if model.tokenizer is None:
            raise ValueError(f"{name} is text, but the model has no tokenizer: give tokens")
        text = prompt if isinstance(prompt, str) else model.tokenizer.chat(prompt)
        tokens = model.tokenizer.encode(text)
    else:
        tokens = token_array(prompt, model.config.vocab_size, name=name)
    if not tokens.size:
        raise ValueError(f"{name} has no tokens: there is nothing to continue")
    return tokens


def _check_room(config: ModelConfig, size: int, max_new_tokens: int, name: str) -> None:
    if size + max_new_tokens > config.max_positions:
        raise ValueError(
            f"{name} has {size} tokens; with max_new_tokens = {max_new_tokens} this exceeds "
            f"the model's {config.max_positions} positions"
        )
    check_sliding_window(size + max_new_tokens - 1, config)  # the last is not read


def _text_pieces(
    model: Generator, prompt: NDArray[np.int32], settings: Settings, progress: _Progress
) -> Steps[str, None, None]:
    """Yield the text of a continuation up to the first stop; hold back what may begin one."""
    assert model.tokenizer is not None  # _prompt_tokens used it
    tokens = _continuation(model, prompt, settings, progress)
    held = ""
    for piece in model.tokenizer.stream(tokens, after=prompt, skip_special=True):
        held += piece
        ready, found = _before_stop(held, settings.stops)
        if ready:
            yield held[:ready]
        if found:
            progress.finish = "stop"
            return
        held = held[ready:]
    if held:
        yield held


def _before_stop(held: str, stops: list[str]) -> tuple[int, bool]:
    """Return the characters that can be shown, and whether a stop follows them.

    Ends are compared, so that the result does not depend on how a text is cut into pieces.
    """
    found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
    if found:
        return min(found)[1], True
    begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
    return len(held) - max(begun, default=0), False


def _continuation(
    model: Generator, prompt: NDArray[np.int32], settings: Settings, progress: _Progress
) -> Steps[int, None, None]:
    """Yield new tokens until an end token, which is left out, or until there are enough."""
    ends = {*model.config.eos_token_ids, *(model.tokenizer.eos_ids if model.tokenizer else ())}
    generator = np.random.default_rng(settings.seed)
    most = prompt.size + settings.max_new_tokens
    cache = model.new_cache(most - 1, bits=settings.cache_bits)
    tokens = np.concatenate([prompt, np.empty(settings.max_new_tokens, np.int32)])
    read = 0
    for known in range(prompt.size, most):
        logits = model.step(tokens[read:known], cache)
        read = known
        token = settings.choose(logits, tokens[:known], generator)
        progress.tokens += 1
        if token in ends:
            progress.finish = "stop"
            return
        tokens[known] = token
        yield token
    progress.finish = "length"


def _handed_on(items: Iterator[Any], on_token: Callable[[Any], object] | None) -> Iterator[Any]:
    for item in items:
        if on_token is not None:
            on_token(item)
        yield item


def _collected(pieces: Iterator[Any], text: bool) -> Any:
    return "".join(pieces) if text else np.array(list(pieces), dtype=np.int32)
