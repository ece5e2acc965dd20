"""Tokenizers as GGUF metadata.

A GGUF file names the rule that cuts text instead of describing it. The name is found by trial: of
the rules that have one, the first that cuts a text with traps into the same pieces and tokens.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from lowbitq._core import FormatError
from lowbitq.models.vocabulary import PRE_TOKENIZERS, Vocabulary, vocabulary_from_gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}

# Where the known rules differ: contractions, digits, case, runs of blanks and of line breaks,
# punctuation beside letters, marks, and characters that NFC changes.
_PROBE = (
    "I'm, you'LL, they've 3 33 333 4444 55555 - don't CamelCaseWORDSandwords x=1;y<2>3|4~5^6$7+8\n"
    "\n\n  two  blanks\tand\t\ttabs \r\n \n   end...!? (a)[b]{c} http://a.b/c?d=e&f=g #tag @you\n"
    "Grüße, naïve, Ångström, cafe\u0301, Ελλάδα, Русский, 日本語, 한국어, हिन्दी, ١٢٣, Ⅷ½²\n"
    "\u00a0\u3000\u2009 \U0001f600\U0001f44d\U0001f3fd\u200d a_b__c ''quoted'' /path/to/file.txt\n"
    " leading and trailing "
)


def vocabulary_to_gguf(vocabulary: Vocabulary, size: int, source: str) -> dict[str, Any]:
    """Return metadata from which `vocabulary_from_gguf` and llama.cpp build the tokenizer.

    Parameters
    ----------
    vocabulary : Vocabulary
    size : int
        Number of tokens; those without a name are unused.
    source : str
        Its name in error messages.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the tokenizer is of another kind than byte-level or SentencePiece BPE, or cuts text by a
        rule that has no name in GGUF files.
    """
    backend = vocabulary.backend
    model = json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{source} is a {model.get('type')} tokenizer, expected BPE")
    tokens, types = _tokens(backend, size)
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": vocabulary.adds_bos,
        **_named(vocabulary),
    }
    if vocabulary.chat_template is not None:
        metadata["tokenizer.chat_template"] = vocabulary.chat_template
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        candidates = _sentencepiece(tokens, types, pairs)
    else:
        candidates = [
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
            }
            for name in sorted(PRE_TOKENIZERS, key="default".__eq__)  # that one last
        ]
    expected = _cut(backend)
    for candidate in candidates:
        found = metadata | candidate
        try:
            read = vocabulary_from_gguf(found, source)
        except FormatError:
            continue
        if _cut(read.backend) == expected:
            # Most ends of text are found by name; GGUF has keys for two others.
            others = [index for index in vocabulary.eos_ids if index not in read.eos_ids]
            keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
            return found | dict(zip(keys, others, strict=False))
    raise ValueError(
        f"{source} cuts text by a rule that has no name in GGUF files; known: "
        f"{', '.join(PRE_TOKENIZERS)}, and SentencePiece"
    )


def _cut(backend: Tokenizer) -> tuple[list[Any], list[int]]:
    """Return the pieces and the tokens of the probe; SentencePiece has no pieces."""
    text, cutter = _PROBE, backend.pre_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    # A SentencePiece vocabulary may replace spaces here or in the normalizer: no difference.
    spaces_only = json.loads(backend.to_str())["model"].get("byte_fallback")
    pieces = [] if cutter is None or spaces_only else cutter.pre_tokenize_str(text)
    return pieces, backend.encode(_PROBE, add_special_tokens=False).ids


def _tokens(backend: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Return the strings and the types of tokens 0 to size - 1."""
    tokens = [f"[UNUSED_{i}]" for i in range(size)]
    types = [_UNUSED] * size
    for token, index in backend.get_vocab().items():
        tokens[index], types[index] = token, _NORMAL
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = _BYTE
    for index, added in backend.get_added_tokens_decoder().items():
        types[index] = _CONTROL if added.special else _USER_DEFINED
    return tokens, types


def _named(vocabulary: Vocabulary) -> dict[str, int]:
    """Return the tokens with a role, by their keys in the file."""
    number = vocabulary.backend.token_to_id
    roles = {role: number(name) for role, name in vocabulary.names.items() if role in _ROLES}
    found = {_ROLES[role]: index for role, index in roles.items() if index is not None}
    if vocabulary.eos_ids:
        found.setdefault("eos", vocabulary.eos_ids[0])
    return {f"tokenizer.ggml.{key}_token_id": index for key, index in found.items()}


def _sentencepiece(
    tokens: list[str], types: list[int], merges: list[list[str]]
) -> list[dict[str, Any]]:
    """Return metadata with and without a space before the first word.

    The score of a piece is the place of the first merge that makes it, because the merges of
    tokenizer.json are sorted by it.
    """
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), place)
    last = len(merges)
    scores = [-float(places.get(token, last)) for token in tokens]
    types = [
        _UNKNOWN if token == "<unk>" and type == _CONTROL else type
        for token, type in zip(tokens, types, strict=True)
    ]
    return [
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
        for prefix in (True, False)
    ]
