"""What the commands do that serve a model or talk with it."""

from __future__ import annotations

import ipaddress
import os
import sys
import time
from typing import Any

import lowbitq as lq
from lowbitq.commands import UNSUPPORTED, USAGE, CommandError, Options, _load, complain
from lowbitq.serving import Limits, app

TOKEN = "LOWBITQ_TOKEN"


def serve(options: Options) -> tuple[dict[str, Any], str]:
    """Serve a model until interrupted."""
    token = options.token or os.environ.get(TOKEN) or None
    if not is_local(options.host) and token is None:
        said = f"--host {options.host} can be reached by others; give --token or set {TOKEN}"
        raise CommandError(USAGE, said)
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ImportError(
            "serving needs Starlette and uvicorn; get them with: pip install 'lowbitq[serve]'"
        ) from error
    limits = Limits(seconds=options.seconds, waiting=options.waiting)
    served = app(_load(options.model), name=options.name, token=token, limits=limits)
    complain(f"http://{options.host}:{options.port}/v1 serves {options.name}; Ctrl-C ends it")
    uvicorn.run(served, host=options.host, port=options.port, log_level="warning")
    return {"served": options.name}, "stopped"


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

    def show(piece: str) -> None:
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    started = time.perf_counter()
    try:
        model.generate(
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=seed,
            on_token=show,
        )
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    sys.stdout.write("\n")
    text = "".join(pieces)
    if text:
        rate = model.tokenizer.encode(text).size / (time.perf_counter() - started)
        complain(f"{rate:.0f} tokens/s")
    return text


def is_local(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
