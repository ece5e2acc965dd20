"""Tokenizers from GGUF metadata, built from the vocabulary as their publishers built them.

A GGUF file stores tokens, merges or scores, and the *name* of the rule that cuts text before
merging (``tokenizer.ggml.pre``). The rules here come from the models' own ``tokenizer.json``. They
matter: with the wrong rule, most text still encodes to plausible tokens, and the model is quietly
worse. An unknown name is therefore an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
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

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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
    """How text is cut before byte-level merging; expressions apply in turn."""

    splits: tuple[str, ...] = (_GPT2,)
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2_RULE = _Rule()
_SMOLLM_RULE = _Rule(single_digits=True)
_LLAMA3_RULE = _Rule(splits=(_LLAMA3,), ignore_merges=True, adds_bos=True)

PRE_TOKENIZERS: Mapping[str, _Rule] = {
    # llama.cpp's rule for files that predate the names.
    "default": _Rule((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_RULE,
    "smollm": _SMOLLM_RULE,
    "starcoder": _SMOLLM_RULE,
    "refact": _SMOLLM_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": _Rule(splits=(_QWEN2,), nfc=True),
    "tekken": _Rule(splits=(_TEKKEN,), ignore_merges=True, adds_bos=True),
}
"""Values of ``tokenizer.ggml.pre`` that byte-level vocabularies may have."""

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

# fmt: off
# GGUF has keys for one end of text and one end of turn, but chat models have up to three tokens
# that end an answer (their generation_config.json lists them). llama.cpp finds the rest by name,
# regardless of type (llama_vocab::impl::load); these are its names.
_END_NAMES = frozenset([
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
    "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
])
# Fill-in-the-middle tokens end a text too: the one from the file's key, or else the first of these
# names that is a token.
_GAP_NAMES = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

# Keys under ``tokenizer.`` that are read or harmless, besides those that end in _token_id.
_KNOWN = frozenset([
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.token_type_count",
    "ggml.scores", "ggml.merges", "ggml.add_bos_token", "chat_template", "chat_templates",
    "huggingface.json", "rwkv.world",
])
# fmt: on


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as described by its file.

    Attributes
    ----------
    backend : tokenizers.Tokenizer
    names : dict
        Strings of the tokens with a role, by key: ``bos_token`` and the like.
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


_PASSED_ON = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, FormatError)


class refusing:  # noqa: N801 (used as a statement: ``with refusing(where):``)
    """Turn any exception of the tokenizers package into a FormatError that names the place.

    The package raises plain `Exception`, and its Rust panics derive from `BaseException`. This is a
    class because a generator would also catch the GeneratorExit that can follow an interrupt.
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


# A post-processor is tried on its one token.
_PROBE = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))


def surroundings(backend: Tokenizer, source: str) -> tuple[list[str], list[str]]:
    """Return the tokens that the post-processor puts before and after a text."""
    with refusing(source):
        encoding = backend.post_process(_PROBE.encode("x"))
        at = encoding.special_tokens_mask.index(0)
        return encoding.tokens[:at], encoding.tokens[at + 1 :]


def vocabulary_from_gguf(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """Build the tokenizer that GGUF metadata describes; `Tokenizer.from_gguf` documents it."""
    fields = _Fields(metadata, source)
    kind = fields.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise FormatError(
            f"{source}: tokenizer.ggml.model is {kind!r}; known: 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece BPE)"
        )
    fields.refuse_unknown({"ggml.add_space_prefix"} if kind == "llama" else set())
    tokens = fields.tokens()
    types = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    named = {
        role: fields.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        for role, key in _ROLE_KEYS.items()
    }
    given = {index for index in named.values() if index is not None}
    if kind == "llama":  # llama.cpp's defaults
        for role, index in [("bos_token", 1), ("eos_token", 2)]:
            if named[role] is None and index < len(tokens):
                named[role] = index
    bos, eos = named["bos_token"], named["eos_token"]
    if kind == "gpt2":
        rule = _rule(fields)
        habit = rule.adds_bos
        backend = _byte_level(fields, tokens, rule)
    else:
        habit = True
        backend = _sentencepiece(fields, tokens, types, named["unk_token"])

    ends, special = _ends(fields, tokens, types, eos)
    special |= {index for index in (bos, eos) if index in given}
    user_defined = [i for i, t in enumerate(types) if t == _USER_DEFINED and i not in special]

    adds_bos = fields.flag("tokenizer.ggml.add_bos_token", habit and bos is not None)
    if adds_bos and bos is None:
        raise FormatError(
            f"{source}: tokenizer.ggml.add_bos_token is true without a tokenizer.ggml.bos_token_id"
        )
    with refusing(f"{source}: special tokens"):
        backend.add_special_tokens(
            [AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)]
        )
        backend.add_tokens([AddedToken(tokens[i], normalized=False) for i in user_defined])
    names = {role: tokens[i] for role, i in named.items() if i is not None}
    template = fields.text("tokenizer.chat_template", optional=True)
    return Vocabulary(backend, names, ends, adds_bos, template)


