"""Tokenizers out of GGUF metadata, built from the vocabulary as their publishers built them.

A GGUF file stores tokens, merges or scores, and the *name* of the rule that cuts text before
merging (``tokenizer.ggml.pre``). The rules here are those of the models' own ``tokenizer.json``.
They matter: with another rule most text still encodes to plausible tokens, and the model is quietly
worse. A name that is not known is therefore an error and never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from lowbitq._core import FormatError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Rule:
    """How text is cut before byte-level merging; `split` None means GPT-2's expression."""

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2_RULE = _Rule()
_SMOLLM_RULE = _Rule(single_digits=True)
_LLAMA3_RULE = _Rule(split=_LLAMA3, ignore_merges=True, adds_bos=True)

PRE_TOKENIZERS: Mapping[str, _Rule] = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "smollm": _SMOLLM_RULE,
    "starcoder": _SMOLLM_RULE,
    "refact": _SMOLLM_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": _Rule(split=_QWEN2, nfc=True),
    "tekken": _Rule(split=_TEKKEN, ignore_merges=True, adds_bos=True),
}
"""Values of ``tokenizer.ggml.pre`` that byte-level vocabularies may have."""

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

# GGUF has room for one end of text and one end of turn, but chat models have up to three tokens
# that end an answer (their generation_config.json lists them). llama.cpp finds the rest by name.
_END_NAMES = frozenset(
    [
        "</s>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
    ]
)


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokenizer.

    Attributes
    ----------
    backend : tokenizers.Tokenizer
    names : dict
        Strings of ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``, where there are such.
    eos_ids : tuple of int
        Tokens that end a text.
    adds_bos : bool
        Whether a text begins with ``bos_token``.
    chat_template : str or None
    """

    backend: Tokenizer
    names: dict[str, str]
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None


class refusing:  # noqa: N801 (used as a statement: ``with refusing(where):``)
    """Turn whatever the tokenizers package raises into a FormatError that says where.

    The package raises plain `Exception`, and its Rust panics derive from `BaseException`. This is a
    class because a generator would also meet the GeneratorExit that can follow an interrupt.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, _PASSED_ON):
            raise FormatError(f"{self.where}: {error}") from error


_PROBE = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))


def surroundings(backend: Tokenizer, source: str) -> tuple[list[str], list[str]]:
    """Return the tokens that the post-processor puts before and after a text."""
    with refusing(source):
        encoding = backend.post_process(_PROBE.encode("x"))
        at = encoding.special_tokens_mask.index(0)
        return encoding.tokens[:at], encoding.tokens[at + 1 :]


_PASSED_ON = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, FormatError)


def vocabulary_from_gguf(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """Build the tokenizer that GGUF metadata describes; `Tokenizer.from_gguf` documents it."""
    fields = _Fields(metadata, source)
    kind = fields.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise FormatError(
            f"{source}: tokenizer.ggml.model is {kind!r}; known: 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece BPE)"
        )
    tokens = fields.tokens()
    types = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    roles = {
        name: fields.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        for name, key in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
            ("end of turn", "eot"),
            ("end of message", "eom"),
        ]
    }
    bos = roles["bos_token"]
    if kind == "gpt2":
        rule = _rule(fields)
        habit = rule.adds_bos
        backend = _byte_level(fields, tokens, rule)
    else:
        habit = True
        backend = _sentencepiece(fields, tokens, types, roles["unk_token"])

    control = {
        i for i, t in enumerate(types) if t == _CONTROL or (t == _UNKNOWN and kind == "llama")
    }
    ends = [roles["eos_token"], roles["end of turn"], roles["end of message"]]
    ends += [i for i in sorted(control) if tokens[i] in _END_NAMES]
    eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    control.update(eos_ids, [] if bos is None else [bos])
    user_defined = [i for i, t in enumerate(types) if t == _USER_DEFINED and i not in control]

    adds_bos = fields.flag("tokenizer.ggml.add_bos_token", habit and bos is not None)
    if adds_bos and bos is None:
        raise FormatError(
            f"{source}: tokenizer.ggml.add_bos_token is true without a tokenizer.ggml.bos_token_id"
        )
    with refusing(f"{source}: special tokens"):
        backend.add_special_tokens(
            [AddedToken(tokens[i], normalized=False, special=True) for i in sorted(control)]
        )
        backend.add_tokens([AddedToken(tokens[i], normalized=False) for i in user_defined])
    names = {
        name: tokens[i] for name, i in roles.items() if i is not None and name.endswith("_token")
    }
    template = fields.text("tokenizer.chat_template", optional=True)
    return Vocabulary(backend, names, eos_ids, adds_bos, template)


