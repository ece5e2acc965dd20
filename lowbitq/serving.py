"""A server that speaks the protocol of OpenAI's chat completions and completions.

One model answers one request at a time; others wait in a queue of bounded length. The event loop
only moves bytes: one thread reads prompts (templates, tokens), another runs the model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lowbitq.generation import Stream, stream
from lowbitq.models.decoder import Model
from lowbitq.serving_requests import (
    CHAT,
    COMPLETION,
    MISSING,
    RequestError,
    chat_prompt,
    completion_prompt,
    read_options,
    stream_options,
)

try:
    import anyio
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ImportError(MISSING) from error

_LOG = logging.getLogger(__name__)


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
    reading_seconds : float, default=60.0
        Time in which a client has to read the rest of an answer that is complete.
    max_tokens : int, default=512
        Length of an answer where the request does not say.
    """

    request_bytes: int = 1_000_000
    upload_seconds: float = 30.0
    waiting: int = 64
    seconds: float = 600.0
    reading_seconds: float = 60.0
    max_tokens: int = 512


class _StoppedError(Exception):
    """The client has gone, or time is up."""


class _Interruptible:
    """A model that stops between two tokens once nobody waits for them or time is up."""

    def __init__(self, model: Model, seconds: float) -> None:
        self.model, self.seconds = model, seconds
        self.gone = threading.Event()
        self._started = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, tokens: Any, cache: Any) -> Any:
        """Run the model, unless nobody waits for it."""
        self._started = self._started or time.monotonic()
        if self.gone.is_set() or time.monotonic() > self._started + self.seconds:
            raise _StoppedError
        return self.model.step(tokens, cache)


