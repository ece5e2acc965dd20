"""A server that speaks the protocol of OpenAI's chat completions and completions.

One model answers one request at a time; others wait in a queue of bounded length. What a request
asks for and the server does not know is refused, so that no option is silently without effect.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lowbitq.generation import generate
from lowbitq.models.decoder import Model

# Options of both requests, with the types they may have.
_COMMON: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "seed": (int,),
    "stop": (str, list),
    "stream": (bool,),
    "stream_options": (dict,),
    "user": (str,),
}
_CHAT = _COMMON | {"messages": (list,), "max_completion_tokens": (int,)}
_COMPLETION = _COMMON | {"prompt": (str, list), "echo": (bool,)}
# What many clients send, and the only value that is understood.
_NEUTRAL = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "best_of": 1}

_DISCONNECTED = 0.05  # seconds between two looks whether the client is still there


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Parameters
    ----------
    request_bytes : int, default=1_000_000
        Size of a request.
    upload_seconds : float, default=30.0
        Time in which a request has to arrive.
    waiting : int, default=64
        Requests that are answered or wait; further ones are refused.
    seconds : float, default=600.0
        Time of one answer, after which it ends as if at its maximum length.
    max_tokens : int, default=512
        Length of an answer where the request does not say.
    """

    request_bytes: int = 1_000_000
    upload_seconds: float = 30.0
    waiting: int = 64
    seconds: float = 600.0
    max_tokens: int = 512


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


class _StoppedError(Exception):
    """The client has gone, or time is up."""


@dataclass(eq=False)
class _Answer:
    """One answer in the making: a model that counts its tokens and can be stopped."""

    model: Model
    prompt: str
    options: dict[str, Any]
    seconds: float
    gone: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0
    finish: str = "stop"
    _started: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, tokens: Any, cache: Any) -> Any:
        """Run the model, unless nobody waits for it."""
        self._started = self._started or time.monotonic()
        if self.gone.is_set() or time.monotonic() > self._started + self.seconds:
            raise _StoppedError
        self.tokens += 1
        return self.model.step(tokens, cache)

    def run(self, hand_on: Any) -> None:
        """Generate, and hand on every piece of text."""
        most = self.options["max_new_tokens"]
        try:
            generate(self, self.prompt, on_token=hand_on, **self.options)
        except _StoppedError:
            self.finish = "length"
        else:
            self.finish = "length" if self.tokens >= most else "stop"


