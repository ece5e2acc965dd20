"""What the commands do that generate text: generate, chat."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lowbitq as lq
from lowbitq.commands import (
    ERROR,
    UNSUPPORTED,
    CommandError,
    Options,
    _load,
    _show,
    complain,
    show,
)


def generate(options: Options) -> tuple[dict[str, Any], str]:
    """Continue a text and show it as it is generated."""
    model = _load(options.model, options.bits)
    if model.tokenizer is None:
        missing = "tokenizer.json" if Path(options.model).is_dir() else "vocabulary"
        raise CommandError(ERROR, f"{options.model} has no {missing}, so it cannot read text")
    prompt = options.prompt
    if options.chat:
        prompt = model.tokenizer.chat([{"role": "user", "content": prompt}])
    else:
        _show(options, prompt)
    text = model.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        cache_bits=options.cache_bits,
        on_token=lambda piece: _show(options, piece),
    )
    return {"prompt": prompt, "text": text}, ""


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
            messages.append({"role": "user", "content": said})
            try:
                answer = _answer(model, model.tokenizer.chat(messages), options, seed=answers)
            except ValueError as error:  # too long, or refused by the template
                complain(f"{error}; /reset begins anew")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
            answers += 1
    return {"answers": answers, "messages": messages}, ""


def _line() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(model: lq.Model, prompt: str, options: Options, seed: int) -> str:
    """Print an answer as it is made, and return it; Ctrl-C ends it."""
    assert model.tokenizer is not None
    pieces: list[str] = []

    def shown(piece: str) -> None:
        pieces.append(piece)
        show(piece)

    started = time.perf_counter()
    try:
        model.generate(
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=seed,
            on_token=shown,
        )
    except KeyboardInterrupt:
        show(" ...")
    show("\n")
    text = "".join(pieces)
    if text:
        rate = model.tokenizer.encode(text).size / (time.perf_counter() - started)
        complain(f"{rate:.0f} tokens/s")
    return text
