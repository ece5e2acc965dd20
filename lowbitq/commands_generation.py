"""What the commands do that generate text: generate, chat."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowbitq as lq
from lowbitq.commands import (
    ERROR,
    UNSUPPORTED,
    USAGE,
    CommandError,
    Options,
    _load,
    _show,
    complain,
    show,
)
from lowbitq.generation import room

Message = dict[str, Any]


def generate(options: Options) -> tuple[dict[str, Any], str]:
    """Continue texts or a conversation and show them as they are generated."""
    prompts = _prompts(options)  # first, as it may refuse them
    model = _load(options.model, options.bits)
    if model.tokenizer is None:
        missing = "tokenizer.json" if Path(options.model).is_dir() else "vocabulary"
        raise CommandError(ERROR, f"{options.model} has no {missing}, so it cannot read text")
    started = time.perf_counter()
    found: list[dict[str, Any]] = []
    for prompt in prompts:
        if found:
            _show(options, "\n\n")
        found.append(_continued(model, prompt, options))
    tokens, seconds = sum(one["tokens"] for one in found), time.perf_counter() - started
    _say_speed(tokens, seconds)
    result = found[0] if len(found) == 1 else {"continuations": found}
    return result | {"tokens_per_second": tokens / seconds}, ""


def _prompts(options: Options) -> list[str | list[Message]]:
    """Return what is to be continued: texts, or conversations."""
    if options.prompts.count("-") > 1:
        raise CommandError(USAGE, "- is given twice, but there is one standard input")
    if options.messages:
        return [_read_messages(path) for path in options.prompts]
    texts = [_standard_input() if text == "-" else text for text in options.prompts]
    return [[{"role": "user", "content": text}] for text in texts] if options.chat else texts


def _standard_input() -> str:
    return sys.stdin.read().removesuffix("\n")


def _read_messages(path: str) -> list[Message]:
    text = _standard_input() if path == "-" else Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CommandError(ERROR, f"{path}: not JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        expected = 'expected a list of messages like {"role": "user", "content": "Hi"}'
        raise CommandError(ERROR, f"{path}: {expected}")
    return found


def _continued(model: lq.Model, prompt: str | list[Message], options: Options) -> dict[str, Any]:
    """Show a prompt, unless it is a conversation, and its continuation."""
    assert model.tokenizer is not None
    text = prompt if isinstance(prompt, str) else model.tokenizer.chat(prompt)
    pieces = []
    with model.stream(text, cache_bits=options.cache_bits, **_sampling(options)) as stream:
        if isinstance(prompt, str):
            _show(options, text)
        for piece in stream:
            pieces.append(piece)
            _show(options, piece)
    return {"prompt": text, "text": "".join(pieces), "tokens": stream.tokens}


def _sampling(options: Options) -> dict[str, Any]:
    """Return the options of `Model.stream` that generate and chat share."""
    names = ["max_new_tokens", "temperature", "top_k", "top_p", "min_p"]
    names += ["repetition_penalty", "seed"]
    return {name: getattr(options, name) for name in names}


def _say_speed(tokens: int, seconds: float) -> None:
    complain(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")


def chat(options: Options) -> tuple[dict[str, Any], str]:
    """Talk with a model until the input ends or says /exit; /reset forgets what was said."""
    model = _load(options.model, options.bits)
    if model.tokenizer is None:
        raise CommandError(UNSUPPORTED, f"{options.model} has no tokenizer, so it cannot read text")
    first = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages = list(first)
    answers = 0
    while (said := _line()) is not None and said != "/exit":
        if said == "/reset":
            messages = list(first)
        elif said:
            try:
                asked = _trimmed(model, [*messages, {"role": "user", "content": said}], options)
                answer = _answer(
                    model, asked, _sampling(options) | {"seed": options.seed + answers}
                )
            except ValueError as error:  # too long, or refused by the template
                complain(f"{error}; /reset begins anew")
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]
            answers += 1
    return {"answers": answers, "messages": messages}, ""


def _line() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _trimmed(model: lq.Model, messages: list[Message], options: Options) -> list[Message]:
    """Forget the oldest exchanges if the context is full, and say so."""
    tokenizer, most = model.tokenizer, room(model.config)
    assert tokenizer is not None

    def fits(messages: list[Message]) -> bool:
        size = tokenizer.encode(tokenizer.chat(messages)).size
        return size + int(options.max_new_tokens) <= most

    kept = newest_that_fit(messages, fits)
    if forgotten := len(messages) - len(kept):
        complain(f"the context of {most} tokens is full: forgot the oldest {forgotten} messages")
    return kept


def newest_that_fit(
    messages: list[Message], fits: Callable[[list[Message]], bool]
) -> list[Message]:
    """Return a conversation without its oldest exchanges, as few as need be.

    An exchange is a message of the user and the answers to it. System messages at the beginning
    stay, and so does the last exchange, even if it does not fit.

    Examples
    --------
    >>> said = [{"role": role} for role in ("system", "user", "assistant", "user")]
    >>> [one["role"] for one in newest_that_fit(said, lambda messages: len(messages) < 4)]
    ['system', 'user']
    """
    begin = 0
    while begin < len(messages) and messages[begin]["role"] == "system":
        begin += 1
    head, rest = messages[:begin], messages[begin:]
    later = [at for at in range(1, len(rest)) if rest[at]["role"] == "user"]
    while later and not fits(head + rest):
        rest = rest[later[0] :]
        later = [at - later[0] for at in later[1:]]
    return head + rest


def _answer(model: lq.Model, messages: list[Message], sampling: dict[str, Any]) -> str:
    """Print an answer as it is made, and return it; Ctrl-C ends it."""
    pieces: list[str] = []
    started = time.perf_counter()
    with model.stream(messages, **sampling) as stream:
        try:
            for piece in stream:
                pieces.append(piece)
                show(piece)
        except KeyboardInterrupt:
            show(" ...")
    show("\n")
    if pieces:
        _say_speed(stream.tokens, time.perf_counter() - started)
    return "".join(pieces)