class _Server:
    """The model, its queue and its worker."""

    def __init__(self, model: Model, name: str, token: str | None, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.token = token
        self.waiting = 0
        self.created = int(time.time())
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="lowbitq-serve")

    # --- requests ---------------------------------------------------------------------------------

    async def read(self, request: Any, known: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
        """Return the options of a request that is allowed, small and understood."""
        self.authorize(request)
        try:
            body = await asyncio.wait_for(self.body(request), self.limits.upload_seconds)
        except asyncio.TimeoutError as error:
            said = f"the request took more than {self.limits.upload_seconds} s to arrive"
            raise RequestError(408, said) from error
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"the request is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RequestError(400, "the request is not a JSON object")
        return self.checked(values, known)

    async def body(self, request: Any) -> bytes:
        """Return the contents of a request, unless they are too many."""
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > self.limits.request_bytes:
                raise RequestError(
                    413, f"the request has more than {self.limits.request_bytes} bytes"
                )
        return bytes(found)

    def authorize(self, request: Any) -> None:
        """Refuse a request without the token."""
        if self.token is None:
            return
        given = request.headers.get("authorization", "")
        # Headers are read as Latin-1, whatever their encoding.
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.token}".encode()):
            raise RequestError(401, "the request has no valid bearer token")

    def checked(
        self, values: dict[str, Any], known: Mapping[str, tuple[type, ...]]
    ) -> dict[str, Any]:
        """Return the options that are not null."""
        found = {}
        for key, value in values.items():
            if value is None:
                continue
            if key in _NEUTRAL:
                if value != _NEUTRAL[key]:
                    raise RequestError(
                        400, f"{key} is {value!r:.80}, expected {_NEUTRAL[key]!r}", key
                    )
                continue
            if key not in known:
                raise RequestError(400, f"unknown parameter {key!r}", key)
            if not isinstance(value, known[key]) or (
                isinstance(value, bool) and bool not in known[key]
            ):
                kinds = " or ".join(kind.__name__ for kind in known[key])
                raise RequestError(400, f"{key} is {value!r:.80}, expected {kinds}", key)
            found[key] = value
        if found.get("model", self.name) != self.name:
            raise RequestError(404, f"there is no model {found['model']!r:.80}", "model")
        return found

    def answer(self, values: dict[str, Any], prompt: str) -> _Answer:
        """Return the answer to make; RequestError if it cannot be."""
        most = values.get("max_completion_tokens", values.get("max_tokens"))
        assert self.model.tokenizer is not None
        size = self.model.tokenizer.encode(prompt).size
        room = self.model.config.max_positions - size
        options = {
            "max_new_tokens": min(self.limits.max_tokens, room) if most is None else most,
            "temperature": float(values.get("temperature", 1.0)),
            "top_p": values.get("top_p"),
            "top_k": values.get("top_k"),
            "seed": values.get("seed", secrets.randbits(31)),
            "stop": values.get("stop") or None,
        }
        if size == 0:
            raise RequestError(400, "the prompt has no tokens")
        if options["max_new_tokens"] < 1 or options["max_new_tokens"] > room:
            raise RequestError(
                400,
                f"max_tokens is {options['max_new_tokens']} and the prompt has {size} tokens, "
                f"expected 1 or more and at most {self.model.config.max_positions} together",
                "max_tokens",
            )
        return _Answer(self.model, prompt, options, self.limits.seconds)

    # --- answers ----------------------------------------------------------------------------------

    async def pieces(self, answer: _Answer) -> AsyncIterator[str]:
        """Yield the text as it is made, by the worker; stop it when nobody listens any more."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | None] = asyncio.Queue()

        def hand_on(piece: str | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        def work() -> None:
            try:
                answer.run(hand_on)
            finally:
                hand_on(None)

        async with self.place():
            job = loop.run_in_executor(self.worker, work)
            try:
                while (piece := await queue.get()) is not None:
                    yield piece
                await job
            finally:
                answer.gone.set()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place in the queue."""
        if self.waiting >= self.limits.waiting:
            raise RequestError(503, f"{self.waiting} requests are waiting already; try again later")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @asynccontextmanager
    async def watching(self, request: Any, answer: _Answer) -> AsyncIterator[None]:
        """Make no more of an answer once its client has gone."""

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(_DISCONNECTED)
            answer.gone.set()

        task = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            task.cancel()

    def usage(self, answer: _Answer) -> dict[str, int]:
        """Return the numbers of tokens."""
        assert self.model.tokenizer is not None
        prompt = int(self.model.tokenizer.encode(answer.prompt).size)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer.tokens,
            "total_tokens": prompt + answer.tokens,
        }


@dataclass(frozen=True)
class _Shape:
    """How the two kinds of answers look."""

    object: str
    prefix: str

    def head(self, server: _Server, whole: bool) -> dict[str, Any]:
        """Return the fields that all parts of an answer share."""
        kind = self.object + (".chunk" if not whole and self.object.startswith("chat") else "")
        return {
            "id": self.prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": server.name,
        }

    def choice(self, text: str | None, finish: str | None, whole: bool) -> dict[str, Any]:
        """Return a choice: the whole text, a piece of it, or the end of it (None)."""
        found: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if not self.object.startswith("chat"):
            return found | {"text": text or ""}
        if whole:
            return found | {"message": {"role": "assistant", "content": text}}
        return found | {"delta": {} if text is None else {"role": "assistant", "content": text}}


_SHAPES = {True: _Shape("chat.completion", "chatcmpl-"), False: _Shape("text_completion", "cmpl-")}


def _chat_prompt(model: Model, values: dict[str, Any]) -> str:
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


def _completion_prompt(values: dict[str, Any]) -> str:
    prompt = values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        [prompt] = prompt
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(400, "prompt is not one text that is not empty", "prompt")
    if values.get("echo"):
        raise RequestError(400, "echo is true, expected false", "echo")
    return prompt