_ROLE_KEYS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def _ends(
    fields: _Fields, tokens: list[str], types: list[int], eos: int | None
) -> tuple[tuple[int, ...], set[int]]:
    """Return the tokens that end a text and the special tokens, as in llama.cpp."""
    ids = {
        key: fields.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        for key in ("eot", "eom", *_GAP_NAMES)
    }
    number = {token: index for index, token in enumerate(tokens)}
    by_name = sorted(number[name] for name in _END_NAMES if name in number)
    for key, known in _GAP_NAMES.items():
        if ids[key] is None:
            by_name += [number[name] for name in known if name in number][:1]
    ends = dict.fromkeys(i for i in [eos, ids["eot"], ids["eom"], *by_name] if i is not None)
    ends |= dict.fromkeys(i for i in ids.values() if i is not None)
    special = {i for i, t in enumerate(types) if t in (_CONTROL, _UNKNOWN)} | {*by_name}

    # In these families <|end|> ends a part of an answer, and </s> is ordinary text.
    names = {tokens[index] for index in ends}
    if names & {"<|call|>", "<|calls|>"} and names & {"<|return|>", "<|flush|>"}:
        ends.pop(number.get("<|end|>", -1), None)
    if names & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.pop(ordinary := number.get("</s>", -1), None)
        special.discard(ordinary)
    return tuple(ends), special


def _rule(fields: _Fields) -> _Rule:
    name = fields.text("tokenizer.ggml.pre", optional=True)
    if name is None or name not in PRE_TOKENIZERS:
        found = "missing" if name is None else repr(name)
        raise FormatError(
            f"{fields.source}: tokenizer.ggml.pre is {found}; known: {', '.join(PRE_TOKENIZERS)}. "
            "A tokenizer.json from the model's Hugging Face folder may have any rule"
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
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    fields: _Fields, tokens: list[str], types: list[int], unknown: int | None
) -> Tokenizer:
    """Build SentencePiece BPE as `transformers` converts it.

    SentencePiece merges the neighbours whose union has the best score; merges ranked by that score
    do the same. As in LLaMA 2's own tokenizer.json, a normalizer adds the space before the first
    word: a text that begins with a space keeps it, as in SentencePiece and llama.cpp.
    """
    key = "tokenizer.ggml.scores"
    scores = fields.numbers(key, len(tokens), required=True)
    reserved = {i for i, t in enumerate(types) if t in (_UNKNOWN, _CONTROL, _BYTE)}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pieces = {token: index for token, index in vocabulary.items() if index not in reserved}
    lengths = {len(piece) for piece in pieces}
    merges = [
        (scores[index], len(left), len(right), left, right)
        for piece, index in pieces.items()
        for left, right in _splits(piece, pieces, lengths)
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


def _splits(piece: str, pieces: Mapping[str, int], lengths: set[int]) -> list[tuple[str, str]]:
    """Return the pairs that merge into `piece`, in order of their numbers.

    Only lengths that occur are tried; all would take time quadratic in the length of a long token.
    """
    size = len(piece)
    cuts = range(1, size) if size <= len(lengths) else [cut for cut in lengths if cut < size]
    pairs = [(piece[:cut], piece[cut:]) for cut in cuts if cut in lengths and size - cut in lengths]
    found = [(left, right) for left, right in pairs if left in pieces and right in pieces]
    return sorted(found, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))


@dataclass(frozen=True)
class _Fields:
    """Typed access to metadata; every error names the key."""

    metadata: Mapping[str, Any]
    source: str

    def refuse_unknown(self, known: Set[str]) -> None:
        """Raise FormatError for an unsupported key that may change tokens."""
        for key, value in self.metadata.items():
            name = key.removeprefix("tokenizer.")
            if name == key or name in _KNOWN or name in known:
                continue
            if name.endswith("_token_id") or name.startswith("chat_template."):
                continue
            neutral = value is None or np.size(value) == 0 or (np.ndim(value) == 0 and not value)
            if not neutral:
                raise FormatError(f"{self.source}: {key} is {value!r:.60}, which is not supported")

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
