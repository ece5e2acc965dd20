"""The server, as clients of OpenAI's protocol see it."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

import lowbitq as lq
from lowbitq.commands_serving import is_local
from lowbitq.serving import Limits, app

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 6}
PROMPT = "[user] hello there\n"


class Slow:
    """A model whose steps take a while."""

    def __init__(self, model, seconds):
        self.model, self.seconds, self.steps = model, seconds, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def step(self, tokens, cache):
        self.steps += 1
        time.sleep(self.seconds)
        return self.model.step(tokens, cache)


class Held(Slow):
    """A model whose steps wait until they may go."""

    def __init__(self, model):
        super().__init__(model, 0)
        self.begun, self.go = threading.Event(), threading.Event()

    def step(self, tokens, cache):
        self.begun.set()
        assert self.go.wait(30)
        return super().step(tokens, cache)


class Failing(Slow):
    """A model whose steps fail from the one of that number on."""

    def __init__(self, model, at):
        super().__init__(model, 0)
        self.at = at

    def step(self, tokens, cache):
        if cache.length + len(tokens) >= self.model.tokenizer.encode(PROMPT).size + self.at - 1:
            raise lq.NumericalError("a NaN")
        return super().step(tokens, cache)


async def ask_app(found, values, send, gone=None, spec_version="2.4", path="chat/completions"):
    """Send a request to an application without a socket; its client goes with an event."""
    messages = [{"type": "http.request", "body": json.dumps(values).encode()}]

    async def receive():
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "method": "POST",
        "path": f"/v1/{path}",
        "query_string": b"",
        "headers": [],
    }
    await found(scope, receive, send)


@pytest.fixture(scope="module")
def model(tiny_folder):
    model = lq.load(tiny_folder)
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture(scope="module")
def serve():
    """Start servers; they end with the module."""
    running = []

    def start(model, **options):
        found = app(model, **options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = uvicorn.Config(found, port=port, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{port}", found.state.server

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def plain(serve, model):
    return serve(model, limits=Limits(request_bytes=5000))


def post(url, path="chat/completions", **values):
    return httpx.post(f"{url}/v1/{path}", json=values, timeout=30)


def quiet(server, seconds=5.0):
    """Wait until no request is left."""
    until = time.monotonic() + seconds
    while server.waiting and time.monotonic() < until:
        time.sleep(0.01)
    return server.waiting == 0


def test_a_chat_is_what_generate_says(plain, model):
    url, _ = plain
    found = post(url, **HELLO, temperature=0).json()
    prompt = model.tokenizer.chat(HELLO["messages"])
    expected = model.generate(prompt, max_new_tokens=6)
    assert found["object"] == "chat.completion"
    assert found["model"] == "lowbitq"
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    size = model.tokenizer.encode(prompt).size
    usage = found["usage"]
    assert usage["prompt_tokens"] == size
    assert usage["total_tokens"] == size + usage["completion_tokens"]
    assert choice["finish_reason"] == ("length" if usage["completion_tokens"] == 6 else "stop")


def test_a_stream_is_the_same_text(plain, model):
    url, server = plain
    options = HELLO | {"temperature": 0.8, "seed": 3}
    whole = post(url, **options).json()["choices"][0]["message"]["content"]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=options | more) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({part["id"] for part in parts}) == 1
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    *pieces, end, usage = parts
    assert "".join(part["choices"][0]["delta"]["content"] for part in pieces) == whole
    assert end["choices"][0]["finish_reason"] in ("stop", "length")
    assert usage["usage"]["completion_tokens"] > 0
    assert quiet(server)


def test_completions_continue_a_text_up_to_a_stop(plain, model):
    url, _ = plain
    expected = model.generate("the river", max_new_tokens=8)
    found = post(url, "completions", prompt="the river", max_tokens=8, temperature=0).json()
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == expected
    stop = expected[3:5]
    cut = post(url, "completions", prompt=["the river"], max_tokens=8, temperature=0, stop=[stop])
    assert cut.json()["choices"][0]["text"] == expected[: expected.index(stop)]


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({"messages": []}, 400, "messages is missing or empty"),
        ({"colour": 1}, 400, "unknown parameter 'colour'"),
        ({"n": 2}, 400, "n is 2, expected 1"),
        ({"tools": []}, 400, "unknown parameter 'tools'"),
        ({"model": "other"}, 404, "there is no model 'other'"),
        ({"max_tokens": "many"}, 400, "max_tokens is 'many', expected int"),
        ({"max_tokens": True}, 400, "max_tokens is True, expected int"),
        ({"max_tokens": 10**6}, 400, "at most"),
        ({"temperature": -1}, 400, "temperature is -1.0"),
        ({"temperature": -1, "stream": True}, 400, "temperature is -1.0"),
        ({"top_p": 2}, 400, "top_p is 2"),
        ({"stop": [""]}, 400, "stop is"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "a content that is not text"),
        ({"messages": [{"content": "x"}]}, 400, "messages[0] has no role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "no tools"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"user": "x" * 5000}, 413, "more than 5000 bytes"),
    ],
)
def test_what_is_refused(plain, values, status, said):
    url, server = plain
    response = post(url, **HELLO | values)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert quiet(server)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 4000])
def test_what_is_no_request(plain, body):
    url, _ = plain
    response = httpx.post(f"{url}/v1/completions", content=body)
    assert response.status_code == 400
    assert "the request is not" in response.json()["error"]["message"]


def test_models_and_health(plain):
    url, _ = plain
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "lowbitq"
    assert httpx.get(f"{url}/v1/models/lowbitq").json()["id"] == "lowbitq"
    assert httpx.get(f"{url}/v1/models/other").status_code == 404
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0}


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/v1/other", 404, "there is no GET /v1/other"),
        ("POST", "/", 404, "there is no POST /"),
        ("GET", "/v1/completions", 405, "there is no GET /v1/completions, but POST"),
        ("POST", "/v1/models", 405, "there is no POST /v1/models, but "),
    ],
)
def test_other_routes_and_methods_have_openais_error(plain, method, path, status, said):
    url, _ = plain
    response = httpx.request(method, f"{url}{path}")
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"].startswith(said)
    assert error["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


def test_min_p_and_repetition_penalty_reach_the_model(plain, model):
    url, _ = plain
    for options in (
        {"temperature": 3.0, "seed": 1, "min_p": 0.5},
        {"temperature": 0, "repetition_penalty": 9},
    ):
        expected = model.generate("the river", max_new_tokens=9, **options)
        found = post(url, "completions", prompt="the river", max_tokens=9, **options).json()
        assert found["choices"][0]["text"] == expected
    for name, value in (("min_p", 2), ("repetition_penalty", 0)):
        response = post(url, **HELLO, **{name: value})
        assert response.status_code == 400
        assert f"{name} is {value}" in response.json()["error"]["message"]


def test_a_token_is_needed(serve, model):
    url, _ = serve(model, token="secret", name="small")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert post(url, **HELLO).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "small"
    wrong = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secreT"})
    assert wrong.status_code == 401


def test_openais_client_understands_it(plain, model):
    openai = pytest.importorskip("openai")
    url, _ = plain
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options = HELLO | {"model": "lowbitq", "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    pieces = client.chat.completions.create(**options, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in pieces) == whole
    with pytest.raises(openai.BadRequestError, match="unknown parameter 'tools'"):
        client.chat.completions.create(**options, tools=[])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_client_that_goes_stops_its_answer(serve, model):
    slow = Slow(model, 0.02)
    url, server = serve(slow)
    options = HELLO | {"max_tokens": 60, "temperature": 1, "seed": 1}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=options | {"stream": True}) as one:
        next(one.iter_lines())
    assert quiet(server)
    assert slow.steps < 40
    before = slow.steps
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=options, timeout=0.1)
    assert quiet(server)
    assert slow.steps < before + 40


def test_a_client_that_goes_before_the_first_piece_frees_its_place(serve, model):
    slow = Slow(model, 0.3)
    url, server = serve(slow)
    options = HELLO | {"max_tokens": 60, "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=options, timeout=0.15)
    assert quiet(server)
    assert slow.steps < 4


def test_a_client_that_goes_while_it_waits_frees_its_place_at_once(serve, model):
    held = Held(model)
    url, server = serve(held)
    with ThreadPoolExecutor(1) as client:
        first = client.submit(post, url, **HELLO)
        assert held.begun.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=HELLO, timeout=0.1)
        until = time.monotonic() + 5
        while server.waiting > 1 and time.monotonic() < until:
            time.sleep(0.01)
        waiting = server.waiting
        held.go.set()
        assert first.result().status_code == 200
    assert waiting == 1, "while the first is still answered"
    assert quiet(server)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_goes_before_the_stream_starts_frees_its_place(model, spec_version):
    """Both ways of ASGI to say so: a message, and an error where something is sent."""
    found = app(model)

    async def ask():
        gone = asyncio.Event()

        async def send(message):
            gone.set()
            if spec_version == "2.4":
                raise OSError
            await asyncio.Event().wait()

        await ask_app(found, HELLO | {"stream": True}, send, gone, spec_version)
        return found.state.server.waiting

    gc.disable()
    try:
        assert asyncio.run(asyncio.wait_for(ask(), 10)) == 0
    finally:
        gc.enable()
        found.state.server.close()


def test_a_client_that_does_not_read_loses_its_place(model):
    found = app(model, limits=Limits(reading_seconds=0.1))
    sent = []

    async def ask():
        async def send(message):
            sent.append(message)
            if len(sent) > 1:
                await asyncio.Event().wait()

        await ask_app(found, HELLO | {"stream": True}, send)
        return found.state.server.waiting

    assert asyncio.run(asyncio.wait_for(ask(), 10)) == 0
    assert len(sent) == 2
    found.state.server.close()


def test_a_slow_reader_gets_the_rest_at_once(model):
    """What is made while a client reads is one event: the worker waits for nobody."""
    found = app(model)
    options = {"prompt": "the river", "max_tokens": 300, "temperature": 0, "stream": True}
    bodies = []

    async def ask():
        async def send(message):
            bodies.append(message.get("body", b""))
            if len(bodies) == 2:  # the first piece is read until the whole answer is made
                await asyncio.wrap_future(found.state.server.worker.submit(int))

        await ask_app(found, options, send, path="completions")

    asyncio.run(asyncio.wait_for(ask(), 30))
    parts = [json.loads(line[6:]) for line in b"".join(bodies).splitlines() if line[6:7] == b"{"]
    texts = [part["choices"][0]["text"] for part in parts]
    assert "".join(texts) == model.generate("the river", max_new_tokens=300)
    assert len(texts) < 10
    found.state.server.close()


def test_the_event_loop_neither_renders_nor_encodes(serve, model, monkeypatch):
    threads = set()

    def noted(function):
        def call(*arguments, **options):
            threads.add(threading.current_thread().name.rsplit("_", 1)[0])
            return function(*arguments, **options)

        return call

    for name in ("encode", "decode", "chat"):
        monkeypatch.setattr(lq.Tokenizer, name, noted(getattr(lq.Tokenizer, name)))
    url, _ = serve(model)
    assert post(url, **HELLO).status_code == 200
    assert post(url, **HELLO, stream=True).status_code == 200
    assert threads == {"lowbitq-read", "lowbitq-serve"}


def test_an_error_in_mid_stream_is_an_event(serve, model):
    openai = pytest.importorskip("openai")
    url, server = serve(Failing(model, at=4))
    options = HELLO | {"temperature": 0}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=options | {"stream": True}
    ) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    *pieces, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert pieces
    assert all("choices" in piece for piece in pieces)
    assert last["error"]["type"] == "server_error"
    assert last["error"]["message"] == "the answer broke off: NumericalError: a NaN"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="broke off"):
        list(client.chat.completions.create(**options, model="lowbitq", stream=True))
    assert quiet(server)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_piece_has_a_status(serve, model, stream):
    url, server = serve(Failing(model, at=1))
    response = post(url, **HELLO, stream=stream)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the answer broke off: NumericalError: a NaN"
    assert quiet(server)


def test_a_request_has_to_arrive(serve, model):
    url, _ = serve(model, limits=Limits(upload_seconds=0.1), token="gehe\u00efm")

    def trickle():
        yield b'{"prompt": '
        time.sleep(0.5)
        yield b'"x"}'

    headers = {"Authorization": "Bearer gehe\u00efm".encode()}
    response = httpx.post(f"{url}/v1/completions", content=trickle(), headers=headers)
    assert response.status_code == 408
    assert "more than 0.1 s to arrive" in response.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_an_answer_ends_with_its_time(serve, model):
    url, _ = serve(Slow(model, 0.02), limits=Limits(seconds=0.1))
    found = post(url, **HELLO | {"max_tokens": 60}).json()
    assert found["choices"][0]["finish_reason"] in ("length", "stop")
    assert found["usage"]["completion_tokens"] < 20


def test_a_full_queue_is_said(serve, model):
    url, server = serve(Slow(model, 0.02), limits=Limits(waiting=2))
    with ThreadPoolExecutor(6) as clients:
        found = list(clients.map(lambda seed: post(url, **HELLO, seed=seed), range(6)))
    codes = sorted(one.status_code for one in found)
    assert codes[0] == 200
    assert codes[-1] == 503
    assert set(codes) == {200, 503}
    assert quiet(server)


def test_two_hundred_requests_of_eight_clients(serve, model):
    """Whole, streamed, broken off, and a slow reader: equal texts of equal seeds, nothing left."""
    url, server = serve(model)
    threads = threading.active_count()
    others = threading.Event()
    with httpx.Client(base_url=url, timeout=30) as http, ThreadPoolExecutor(9) as clients:

        def ask(number):
            options = HELLO | {"seed": number % 5, "temperature": 0.9, "max_tokens": 4}
            if number % 4:
                answer = http.post("/v1/chat/completions", json=options).json()
                return number % 5, answer["choices"][0]["message"]["content"]
            more = {"stream": True}
            with http.stream("POST", "/v1/chat/completions", json=options | more) as response:
                next(response.iter_lines())
            return None

        def read_slowly():
            options = {"prompt": "the river", "max_tokens": 2000, "temperature": 0, "stream": True}
            with http.stream("POST", "/v1/completions", json=options) as response:
                lines = response.iter_lines()
                first = next(lines)
                assert others.wait(60)
                lines = [first, *lines]
            parts = [json.loads(line[6:]) for line in lines if line[6:7] == "{"]
            return "".join(part["choices"][0]["text"] for part in parts)

        slow = clients.submit(read_slowly)
        found = [one for one in clients.map(ask, range(200)) if one is not None]
        others.set()
        assert slow.result() == model.generate("the river", max_new_tokens=2000)
    assert len(found) == 150
    assert len(set(found)) == len({seed for seed, _ in found})
    assert quiet(server)
    assert threading.active_count() <= threads + 2


def test_addresses_that_others_can_reach():
    assert all(map(is_local, ["localhost", "127.0.0.1", "127.1.2.3", "::1"]))
    assert not any(map(is_local, ["0.0.0.0", "::", "192.168.1.2", "example.org"]))
