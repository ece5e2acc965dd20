"""Text to tokens and back, as the model's publishers do it.

The `tokenizers` package does the work. This module builds its tokenizer (from a Hugging Face folder
or GGUF metadata), decides what begins and ends a text, and reports damaged files.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import ArrayLike, NDArray
from tokenizers import processors

from lowbitq._core import FormatError
from lowbitq.checkpoints.packed import PackedFolder
from lowbitq.models.tokenizer_folder import vocabulary_from_folder
from lowbitq.models.vocabulary import Vocabulary, refusing, surroundings, vocabulary_from_gguf
from lowbitq.models.vocabulary_gguf import vocabulary_to_gguf

# Decoding writes this for bytes that are not, or not yet, a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

# Characters that take about 0.1 s to encode.
_LONG = 100_000


class Tokenizer:
    """Text to token numbers and back.

    Made by `from_folder` or `from_gguf`; the constructor is for tokenizers built in memory.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        Its padding and truncation are switched off, and its post-processor is set to match
        `adds_bos`.
    names : mapping, default=None
        Strings of the tokens with a role, for chat templates: ``bos_token``, ``eos_token``,
        ``unk_token``, ``pad_token`` and others whose key ends in ``_token``.
    eos_ids : iterable of int, default=()
        Tokens that end a text, the main one first.
    adds_bos : bool, default=False
        Whether `encode` begins a text with ``bos_token``.
    chat_template : str, default=None
        A Jinja template.
    source : str, default="tokenizer"
        Its name in error messages.

    Attributes
    ----------
    bos_id : int or None
    eos_ids : tuple of int
    adds_bos : bool
    chat_template : str or None
    vocab_size : int

    Raises
    ------
    FormatError
        If a named token is not in the vocabulary, two tokens have the same number, or numbers far
        exceed the count of tokens.

    Examples
    --------
    >>> from tokenizers import Tokenizer as Backend, models
    >>> words = Backend(models.WordLevel({"low": 0, "bit": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = Tokenizer(words, names={"bos_token": "?"}, adds_bos=True)
    >>> tokenizer.encode("low bit").tolist()
    [2, 0, 1]
    >>> tokenizer.decode([0, 1])
    'low bit'
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        names: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        adds_bos: bool = False,
        chat_template: str | None = None,
        source: str = "tokenizer",
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._source = source
        self._names = dict(names or {})
        self.chat_template = chat_template
        self.vocab_size: int = _size(backend, source)
        self.bos_id = self._named("bos_token")
        self.adds_bos = adds_bos
        if adds_bos and self.bos_id is None:
            raise FormatError(f"{source}: texts begin with bos_token, but no bos_token is named")
        self._set_post_processor()
        eos = self._named("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys(([] if eos is None else [eos]) + list(eos_ids))
        )
        if any(not 0 <= token < 2**31 for token in self.eos_ids):
            raise FormatError(f"{source}: eos_ids are {list(self.eos_ids)}, expected 0 to 2^31 - 1")

    @classmethod
    def from_folder(cls, path: str | Path | PackedFolder) -> Tokenizer:
        """Read the tokenizer of a Hugging Face folder or of a saved lowbitq model.

        Parameters
        ----------
        path : str, Path or PackedFolder
            A folder with ``tokenizer.json``, which also decides whether a text begins with
            ``bos_token``. Optional files: ``tokenizer_config.json`` and, if that has no
            ``added_tokens_decoder``, ``special_tokens_map.json`` and ``added_tokens.json`` (tokens
            with a role, special and added tokens); ``chat_template.jinja``;
            ``generation_config.json`` (all tokens that end an answer).

        Returns
        -------
        Tokenizer

        Raises
        ------
        FileNotFoundError
            If there is no ``tokenizer.json``.
        FormatError
            If a file is damaged (the message names it and, for broken JSON, the byte offset), or if
            it has an unsupported key that may change tokens.

        Examples
        --------
        >>> import tempfile
        >>> from tokenizers import Tokenizer as Backend, models
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Tokenizer(Backend(models.WordLevel({"hi": 0}))).save(folder)
        ...     Tokenizer.from_folder(folder).encode("hi")
        array([0], dtype=int32)
        """
        folder = path if isinstance(path, PackedFolder) else Path(path)
        return cls._of(vocabulary_from_folder(folder), source=str(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> Tokenizer:
        """Build the tokenizer that a GGUF file describes.

        Parameters
        ----------
        metadata : mapping
            The file's keys; those that begin with ``tokenizer.`` are read: lists of str for tokens
            and merges, numbers for scores and token types.
        source : str, default="GGUF metadata"
            Its name in error messages, such as the file's path.

        Returns
        -------
        Tokenizer
            Byte-level BPE (``tokenizer.ggml.model`` is ``gpt2``) with the pre-tokenizer that
            ``tokenizer.ggml.pre`` names, or SentencePiece BPE (``llama``). A text ends at the
            file's end-of-text and end-of-turn tokens, and at control tokens with a common name such
            as ``<|endoftext|>``.

        Raises
        ------
        FormatError
            If a key is missing, damaged or of an unknown kind; the message lists the known ones.

        References
        ----------
        GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

        Examples
        --------
        >>> tokenizer = Tokenizer.from_gguf({
        ...     "tokenizer.ggml.model": "gpt2",
        ...     "tokenizer.ggml.pre": "smollm",
        ...     "tokenizer.ggml.tokens": ["<end>", "l", "o", "w", "lo", "low"],
        ...     "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
        ...     "tokenizer.ggml.merges": ["l o", "lo w"],
        ...     "tokenizer.ggml.eos_token_id": 0,
        ... })
        >>> tokenizer.encode("lowlo<end>").tolist()
        [5, 4, 0]
        >>> tokenizer.eos_ids
        (0,)
        """
        return cls._of(vocabulary_from_gguf(metadata, source), source=source)

    @classmethod
    def _of(cls, vocabulary: Vocabulary, *, source: str) -> Tokenizer:
        return cls(
            vocabulary.backend,
            names=vocabulary.names,
            eos_ids=vocabulary.eos_ids,
            adds_bos=vocabulary.adds_bos,
            chat_template=vocabulary.chat_template,
            source=source,
        )

    def encode(
        self, text: str, *, special: bool = True, add_bos: bool | None = None
    ) -> NDArray[np.int32]:
        """Turn a text into tokens.

        Parameters
        ----------
        text : str
        special : bool, default=True
            Whether strings like ``<|im_end|>`` in the text become the tokens of that name, as in
            `transformers`. False keeps them as text, for untrusted input.
        add_bos : bool, default=None
            Whether the tokens begin with `bos_id`. None: if `adds_bos` is true and the text does
            not already begin with it, as the result of `chat` may.

        Returns
        -------
        ndarray of shape (t,), int32
            No end token is added.

        Raises
        ------
        TypeError
            If `text` is not a string.
        ValueError
            If `text` has half of a surrogate pair, or `add_bos` is true but there is no BOS token.

        Examples
        --------
        >>> from tokenizers import Tokenizer as Backend, models
        >>> Tokenizer(Backend(models.WordLevel({"hi": 0}))).encode("hi")
        array([0], dtype=int32)
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected str")
        if add_bos and self.bos_id is None:
            raise ValueError(f"add_bos is true, but {self._source} names no bos_token")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has half of a surrogate pair at character {error.start}"
            ) from error
        backend = self._backend if special else self._plain
        with refusing(self._source):
            tokens = _encode(backend, text)
        if add_bos is None:
            add_bos = self.adds_bos and tokens[:1] != [self.bos_id]
        return np.array([self.bos_id, *tokens] if add_bos else tokens, dtype=np.int32)

    def decode(self, tokens: ArrayLike, *, skip_special: bool = False) -> str:
        """Turn tokens into text.

        Parameters
        ----------
        tokens : array_like of shape (t,), integer
            Numbers without a token decode to nothing, because models pad their embedding.
        skip_special : bool, default=False
            Leave out tokens such as ``<|im_end|>``.

        Returns
        -------
        str
            Bytes that are not a character become U+FFFD. Spaces before punctuation are kept.

        Raises
        ------
        TypeError
            If `tokens` are not integers.
        ValueError
            If `tokens` is not one-dimensional or has a negative number.

        Examples
        --------
        >>> from tokenizers import Tokenizer as Backend, models
        >>> Tokenizer(Backend(models.WordLevel({"hi": 0}))).decode([0, 0])
        'hi hi'
        """
        array = np.asarray(tokens)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"tokens are {array.dtype}, expected integers")
        if array.ndim != 1:
            raise ValueError(f"tokens have shape {array.shape}, expected one dimension")
        if array.size and (array.min() < 0 or array.max() >= 2**31):
            raise ValueError(
                f"tokens range from {array.min()} to {array.max()}, expected 0 to 2^31 - 1"
            )
        with refusing(self._source):
            return self._backend.decode(array.tolist(), skip_special_tokens=skip_special)

    def vocabulary(self) -> dict[str, int]:
        """Return all tokens, including added ones.

        Returns
        -------
        dict of str to int
            The number of each token, by its string.

        Examples
        --------
        >>> from tokenizers import Tokenizer as Backend, models
        >>> Tokenizer(Backend(models.WordLevel({"hi": 0}))).vocabulary()
        {'hi': 0}
        """
        with refusing(self._source):
            return self._backend.get_vocab()

    def stream(
        self, tokens: Iterable[int], *, after: ArrayLike = (), skip_special: bool = False
    ) -> Iterator[str]:
        """Decode tokens as they arrive; yield each piece once its characters are complete.

        Parameters
        ----------
        tokens : iterable of int
        after : array_like of shape (t,), integer, default=()
            Preceding tokens: they decide whether the first word keeps its space.
        skip_special : bool, default=False
            Leave out tokens such as ``<|im_end|>``.

        Yields
        ------
        str
            Non-empty pieces. Joined, they equal the result of `decode` for complete characters.

        Examples
        --------
        >>> from tokenizers import Tokenizer as Backend, models
        >>> tokenizer = Tokenizer(Backend(models.WordLevel({"hi": 0, "you": 1})))
        >>> list(tokenizer.stream([0, 1]))
        ['hi', ' you']
        """
        before = np.asarray(after, dtype=np.int64).tolist()
        known, waiting = self.decode(before, skip_special=skip_special), []
        for token in tokens:
            waiting.append(int(token))
            text = self.decode([*before, *waiting], skip_special=skip_special)
            if text.endswith(_INCOMPLETE):
                continue
            piece = text[len(known) :]
            # The tokens of this piece are enough context for the next, unless they show nothing.
            shown = self.decode(waiting, skip_special=skip_special)
            before, known = (waiting, shown) if shown else ([*before, *waiting], text)
            waiting = []
            if piece:
                yield piece
        if waiting:
            piece = self.decode([*before, *waiting], skip_special=skip_special)[len(known) :]
            if piece:
                yield piece

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a conversation in the format that the model was trained on.

        Parameters
        ----------
        messages : sequence of mappings
            Each with ``"role"`` ("system", "user", "assistant") and ``"content"``.
        add_generation_prompt : bool, default=True
            End with the words that open the assistant's turn.
        **variables
            Other variables of the template, such as ``enable_thinking`` of Qwen3.

        Returns
        -------
        str
            Input for `encode`, which recognises the special tokens in it.

        Raises
        ------
        ValueError
            If there is no chat template, or it refuses the conversation.
        FormatError
            If the template itself is malformed.

        Examples
        --------
        >>> from tokenizers import Tokenizer as Backend, models
        >>> tokenizer = Tokenizer(
        ...     Backend(models.WordLevel({"hi": 0})),
        ...     chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
        ... )
        >>> tokenizer.chat([{"role": "user", "content": "hi"}])
        '[user] hi'
        """
        if self.chat_template is None:
            raise ValueError(f"{self._source} has no chat template: give a plain prompt instead")
        from lowbitq.models.chat import render_chat  # here, because Jinja takes long to import

        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=self._names | variables,
        )

    def save(self, folder: str | Path) -> None:
        """Write the files that `from_folder` and `transformers` read.

        Parameters
        ----------
        folder : str or Path
            Created if it is missing. ``tokenizer.json``, ``tokenizer_config.json``,
            ``generation_config.json`` and, if there is a template, ``chat_template.jinja`` are
            overwritten. ``special_tokens_map.json`` and ``added_tokens.json``, which could
            contradict them, are removed.

        Examples
        --------
        >>> import tempfile
        >>> from tokenizers import Tokenizer as Backend, models
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Tokenizer(Backend(models.WordLevel({"hi": 0}))).save(folder)
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
            "added_tokens_decoder": {},  # tokenizer.json has them all, with the right flags
            **self._names,
        }
        generation = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids)}
        with refusing(self._source):
            backend = self._backend.to_str()
        _write(folder / "tokenizer.json", backend)
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
        _write(folder / "generation_config.json", json.dumps(generation, indent=2))
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)
        template = folder / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            _write(template, self.chat_template)

    def to_gguf(self, size: int | None = None) -> dict[str, Any]:
        """Return the metadata of a GGUF file that `from_gguf` and llama.cpp read.

        Parameters
        ----------
        size : int, default=None
            Number of tokens, padded with unused ones. None: `vocab_size`.

        Raises
        ------
        ValueError
            If GGUF has no name for the rule by which the tokenizer cuts text.
        """
        known = (self._names, self.eos_ids, self.adds_bos, self.chat_template)
        size = self.vocab_size if size is None else size
        return vocabulary_to_gguf(Vocabulary(self._backend, *known), size, self._source)

    def __getstate__(self) -> dict[str, Any]:
        # A copied backend loses `encode_special_tokens`, so a copy makes its own `_plain`.
        return {name: value for name, value in vars(self).items() if name != "_plain"}

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self._source}: {self.vocab_size} tokens, bos_id={self.bos_id}, "
            f"eos_ids={self.eos_ids}, adds_bos={self.adds_bos})"
        )

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that ignores special tokens; a copy, because the switch is the object's state."""
        backend = copy.deepcopy(self._backend)
        backend.encode_special_tokens = True
        return backend

    def _set_post_processor(self) -> None:
        """Make the post-processor, which decides in the saved files, match `adds_bos`."""
        before = [self._names["bos_token"]] if self.adds_bos else []
        if surroundings(self._backend, self._source) != (before, []):
            self._backend.post_processor = processors.TemplateProcessing(
                single=[*before, "$A"], special_tokens=[(name, self.bos_id) for name in before]
            )

    def _named(self, role: str) -> int | None:
        name = self._names.get(role)
        if name is None:
            return None
        with refusing(f"{self._source}: {role}"):
            token: int | None = self._backend.token_to_id(name)
        if token is None:
            raise FormatError(f"{self._source}: {role} {name!r} is not in the vocabulary")
        return token


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text; Ctrl-C need not wait for those of a long one.

    The package looks for no signals, so that another thread has to do the work.
    """
    found: list[list[int] | BaseException] = []

    def work() -> None:
        try:
            found.append(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        except BaseException as error:  # its panics are no Exception
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        if started := len(text) >= _LONG:
            thread.start()
    except RuntimeError:  # the system has no room for another one
        started = False
    if started:
        thread.join()
    else:
        work()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _size(backend: tokenizers.Tokenizer, source: str) -> int:
    """Return one more than the maximum token number, which must fit the count of tokens."""
    with refusing(source):
        numbers = backend.get_vocab()
    size = 1 + max(numbers.values(), default=-1)
    if not numbers:
        raise FormatError(f"{source}: there are no tokens")
    # The tokenizers package visits every unused number when it copies or saves.
    if size > 4 * len(numbers) + 4096:
        raise FormatError(
            f"{source}: token numbers reach {size - 1}, too high for {len(numbers)} tokens"
        )
    if len(set(numbers.values())) < len(numbers):
        names: dict[int, str] = {}
        for name, number in sorted(numbers.items()):
            if (first := names.setdefault(number, name)) != name:
                raise FormatError(
                    f"{source}: tokens {first!r} and {name!r} both have number {number}"
                )
    return size


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