@dataclass(eq=False)
class _Answer:
    """One answer in the making."""

    text: Stream[str]
    gone: threading.Event  # set: nobody waits for it

    def run(self, hand_on: Callable[[str], object]) -> None:
        """Generate, and hand on every piece of text."""
        with self.text, suppress(_StoppedError):
            for piece in self.text:
                hand_on(piece)

    @property
    def finish(self) -> str:
        """Why it ended; one that was stopped has its maximum length."""
        return self.text.finish or "length"

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens."""
        prompt, completion = self.text.prompt_tokens, self.text.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class _Server:
    """The model, its queue and its threads."""

    def __init__(self, model: Model, name: str, token: str | None, limits: Limits) -> None:
        self.model, self.name, self.token, self.limits = model, name, token, limits
        self.waiting = 0
        self.created = int(time.time())
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="lowbitq-read")
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="lowbitq-serve")

    def close(self) -> None:
        """End the threads."""
        for thread in (self.reader, self.worker):
            thread.shutdown(wait=True, cancel_futures=True)

    def authorize(self, request: Request) -> None:
        """Refuse a request without the token."""
        if self.token is None:
            return
        given = request.headers.get("authorization", "")
        # Headers are read as Latin-1, whatever their encoding.
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.token}".encode()):
            raise RequestError(401, "the request has no valid bearer token")

    async def read(self, request: Request, known: dict[str, tuple[type, ...]]) -> dict[str, Any]:
        """Return the options of a request that is allowed, small and understood."""
        self.authorize(request)
        try:
            body = await asyncio.wait_for(self._body(request), self.limits.upload_seconds)
        except asyncio.TimeoutError as error:
            said = f"the request took more than {self.limits.upload_seconds} s to arrive"
            raise RequestError(408, said) from error
        values = read_options(body, known)
        if values.get("model", self.name) != self.name:
            raise RequestError(404, f"there is no model {values['model']!r:.80}", "model")
        return values

    async def _body(self, request: Request) -> bytes:
        """Return the contents of a request, unless they are too many."""
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > self.limits.request_bytes:
                said = f"the request has more than {self.limits.request_bytes} bytes"
                raise RequestError(413, said)
        return bytes(found)

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

    async def prepared(self, values: dict[str, Any], chat: bool) -> _Answer:
        """Return the answer to make; RequestError if it cannot be."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.reader, self._prepare, values, chat)

    def _prepare(self, values: dict[str, Any], chat: bool) -> _Answer:
        prompt = chat_prompt(self.model, values) if chat else completion_prompt(values)
        options = stream_options(self.model, values, prompt, self.limits.max_tokens)
        model = _Interruptible(self.model, self.limits.seconds)
        try:
            return _Answer(stream(model, prompt, **options), model.gone)
        except (ValueError, TypeError) as error:  # an option out of range
            raise RequestError(400, str(error)) from error

    @asynccontextmanager
    async def making(self, answer: _Answer, receive: Receive) -> AsyncIterator[AsyncIterator[str]]:
        """Let the worker make an answer, and give its pieces as they come.

        It is stopped when its client goes and when this context is left. If a complete answer is
        not read in time, what reads it is cancelled.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()  # None: there are no more

        def hand_on(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                answer.run(hand_on)
            finally:
                hand_on(None)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            answer.gone.set()
            pieces.put_nowait(None)

        job = loop.run_in_executor(self.worker, work)
        watching = asyncio.ensure_future(watch())
        try:
            with anyio.CancelScope() as reading:

                def limit_reading(_: object) -> None:
                    reading.deadline = loop.time() + self.limits.reading_seconds

                job.add_done_callback(limit_reading)
                yield _taken(pieces, answer, job)
        finally:
            answer.gone.set()
            watching.cancel()
            job.cancel()


async def _taken(
    pieces: asyncio.Queue[str | None], answer: _Answer, job: asyncio.Future[None]
) -> AsyncIterator[str]:
    """Yield the text; what has come while the last of it was read is one piece.

    So a slow reader makes nobody wait, and what waits for it is only the text itself.
    """
    more = True
    while more:
        come = [await pieces.get()]
        while not pieces.empty():
            come.append(pieces.get_nowait())
        more = None not in come
        if text := "".join(piece for piece in come if piece):
            yield text
    if not answer.gone.is_set():
        await job  # raises what went wrong


@dataclass(frozen=True)
class _Shape:
    """How the two kinds of answers look."""

    object: str
    prefix: str

    def head(self, name: str, whole: bool) -> dict[str, Any]:
        """Return the fields that all parts of an answer share."""
        kind = self.object + (".chunk" if not whole and self.object.startswith("chat") else "")
        return {
            "id": self.prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": name,
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


class _Endpoint:
    """What answers requests of one kind, as an ASGI application.

    A function would return a response and have no say in when it is sent; here a request holds its
    place exactly as long as it is answered, however that ends.
    """

    def __init__(self, server: _Server, *, chat: bool) -> None:
        self.server, self.chat, self.shape = server, chat, _SHAPES[chat]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            values = await self.server.read(request, CHAT if self.chat else COMPLETION)
            async with self.server.place():
                answer = await self.server.prepared(values, self.chat)
                async with self.server.making(answer, receive) as pieces:
                    respond = self._streamed if values.get("stream") else self._whole
                    response = await respond(values, answer, pieces)
                    await response(scope, receive, send)

    async def _whole(
        self, values: dict[str, Any], answer: _Answer, pieces: AsyncIterator[str]
    ) -> Response:
        text = "".join([piece async for piece in pieces])
        found = self.shape.head(self.server.name, whole=True)
        found["choices"] = [self.shape.choice(text, answer.finish, whole=True)]
        return JSONResponse(found | {"usage": answer.usage})

    async def _streamed(
        self, values: dict[str, Any], answer: _Answer, pieces: AsyncIterator[str]
    ) -> Response:
        first = await anext(pieces, None)  # now, while an error still has a status
        usage = values.get("stream_options", {}).get("include_usage", False)
        events = self._events(first, pieces, answer, usage=usage)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(
        self, first: str | None, pieces: AsyncIterator[str], answer: _Answer, *, usage: bool
    ) -> AsyncIterator[str]:
        head, choice = self.shape.head(self.server.name, whole=False), self.shape.choice
        try:
            piece = first
            while piece is not None:
                yield _event(head | {"choices": [choice(piece, None, whole=False)]})
                piece = await anext(pieces, None)
        except Exception as error:  # the status has been sent: the stream itself has to say it
            _LOG.exception("an answer broke off")
            yield _event(_broken(error).body())
            return
        yield _event(head | {"choices": [choice(None, answer.finish, whole=False)]})
        if usage:
            yield _event(head | {"choices": [], "usage": answer.usage})
        yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _broken(error: Exception) -> RequestError:
    return RequestError(500, f"the answer broke off: {type(error).__name__}: {error}")


async def _refused(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status)


async def _failed(_: Request, error: Exception) -> Response:
    """Answer a request that met an unexpected error, which Starlette also hands on to be logged."""
    return JSONResponse(_broken(error).body(), 500)


async def _misdirected(request: Request, error: Any) -> Response:
    """Answer a request for another path or with another method."""
    said = f"there is no {request.method} {request.url.path}"
    if allowed := (error.headers or {}).get("Allow"):
        said = f"{said}, but {allowed}"
    refused = RequestError(error.status_code, said)
    return JSONResponse(refused.body(), refused.status, headers=error.headers)


def app(
    model: Model, *, name: str = "lowbitq", token: str | None = None, limits: Limits | None = None
) -> Starlette:
    """Return an ASGI application that serves a model to OpenAI's clients.

    ``POST /v1/chat/completions`` and ``/v1/completions``, whole or streamed, with ``usage``;
    ``GET /v1/models`` and ``/health``. Answers have one choice. Without a ``temperature`` it is 1,
    without a ``seed`` every answer has another one; ``top_k``, ``min_p`` and ``repetition_penalty``
    are understood too. A stream that an error breaks off ends with an event that has the error,
    and without ``[DONE]``.

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
    ValueError
        If the model has no tokenizer.

    Examples
    --------
    >>> import uvicorn  # doctest: +SKIP
    >>> uvicorn.run(app(model), port=8000)  # doctest: +SKIP
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read text")
    server = _Server(model, name, token, limits or Limits())

    async def models(request: Request) -> Response:
        server.authorize(request)
        one = {"id": name, "object": "model", "created": server.created, "owned_by": "lowbitq"}
        if (asked := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [one]})
        if asked != name:
            raise RequestError(404, f"there is no model {asked!r:.80}", "model")
        return JSONResponse(one)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": server.waiting})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.close()

    found = Starlette(
        routes=[
            Route("/v1/chat/completions", _Endpoint(server, chat=True), methods=["POST"]),
            Route("/v1/completions", _Endpoint(server, chat=False), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/health", health),
        ],
        exception_handlers={
            RequestError: _refused,
            HTTPException: _misdirected,
            Exception: _failed,
        },
        lifespan=lifespan,
    )
    found.state.server = server
    return found
