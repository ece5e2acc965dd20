"""Tokenizers of Hugging Face folders, merged from their files as `transformers` 5 merges them.

``tokenizer.json`` defines how text is cut. The files beside it list tokens that have a role, are
special or are missing in it: ``tokenizer_config.json`` and, unless that has
``added_tokens_decoder``, ``special_tokens_map.json`` and ``added_tokens.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lowbitq._core import FormatError
from lowbitq.checkpoints.mapping import MappedFile
from lowbitq.checkpoints.packed import PackedEntry, PackedFolder
from lowbitq.models.vocabulary import Vocabulary, refusing, surroundings

# A folder on disk, or an open one through which files are read.
Folder = Path | PackedFolder
File = Path | PackedEntry

# Files of tokenizers in other forms, and files that go with them.
OTHER_FORMS = (
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "tokenizer_config.json",
)

# Keys of tokenizer_config.json that change neither tokens nor text here: class and file names,
# options for padding, truncation, training and conversion from SentencePiece, records. In
# `transformers` 5, tokenizer.json decides whether a text begins or ends with a token.
# fmt: off
_HARMLESS = frozenset([
    "add_bos_token", "add_eos_token", "added_tokens_decoder", "added_tokens_file",
    "additional_special_tokens", "backend", "cache_dir", "chat_control_tokens", "chat_template",
    "device_map", "dtype", "extra_special_tokens", "feature_extractor_type", "files_loaded",
    "from_slow", "image_processor_type", "init_inputs", "is_local", "legacy", "local_files_only",
    "max_len", "max_length", "max_position_embeddings", "merges_file", "min_length",
    "model_input_names", "model_max_length", "model_specific_special_tokens", "model_type",
    "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "pad_type_id", "padding",
    "padding_side", "processor_class", "response_schema", "response_template", "return_tensors",
    "return_token_type_ids", "revision", "slow_tokenizer_class", "spaces_between_special_tokens",
    "special_tokens_map_file", "stride", "tokenizer_class", "tokenizer_file", "tokenizer_type",
    "torch_dtype", "transformers_version", "truncation", "truncation_side", "truncation_strategy",
    "trust_remote_code", "use_default_system_prompt", "use_fast", "verbose", "vocab_file",
    "vocab_size",
])
# fmt: on
# Keys with one harmless value besides null, false and empty.
_NEUTRAL = {"errors": "replace", "fast_tokenizer_files": ["tokenizer.json"]}

# Classes that read add_prefix_space only from tokenizer.json.
_PLAIN_CLASSES = (None, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")

# Roles in the order in which their tokens are added; other roles follow.
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Default roles of a tokenizer_class: used if no file sets the role and the token exists.
_GPT2_ROLES = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
_QWEN2_ROLES = dict.fromkeys(["eos_token", "unk_token", "pad_token"], "<|endoftext|>")
_LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CLASS_ROLES = {
    "GPT2Tokenizer": _GPT2_ROLES,
    "Qwen2Tokenizer": _QWEN2_ROLES,
    "LlamaTokenizer": _LLAMA_ROLES,
    "CodeLlamaTokenizer": _LLAMA_ROLES,
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def vocabulary_from_folder(folder: Folder) -> Vocabulary:
    """Build the tokenizer of a folder; `Tokenizer.from_folder` documents it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        there = ", ".join(name for name in OTHER_FORMS if (folder / name).is_file())
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, the only form supported"
            + (f"; it has {there}: save the tokenizer with transformers" if there else "")
        )
    path = folder / "tokenizer_config.json"
    config = _read(path)
    description = _json(file)
    with refusing(str(file)):
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    backend.no_padding()  # a file may ask for more than the memory
    backend.no_truncation()
    _refuse_model_options(description, file)
    _refuse_unknown(config, backend, path)

    tokens = _merge(folder, config, description)
    vocabulary = backend.get_vocab()
    for role, content in _class_roles(config).items():
        if role not in tokens.roles and role not in config and content in vocabulary:
            tokens.roles[role] = _token(content, role)
    _add(backend, tokens)
    bos = _first_token(backend, tokens.roles.get("bos_token"), file)
    names = {role: token.content for role, token in tokens.roles.items()}
    return Vocabulary(
        backend,
        names if bos is None else names | {"bos_token": bos},
        _eos_ids(folder / "generation_config.json"),
        adds_bos=bos is not None,
        chat_template=_template(folder, config),
    )


def _json(path: File) -> dict[str, Any]:
    return path.json() if isinstance(path, PackedEntry) else MappedFile(path).json()


def _read(path: File) -> dict[str, Any]:
    """Return the JSON object in a file, empty if the file does not exist."""
    if not path.is_file():
        return {}
    value = _json(path)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{path}: a string has half of a surrogate pair") from error
    return value


