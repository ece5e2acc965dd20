"""Text to windows: turn text in any form into tokens, and tokens into windows."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.models.config import ModelConfig
from lowbitq.models.tokenizer import Tokenizer
from lowbitq.models.tokens import check_count, check_sliding_window, token_array

Part = str | os.PathLike[str]
Record = Mapping[str, Any]
Text = (
    Part | Iterable[Part | Record] | Sequence[int] | Sequence[Sequence[int]]
    | NDArray[np.integer[Any]]
)  # fmt: skip

_PARTS = (str, os.PathLike, Mapping)  # those that are not tokens
_FORMS = "str, path, an iterable of them or of mappings with a text, or array of int"

# A path is one word with a slash, or one line that ends in a suffix; nobody calibrates on such
# prose. File names have at most 255 bytes, and some languages are written without spaces.
_PATH_LIKE = re.compile(r"\S*/\S*|.*\.[A-Za-z]\w{0,9}", re.ASCII)
_LONGEST_NAME = 255


def windows(
    tokenizer: Tokenizer | None,
    text: Text,
    *,
    samples: int = 128,
    window: int = 2048,
    seed: int = 0,
    config: ModelConfig | None = None,
) -> NDArray[np.int32]:
    """Cut a text into windows at random positions, spread evenly over it.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None is allowed if `text` is tokens.
    text : str, path, iterable of str, of paths or of mappings, or array_like of int
        The text itself; the path of a UTF-8 file, or of a ``.jsonl`` file with a ``"text"`` in each
        line; several texts or files, joined by an empty line; mappings with a ``"text"``, such as
        the rows of a Hugging Face dataset; or tokens: one long row, or finished windows of shape
        (samples, window). `plain_text` says which str is a path. Iterators are read to their end.
    samples, window : int
        Number of windows, and tokens per window. If the tokenizer begins texts with a special
        token, each window begins with it. A text with fewer than ``samples * window`` tokens gives
        as many windows as fit without overlap, and a warning.
    seed : int, default=0
        The same seed gives the same tokens.
    config : ModelConfig, default=None
        Configuration of the model that will read the windows: tokens must be in its vocabulary, and
        `window` must not exceed its positions. None: not checked.

    Returns
    -------
    ndarray of shape (samples, window), int32

    Raises
    ------
    ValueError
        If the text is empty or shorter than one window, the windows are longer than the model's
        positions, or a token is not in its vocabulary.
    TypeError
        If `text` is none of the above, or tokens are not integers.
    OSError, FormatError
        If a file cannot be read or is not in UTF-8.

    Examples
    --------
    >>> windows(None, np.arange(100), samples=2, window=4, seed=1)
    array([[24, 25, 26, 27],
           [94, 95, 96, 97]], dtype=int32)
    """
    check_count("samples", samples, 1)
    check_count("window", window, 2)
    check_count("seed", seed, 0)
    vocab_size = None if config is None else config.vocab_size
    text = settled(text)
    tokens = tokenize(tokenizer, text, vocab_size, axes=(1, 2))
    given = tokens.ndim == 2
    if given and (len(tokens) < 1 or tokens.shape[1] < 2):
        raise ValueError(
            f"text has shape {tokens.shape}, expected at least one window of at least 2 tokens"
        )
    if config is not None:
        length = tokens.shape[1] if given else window
        check_positions(length, config)
        check_sliding_window(length, config)
    if given:
        return tokens
    if tokenizer is None or not tokenizer.adds_bos or is_tokens(text):
        return tokens[_places(len(tokens), samples, window, seed)]
    # Each window gets its own BOS; the one at the start of the text is in no window.
    bos = tokenizer.bos_id
    assert bos is not None
    begun = int(tokens[:1].tolist() == [bos])
    places = _places(len(tokens), samples, window, seed, begun=begun, own=1)
    return np.insert(tokens[places], 0, bos, axis=1)


def _places(
    count: int, samples: int, window: int, seed: int, *, begun: int = 0, own: int = 0
) -> NDArray[np.int64]:
    """Choose the windows of a text of `count` tokens; they leave out the tokens before `begun`.

    Returns
    -------
    ndarray of shape (samples, window - own), int64
        Positions of their tokens; fewer samples, with a warning, if the text is short.
    """
    length = window - own
    room = (count - begun) // length
    if room < 1:
        raise ValueError(
            f"text has {count} tokens, fewer than one window of {window}: "
            "give a longer text or a smaller window"
        )
    last = count - length
    if samples <= room:
        # The possible starts are cut into `samples` equal parts; one window starts in each.
        parts = np.arange(samples) + np.random.default_rng(seed).random(samples)
        starts = np.maximum((parts * (last + 1) / samples).astype(np.int64), begun)
    else:
        warnings.warn(
            f"text has {count} tokens, but {samples} windows of {window} need {samples * window}: "
            f"only the {room} windows that fit are used; give a longer text or "
            f"samples={room}",
            stacklevel=4,
        )
        starts = begun + np.arange(room) * (last - begun) // max(room - 1, 1)
    return starts[:, None] + np.arange(length)


def check_positions(window: int, config: ModelConfig, *, of: str = "model") -> None:
    """Raise ValueError if windows are longer than the positions of a model."""
    if window > config.max_positions:
        raise ValueError(
            f"window is {window}, but the {of} has {config.max_positions} positions: "
            f"give window={config.max_positions} or less"
        )


def settled(text: Text) -> Text:
    """Return a text that can be read more than once: the items of an iterator in a list."""
    given: Any = text
    once = isinstance(given, Iterable) and not isinstance(given, Sequence | Mapping | Set)
    if not once or hasattr(given, "__array__") or hasattr(given, "read"):
        return text
    return list(given)


def is_tokens(text: Text) -> bool:
    """Whether a `settled` text is given as tokens: an array, or a sequence without other items."""
    if isinstance(text, str | bytes | bytearray | memoryview):  # sequences, and np.str_ an array
        return False
    if isinstance(text, Sequence):
        return len(text) > 0 and not any(isinstance(part, _PARTS) for part in text)
    return hasattr(text, "__array__")


def tokenize(
    tokenizer: Tokenizer | None,
    text: Text,
    vocab_size: int | None = None,
    *,
    axes: Sequence[int] = (1,),
) -> NDArray[np.int32]:
    """Return the tokens of a text in any form that `windows` accepts.

    Parameters
    ----------
    tokenizer, text
        As for `windows`.
    vocab_size : int, default=None
        Vocabulary size of the model; every token must be below it.
    axes : sequence of int, default=(1,)
        Allowed numbers of axes of given tokens.

    Returns
    -------
    ndarray of shape (t,), or of the shape of the given tokens, int32
    """
    text = settled(text)
    if is_tokens(text):
        return token_array(text, vocab_size, name="text", axes=axes)
    plain = plain_text(text)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: give tokens instead of text")
    return token_array(tokenizer.encode(plain), vocab_size, name="text")


def plain_text(text: Text) -> str:
    """Return a text as one str; it must not be given as tokens.

    Parameters
    ----------
    text : str, path, or iterable of them or of mappings
        A str is a path if a file of that name exists, or if it has at most 255 characters and is
        one word with a slash or one line that ends in a suffix, such as ``wiki.test.raw``. Any
        other str is the text itself, and so is every str that ends with a line break. An iterable
        holds paths if all of its strs are paths, else texts. Of mappings, the value of ``"text"``
        is the text.

    Returns
    -------
    str
        The texts, with an empty line between them.

    Raises
    ------
    TypeError
        If `text` is something else.
    ValueError
        If it is blank, or a mapping has no ``"text"``.
    OSError, FormatError
        As for `read_text`.

    Examples
    --------
    >>> plain_text([{"text": "One.", "id": 7}, {"text": "Two."}])
    'One.\\n\\nTwo.'
    """
    parts = _parts(text)
    paths = all(_is_path(part) for part in parts)
    joined = "\n\n".join(
        part if isinstance(part, str) and not paths else _text_of(part, number)
        for number, part in enumerate(parts)
    )
    if not joined.strip():
        raise ValueError("text is empty")
    return joined


def _parts(text: Text) -> list[Part | Record]:
    """Return the texts, paths and mappings of a text."""
    if isinstance(text, str | os.PathLike):
        return [text]
    given: Any = settled(text)
    if not isinstance(given, Sequence) or not all(isinstance(part, _PARTS) for part in given):
        raise TypeError(f"text is {type(text).__name__}, expected {_FORMS}")
    return list(given)


def _text_of(part: Part | Record, number: int) -> str:
    """Return the text of a mapping or of a file."""
    return _in_record(part, f"text[{number}]") if isinstance(part, Mapping) else read_text(part)


def _in_record(record: Record, where: str) -> str:
    """Return the text of a mapping; `where` begins error messages."""
    if "text" not in record:
        keys = ", ".join(map(repr, record)) or "nothing"
        raise ValueError(f"{where} has no 'text', but {keys:.200}")
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f"{where} has a 'text' that is {type(text).__name__}, expected str")
    return text


def _is_path(part: Part | Record) -> bool:
    if not isinstance(part, str) or os.path.exists(part):
        return not isinstance(part, Mapping)
    return len(part) <= _LONGEST_NAME and _PATH_LIKE.fullmatch(part) is not None


def read_text(path: Part) -> str:
    """Read a file in UTF-8; line ends become ``\\n``.

    Parameters
    ----------
    path : str or path
        Of a ``.jsonl`` file, the texts under ``"text"`` in the object of each line are read, with
        an empty line between them.

    Returns
    -------
    str

    Raises
    ------
    OSError
        If it cannot be read.
    FormatError
        If it is not in UTF-8, with the byte offset, or a line is not JSON, with its number.
    ValueError
        If the file is empty, or an object has no ``"text"``.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        remedy = "; if this is the text itself, end it with a line break"
        raise FileNotFoundError(
            f"{path}: no such file{remedy if isinstance(path, str) else ''}"
        ) from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start}: not UTF-8") from error
    except ValueError as error:  # a NUL or half of a surrogate pair in the name
        raise ValueError(f"{os.fspath(path)!r} cannot be the name of a file: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    if Path(path).suffix == ".jsonl":
        return "\n\n".join(_lines(text, path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str, path: Part) -> Iterator[str]:
    """Yield the text in each line of JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise FormatError(f"{where}: not a JSON object, but {type(record).__name__}")
        yield _in_record(record, where)


@dataclass(frozen=True)
class Texts:
    """A text to calibrate on and a text to predict, with a description of each, and a warning."""

    calibration: str
    held_out: str
    calibrated_on: str
    predicted: str
    warning: str = ""


def read_texts(path: Path | None, *, halves: bool = False) -> Texts:
    """Read texts from a file (its halves, or all of it twice), LOWBITQ_DATA or Python's help."""
    if path is not None:
        text = read_text(path)
        if not halves:
            return Texts(text, text, str(path), str(path))
        middle = len(text) // 2
        return Texts(
            text[:middle], text[middle:], f"the first half of {path}", f"the second half of {path}"
        )
    folder = os.environ.get("LOWBITQ_DATA")
    if folder:
        names = "wikitext2-valid.txt", "wikitext2-test.txt"
        calibration, held_out = (read_text(Path(folder) / name) for name in names)
        return Texts(calibration, held_out, *names)
    return fallback_texts()


FALLBACK = (
    "no text is given, so topics of Python's help are used: English about one language, with code; "
    "give a text like those that the model will read"
)


def fallback_texts() -> Texts:
    """Return English that every machine has: the topics of Python's help, in two halves.

    Returns
    -------
    Texts
        About 60,000 tokens to calibrate on and 40,000 to predict. A fifth of the paragraphs occur
        in several topics; the second half leaves out paragraphs of the first.
    """
    from pydoc_data import topics

    paragraphs = [
        [paragraph.strip("\n") for paragraph in text.split("\n\n")]
        for _, text in sorted(topics.topics.items())
    ]
    first = [paragraph for topic in paragraphs[::2] for paragraph in topic]
    second = [paragraph for topic in paragraphs[1::2] for paragraph in topic]
    seen = set(first)
    return Texts(
        "\n\n".join(first),
        "\n\n".join(paragraph for paragraph in second if paragraph not in seen),
        "one half of Python's help topics",
        "the other half of Python's help topics",
        FALLBACK,
    )
