"""What a server is asked in OpenAI's protocol: options and prompts of requests, and their errors.

What a request asks for and the server does not know is refused, so that no option is silently
without effect.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from lowbitq.generation import room
from lowbitq.models.decoder import Model

MISSING = "serving needs Starlette and uvicorn; get them with: pip install 'lowbitq[serve]'"

# Options of both requests, with the types they may have; top_k, min_p and repetition_penalty are
# not OpenAI's, but many servers have them.
_COMMON: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "seed": (int,),
    "stop": (str, list),
    "stream": (bool,),
    "stream_options": (dict,),
    "user": (str,),
}
CHAT = _COMMON | {"messages": (list,), "max_completion_tokens": (int,)}
COMPLETION = _COMMON | {"prompt": (str, list), "echo": (bool,)}
# What many clients send, and the only value that is understood.
_NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "best_of": 1}


class RequestError(Exception):
    """A request that is refused, with its HTTP status and the parameter at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": None}
        return {"error": error}


def read_options(body: bytes, known: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Return the options of a request that are not null; RequestError if one is not understood."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(400, "the request is not a JSON object")
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if key in _NEUTRAL:
            if value != _NEUTRAL[key]:
                said = f"{key} is {value!r:.80}, expected {_NEUTRAL[key]!r}"
                raise RequestError(400, said, key)
        elif key not in known:
            raise RequestError(400, f"unknown parameter {key!r}", key)
        elif not isinstance(value, known[key]) or (
            isinstance(value, bool) and bool not in known[key]
        ):
            kinds = " or ".join(kind.__name__ for kind in known[key])
            raise RequestError(400, f"{key} is {value!r:.80}, expected {kinds}", key)
    told = given.get("stream_options", {})
    if (told and not given.get("stream")) or set(told) - {"include_usage"}:
        raise RequestError(400, f"stream_options is {told!r:.80}", "stream_options")
    return given


def chat_prompt(model: Model, values: dict[str, Any]) -> str:
    """Return the text that a request's messages make."""
    messages = values.get("messages")
    if not messages:
        raise RequestError(400, "messages is missing or empty", "messages")
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(400, f"messages[{number}] has no role", "messages")
        plain.append({"role": message["role"], "content": _content(message, number)})
    assert model.tokenizer is not None
    try:
        return model.tokenizer.chat(plain)
    except ValueError as error:
        raise RequestError(400, str(error), "messages") from error


def _content(message: dict[str, Any], number: int) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestError(400, f"messages[{number}] has a content that is not text", "messages")


def completion_prompt(values: dict[str, Any]) -> str:
    """Return the text that a request asks to continue."""
    prompt = values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        [prompt] = prompt
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(400, "prompt is not one text that is not empty", "prompt")
    if values.get("echo"):
        raise RequestError(400, "echo is true, expected false", "echo")
    return prompt


def stream_options(model: Model, values: dict[str, Any], prompt: str, most: int) -> dict[str, Any]:
    """Return the options of `Model.stream`; `most` is max_tokens where the request has none."""
    assert model.tokenizer is not None
    try:
        size = model.tokenizer.encode(prompt).size
    except ValueError as error:  # half of a surrogate pair
        raise RequestError(400, str(error)) from error
    both = room(model.config)
    asked = values.get("max_completion_tokens", values.get("max_tokens"))
    max_new_tokens = min(most, both - size) if asked is None else asked
    if size == 0:
        raise RequestError(400, "the prompt has no tokens")
    if max_new_tokens < 1 or max_new_tokens > both - size:
        said = f"max_tokens is {max_new_tokens} and the prompt has {size} tokens, expected 1 or "
        raise RequestError(400, f"{said}more and at most {both} together", "max_tokens")
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": float(values.get("temperature", 1.0)),
        "top_p": values.get("top_p"),
        "top_k": values.get("top_k"),
        "min_p": values.get("min_p"),
        "repetition_penalty": float(values.get("repetition_penalty", 1.0)),
        "seed": values.get("seed", secrets.randbits(31)),
        "stop": values.get("stop") or None,
    }