def _refuse_model_options(description: Mapping[str, Any], file: File) -> None:
    model = description.get("model")
    dropout = model.get("dropout") if isinstance(model, dict) else None
    if dropout:
        raise FormatError(f"{file}: model.dropout is {dropout!r}: tokens would be random")


def _refuse_unknown(config: Mapping[str, Any], backend: tokenizers.Tokenizer, path: File) -> None:
    """Raise FormatError for an unsupported key that may change tokens or text."""
    for key, value in config.items():
        if value in (None, False, "", [], {}, _NEUTRAL.get(key)):
            continue
        if key in _HARMLESS or key.startswith("_") or key.endswith(("_token", "_token_id")):
            continue
        if key == "add_prefix_space" and _adds_space(backend):
            continue
        if key == "clean_up_tokenization_spaces" and isinstance(
            backend.model, tokenizers.models.BPE
        ):
            continue
        if key == "auto_map" and isinstance(value, dict) and not value.get("AutoTokenizer"):
            continue
        raise FormatError(f"{path}: {key} is {value!r:.60}, which is not supported")
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        if not isinstance(value := config.get(key), (bool, type(None))):
            raise FormatError(f"{path}: {key} is {value!r:.60}, expected true or false")
    if (
        config.get("add_prefix_space") is False
        and config.get("tokenizer_class") not in _PLAIN_CLASSES
        and _adds_space(backend)
    ):
        raise FormatError(
            f"{path}: add_prefix_space is false, but tokenizer.json puts a space before a text"
        )


def _adds_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokenizer puts something before the first word of a text."""
    text = backend.normalizer.normalize_str("x") if backend.normalizer else "x"
    if backend.pre_tokenizer:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return not text.startswith("x")


@dataclass
class _Tokens:
    """Tokens listed in the files beside the vocabulary.

    Attributes
    ----------
    roles : dict of str to AddedToken
        Tokens with a role, by key: ``bos_token`` and the like.
    extra : list of AddedToken
        Special tokens without a role.
    numbered : dict of int to AddedToken
        Tokens by number; they are added in that order.
    claims : list of (Path, str, int)
        A file, a token and the number that the file gives it.
    """

    roles: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    numbered: dict[int, AddedToken] = field(default_factory=dict)
    claims: list[tuple[File, str, int]] = field(default_factory=list)

    def claim(self, index: Any, token: AddedToken, path: File) -> int:
        if not str(index).isdecimal():
            raise FormatError(f"{path}: token {token.content!r} has number {index!r:.40}")
        self.claims.append((path, token.content, int(index)))
        return int(index)

    def set_roles(self, values: Mapping[str, Any], path: File, **flags: bool) -> None:
        for role, value in values.items():
            if value in (None, ""):
                self.roles.pop(role, None)
            else:
                self.roles[role] = _token(value, f"{path}: {role}", **flags)


def _merge(folder: Folder, config: Mapping[str, Any], description: Mapping[str, Any]) -> _Tokens:
    """Collect tokens in the order of `PreTrainedTokenizerBase._from_pretrained` (5.24)."""
    path = folder / "tokenizer_config.json"
    tokens = _Tokens()
    tokens.set_roles(_roles(config), path)
    _set_extra(tokens, config.get("model_specific_special_tokens") or {}, path)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    _set_extra(tokens, extra, path)
    described = _numbered(tokens, description.get("added_tokens") or [], folder / "tokenizer.json")
    if "added_tokens_decoder" in config:
        decoder = _object(config, "added_tokens_decoder", path)
        for index, value in decoder.items():
            token = _token(value, f"{path}: added_tokens_decoder")
            tokens.numbered[tokens.claim(index, token, path)] = token
    else:
        _merge_legacy(tokens, folder, config)
        tokens.numbered |= described
    # Other roles follow; those that tokenizer_config.json has as strings come last.
    own = {key for key, value in _roles(config).items() if isinstance(value, str)}
    order = [*_ROLES, *sorted(tokens.roles, key=own.__contains__)]
    tokens.roles = {role: tokens.roles[role] for role in order if role in tokens.roles}
    return tokens


def _numbered(tokens: _Tokens, added: list[Any], path: File) -> dict[int, AddedToken]:
    """Return the added tokens of tokenizer.json by number."""
    found = {}
    for value in added:
        token = _token(value, f"{path}: added_tokens")
        found[tokens.claim(value.get("id"), token, path)] = token
    return found


def _merge_legacy(tokens: _Tokens, folder: Folder, config: Mapping[str, Any]) -> None:
    """Merge the files that older versions of `transformers` wrote."""
    path = folder / "special_tokens_map.json"
    named = _read(path)
    kept = {key for key, value in _roles(config).items() if isinstance(value, str)} - {*_ROLES}
    roles = {role: value for role, value in _roles(named).items() if role not in kept}
    tokens.set_roles(roles, path, special=True)
    _set_extra(tokens, named.get("extra_special_tokens") or [], path, special=True)

    special = {token.content for role, token in tokens.roles.items() if role in _ROLES}
    special |= {token.content for token in tokens.extra}
    for content, index in _read(folder / "added_tokens.json").items():
        token = AddedToken(content, special=content in special, normalized=content not in special)
        tokens.numbered[tokens.claim(index, token, folder / "added_tokens.json")] = token

    lists = {"extra_special_tokens", "additional_special_tokens"} & config.keys()
    if not lists or isinstance(config.get("extra_special_tokens"), dict):
        _set_extra(tokens, named.get("additional_special_tokens") or [], path, special=True)


def _class_roles(config: Mapping[str, Any]) -> Mapping[str, str]:
    name = config.get("tokenizer_class")
    return _CLASS_ROLES.get(name.removesuffix("Fast"), {}) if isinstance(name, str) else {}


def _roles(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that give a token a role; add_bos_token and the like are flags."""
    return {
        key: value
        for key, value in values.items()
        if key.endswith("_token") and not isinstance(value, bool)
    }