def _rule(fields: _Fields) -> _Rule:
    name = fields.text("tokenizer.ggml.pre", optional=True)
    if name is None or name not in PRE_TOKENIZERS:
        found = "missing" if name is None else repr(name)
        raise FormatError(
            f"{fields.source}: tokenizer.ggml.pre is {found}; known: {', '.join(PRE_TOKENIZERS)}. "
            "A tokenizer.json from the model's Hugging Face folder is read whatever its rule"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(fields: _Fields, tokens: list[str], rule: _Rule) -> Tokenizer:
    key = "tokenizer.ggml.merges"
    merges = []
    for index, merge in enumerate(fields.strings(key)):
        left, _, right = merge.partition(" ")
        if not (left and right):
            raise FormatError(f"{fields.source}: {key}[{index}] is {merge!r}, not two tokens")
        merges.append((left, right))
    with refusing(f"{fields.source}: {key}"):
        vocabulary = {token: index for index, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    fields: _Fields, tokens: list[str], types: list[int], unknown: int | None
) -> Tokenizer:
    """SentencePiece BPE as `transformers` converts it.

    SentencePiece merges the neighbours whose union has the best score; merges ranked by that score
    do the same. The space before the first word is put there by a normalizer, as in LLaMA 2's own
    tokenizer.json: a text that begins with a space keeps it, as in SentencePiece and llama.cpp.
    """
    key = "tokenizer.ggml.scores"
    scores = fields.numbers(key, len(tokens), required=True)
    reserved = {i for i, t in enumerate(types) if t in (_UNKNOWN, _CONTROL, _BYTE)}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (score, len(left), len(right), left, right)
        for token, index in vocabulary.items()
        if index not in reserved
        for score, left, right in _splits(token, scores[index], vocabulary, reserved)
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    if unknown is None:
        unknown = next((i for i, t in enumerate(types) if t == _UNKNOWN), None)
    with refusing(f"{fields.source}: {key}"):
        backend = Tokenizer(
            models.BPE(
                vocabulary,
                [merge[3:] for merge in merges],
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    words: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        words.append(decoders.Strip(content=" ", left=1))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(words)
    return backend


def _splits(
    token: str, score: float, vocabulary: Mapping[str, int], reserved: set[int]
) -> list[tuple[float, str, str]]:
    """The pairs of tokens that `token` can be merged from, in order of the tokens' numbers."""
    pairs = []
    for cut in range(1, len(token)):
        left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
        if left is None or right is None or left in reserved or right in reserved:
            continue
        pairs.append((left, right, cut))
    return [(score, token[:cut], token[cut:]) for _, _, cut in sorted(pairs)]


@dataclass(frozen=True)
class _Fields:
    """Typed access to metadata; every complaint names the key."""

    metadata: Mapping[str, Any]
    source: str

    def text(self, key: str, *, optional: bool = False) -> str | None:
        value = self.metadata.get(key)
        if isinstance(value, str) or (value is None and optional):
            return value
        raise self._wrong(key, "a string", value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        raise self._wrong(key, "true or false", value)

    def token_id(self, key: str, count: int) -> int | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if integer and 0 <= value < count:
            return int(value)
        raise self._wrong(key, f"a token below {count}", value)

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return list(value)
        raise self._wrong(key, "a list of strings", value)

    def tokens(self) -> list[str]:
        key = "tokenizer.ggml.tokens"
        tokens = self.strings(key)
        if not tokens:
            raise FormatError(f"{self.source}: {key} is empty")
        if len(set(tokens)) != len(tokens):
            first: dict[str, int] = {}
            twice = next(i for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
            raise FormatError(
                f"{self.source}: {key}[{twice}] is {tokens[twice]!r} again, "
                f"already token {first[tokens[twice]]}"
            )
        return tokens

    def numbers(self, key: str, count: int, *, required: bool = False) -> list[Any]:
        value = self.metadata.get(key)
        if value is None and not required:
            return []
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise self._wrong(key, f"{count} numbers", value) from error
        if (
            array.shape != (count,)
            or array.dtype.kind not in "biuf"
            or not np.isfinite(array).all()
        ):
            raise self._wrong(key, f"{count} finite numbers", value)
        return list(array.tolist())

    def _wrong(self, key: str, expected: str, found: Any) -> FormatError:
        shown = "missing" if found is None else f"{type(found).__name__} {found!r:.60}"
        return FormatError(f"{self.source}: {key} is {shown}; expected {expected}")