def app(
    model: Model, *, name: str = "lowbitq", token: str | None = None, limits: Limits | None = None
) -> Any:
    """Return an ASGI application that serves a model to OpenAI's clients.

    ``POST /v1/chat/completions`` and ``/v1/completions``, whole or streamed, with ``usage``;
    ``GET /v1/models`` and ``/health``. Answers have one choice. Without a ``temperature`` it is 1,
    without a ``seed`` every answer has another one.

    Parameters
    ----------
    model : Model
        With a tokenizer; chats need its chat template.
    name : str, default="lowbitq"
        What requests call the model.
    token : str, default=None
        Bearer token that requests must have. None: none.
    limits : Limits, default=None
        None: the default ones.

    Returns
    -------
    starlette.applications.Starlette

    Raises
    ------
    ImportError
        If Starlette is missing.
    ValueError
        If the model has no tokenizer.

    Examples
    --------
    >>> import uvicorn  # doctest: +SKIP
    >>> uvicorn.run(app(model), port=8000)  # doctest: +SKIP
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, StreamingResponse
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise ImportError(
            "serving needs Starlette and uvicorn; get them with: pip install 'lowbitq[serve]'"
        ) from error
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read text")
    server = _Server(model, name, token, limits or Limits())

    async def respond(request: Any, chat: bool) -> Any:
        values = await server.read(request, _CHAT if chat else _COMPLETION)
        prompt = _chat_prompt(model, values) if chat else _completion_prompt(values)
        answer, shape = server.answer(values, prompt), _SHAPES[chat]
        stream = values.get("stream", False)
        told = values.get("stream_options", {})
        if (told and not stream) or set(told) - {"include_usage"}:
            raise RequestError(400, f"stream_options is {told!r:.80}", "stream_options")
        if not stream:
            async with server.watching(request, answer):
                text = "".join([piece async for piece in server.pieces(answer)])
            found = shape.head(server, whole=True)
            found["choices"] = [shape.choice(text, answer.finish, whole=True)]
            return JSONResponse(found | {"usage": server.usage(answer)})
        pieces = server.pieces(answer)
        async with server.watching(request, answer):
            first = await anext(pieces, None)  # now, while an error still has a status

        async def events() -> AsyncIterator[str]:
            head = shape.head(server, whole=False)
            try:
                piece = first
                while piece is not None:
                    yield _event(head | {"choices": [shape.choice(piece, None, whole=False)]})
                    piece = await anext(pieces, None)
                yield _event(head | {"choices": [shape.choice(None, answer.finish, whole=False)]})
                if told.get("include_usage"):
                    yield _event(head | {"choices": [], "usage": server.usage(answer)})
                yield "data: [DONE]\n\n"
            finally:
                await pieces.aclose()  # type: ignore[attr-defined]

        return StreamingResponse(events(), media_type="text/event-stream")

    def guarded(handler: Any) -> Any:
        async def handle(request: Any) -> Any:
            try:
                return await handler(request)
            except RequestError as error:
                return JSONResponse(error.body(), error.status)
            except (ValueError, TypeError) as error:  # an option out of range
                return JSONResponse(RequestError(400, str(error)).body(), 400)

        return handle

    async def models(request: Any) -> Any:
        server.authorize(request)
        one = {"id": name, "object": "model", "created": server.created, "owned_by": "lowbitq"}
        if (asked := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [one]})
        if asked != name:
            raise RequestError(404, f"there is no model {asked!r:.80}", "model")
        return JSONResponse(one)

    async def health(request: Any) -> Any:
        return JSONResponse({"status": "ok", "waiting": server.waiting})

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        server.worker.shutdown(wait=True, cancel_futures=True)

    found = Starlette(
        routes=[
            Route(f"/v1/{path}", guarded(partial(respond, chat=chat)), methods=["POST"])
            for path, chat in (("chat/completions", True), ("completions", False))
        ]
        + [
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(models)),
            Route("/health", health),
        ],
        lifespan=lifespan,
    )
    found.state.server = server
    return found


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"