def _set_extra(tokens: _Tokens, value: Any, path: File, **flags: bool) -> None:
    """Add special tokens from a list, or with their roles from an object."""
    if isinstance(value, dict):
        tokens.set_roles(value, path, **flags)
    elif isinstance(value, list):
        tokens.extra += [_token(item, f"{path}: special tokens", **flags) for item in value]
    else:
        raise FormatError(f"{path}: special tokens are {value!r:.60}, expected a list or an object")


def _object(values: Mapping[str, Any], key: str, path: File) -> dict[str, Any]:
    if isinstance(value := values[key], dict):
        return value
    raise FormatError(f"{path}: {key} is {value!r:.60}, expected an object")


def _token(value: Any, where: str, **flags: bool) -> AddedToken:
    """Return a token that is stored as a string or as an object with options."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise FormatError(f"{where} is {value!r:.60}, expected a string")
    options = {key: value[key] for key in _FLAGS if key in value} | flags
    unknown = value.keys() - {"content", "id", "__type", *_FLAGS}
    if unknown or not all(isinstance(option, bool) for option in options.values()):
        raise FormatError(
            f"{where} is {value!r:.120}, expected content and true or false for {', '.join(_FLAGS)}"
        )
    return AddedToken(value["content"], **options)


def _add(backend: tokenizers.Tokenizer, tokens: _Tokens) -> None:
    """Add the tokens as `TokenizersBackend.__init__` does, and check that their numbers fit."""
    before = backend.get_added_tokens_decoder().values()
    added = [tokens.numbered[index] for index in sorted(tokens.numbered)]
    known = {token.content for token in (*before, *added)}
    new = [t for t in (*tokens.roles.values(), *tokens.extra) if t.content not in known]
    # If several entries have the same content, the last counts, unless it repeats an earlier one.
    added += {repr(token): token for token in new}.values()
    # Once special, a token stays special.
    special = {token.content for token in before if token.special}
    special |= {token.content for token in tokens.roles.values()}
    for token in added:
        token.special = token.special or token.content in special
    with refusing("special tokens"):
        backend.add_tokens(added)
    for path, content, index in tokens.claims:
        if content and (found := backend.token_to_id(content)) != index:
            raise FormatError(
                f"{path}: token {content!r} has number {index}, but the vocabulary has {found}"
            )


def _first_token(backend: tokenizers.Tokenizer, bos: AddedToken | None, file: File) -> str | None:
    """Return the token that tokenizer.json itself puts before a text."""
    before, after = surroundings(backend, str(file))
    if not before and not after:
        return None
    if after or len(before) > 1 or (bos is not None and before != [bos.content]):
        raise FormatError(
            f"{file}: post_processor puts {before} before a text and {after} after it; "
            "only bos_token before it is supported"
        )
    return before[0]


def _eos_ids(path: File) -> tuple[int, ...]:
    value = _read(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise FormatError(f"{path}: eos_token_id is {value!r:.60}, expected integers")
    return tuple(ids)


def _template(folder: Folder, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        # Read bytes, because text mode would change the line ends.
        data = file.read_bytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{file}: byte {error.start}: not UTF-8") from error
    value = config.get("chat_template")
    if isinstance(value, list):  # several templates, each an object with a name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise FormatError(
        f"{folder / 'tokenizer_config.json'}: chat_template is {value!r:.60}, expected a string"
    )
