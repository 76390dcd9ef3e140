"""The client of chat servers against a server that fails in every way that it can."""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import json
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from stub_server import MODEL, StubServer, caption, key_of

from clsp_fast.captioning import client
from clsp_fast.captioning.answers import answer_line, parse_answer
from clsp_fast.captioning.client import (
    Client,
    Reply,
    ServerConfig,
    ServerError,
    error_message,
    retry_after_s,
)

Result = TypeVar("Result")
BODY: dict[str, Any] = {"model": MODEL, "seed": 7, "messages": [{"role": "user", "content": "Describe."}]}


def config(*servers: StubServer, **options: Any) -> ServerConfig:
    """A configuration that waits little."""
    urls = tuple(server.url for server in servers)
    waits: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 10.0, "retries": 4}
    return ServerConfig(**{"servers": urls, "model": MODEL, **waits, **options})


def use(settings: ServerConfig, work: Callable[[Client], Awaitable[Result]]) -> tuple[Result, Client]:
    async def main() -> tuple[Result, Client]:
        async with Client(settings) as client:
            return await work(client), client

    return asyncio.run(main())


def complete(settings: ServerConfig, body: dict[str, Any] = BODY) -> tuple[Reply, Client]:
    return use(settings, lambda client: client.complete(json.dumps(body).encode()))


def complete_many(settings: ServerConfig, count: int) -> tuple[list[Reply], Client]:
    async def work(client: Client) -> list[Reply]:
        payloads = [json.dumps(BODY | {"seed": seed}).encode() for seed in range(count)]
        return await asyncio.gather(*map(client.complete, payloads))

    return use(settings, work)


def free_url() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("408", "HTTP 408"),
        ("409", "HTTP 409"),
        ("425", "HTTP 425"),
        ("429", "HTTP 429"),
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("reset", "connection"),
        ("no choices", "no choices"),
        ("invalid JSON", "invalid JSON"),
        ("half JSON", "invalid JSON"),
    ],
)
def test_a_fault_that_passes_is_survived(fault: str, reason: str) -> None:
    with StubServer(fault=lambda body, attempt: fault if attempt < 2 else "") as server:
        reply, client = complete(config(server))
    assert reply.body is not None
    assert reply.body["choices"][0]["message"]["content"] == caption(key_of(BODY), 0)
    assert (reply.status, reply.error) == (200, "")
    assert client.repeated == {reason: 2}
    assert server.sent == {key_of(BODY): 3}


def test_a_server_that_hangs_is_asked_again() -> None:
    with StubServer(fault=lambda body, attempt: "" if attempt else "hang") as server:
        reply, client = complete(config(server, timeout_s=0.3))
    assert reply.body is not None
    assert client.repeated == {"timeout": 1}


def test_retry_after_is_kept_to() -> None:
    with StubServer(fault=lambda body, attempt: "" if attempt else "429") as server:
        started = time.monotonic()
        complete(config(server))
        assert time.monotonic() - started >= 0.2
    with StubServer(fault=lambda body, attempt: "" if attempt else "429 date") as server:
        reply, _ = complete(config(server))
        assert reply.body is not None


def test_retry_after_as_seconds_and_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < (retry_after_s(date) or 0) <= 30
    values = ("1.5", "0", "-3", "1e9", email.utils.formatdate(0), None, "soon", "nan", "")
    assert [retry_after_s(value) for value in values] == [1.5, 0, 0, 3600, 0, None, None, None, None]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("400", "HTTP 400: Fault 400."),
        ("flat 400", "HTTP 400: The prompt is too long."),
        ("413", "HTTP 413: Fault 413."),
        ("422", "HTTP 422: Fault 422."),
    ],
)
def test_a_refused_request_is_not_sent_again(fault: str, message: str) -> None:
    with StubServer(fault=lambda body, attempt: fault) as server:
        reply, client = complete(config(server))
    assert (reply.body, reply.error) == (None, message)
    assert server.sent.total() == 1
    assert not client.repeated


def test_a_fault_that_stays_ends_after_the_retries() -> None:
    with StubServer(fault=lambda body, attempt: "500") as server:
        reply, client = complete(config(server, retries=3))
    assert (reply.status, reply.body, reply.error) == (500, None, "HTTP 500: Fault 500.")
    assert server.sent.total() == 4
    assert client.repeated == {"HTTP 500": 3}


def test_a_large_request_and_null_content_arrive() -> None:
    large = BODY | {"messages": [{"role": "user", "content": "x" * 3_000_000}], "n": 3}
    with StubServer(fault=lambda body, attempt: "null content") as server:
        reply, _ = complete(config(server), large)
    answer = parse_answer(answer_line("0.0/generate/a", reply))
    key = key_of(large)
    assert answer.texts == ("", caption(key, 1), caption(key, 2))
    assert answer.error is None


def test_reasoning_is_not_part_of_the_text() -> None:
    with StubServer(fault=lambda body, attempt: "reasoning") as server:
        reply, _ = complete(config(server))
    line = answer_line("0.0/generate/a", reply)
    assert parse_answer(line).texts == (caption(key_of(BODY), 0),)
    assert b"calm" not in line


@pytest.mark.parametrize("sent", ["", "a-wrong-secret"])
def test_a_wrong_key_stops_and_is_never_shown(sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", sent)
    with StubServer(key="right") as server:
        settings = config(server, api_key_env="MY_KEY")
        for work in (Client.check, lambda client: client.complete(json.dumps(BODY).encode())):
            with pytest.raises(ServerError, match="environment variable MY_KEY") as stop:
                use(settings, work)
            assert "HTTP 401: Incorrect API key" in str(stop.value)
            assert "secret" not in str(stop.value)
        monkeypatch.setenv("MY_KEY", "right")
        use(settings, Client.check)
        assert complete(settings)[0].body is not None


def test_a_wrong_model_stops_and_the_served_models_are_named() -> None:
    with StubServer() as server:
        match = f"HTTP 404.*does not serve 'other', it serves {MODEL}: correct --server.model"
        with pytest.raises(ServerError, match=match):
            complete(config(server, model="other"), BODY | {"model": "other"})
        with pytest.raises(ServerError, match=r"HTTP 404.*a base URL usually ends in /v1"):
            complete(config(servers=(server.url + "/v1",)))


def test_the_least_busy_server_is_asked() -> None:
    with StubServer(delay_s=0.02) as a, StubServer(delay_s=0.02) as b:
        replies, client = complete_many(config(a, b, concurrency=4), 80)
        assert client.concurrency == 8
    assert all(reply.body for reply in replies)
    assert a.sent.total() + b.sent.total() == 80
    assert min(a.sent.total(), b.sent.total()) >= 20
    assert a.most_at_once <= 4
    assert b.most_at_once <= 4


def test_a_server_that_fails_is_paused_and_the_other_one_does_the_work() -> None:
    with StubServer(fault=lambda body, attempt: "500") as bad, StubServer(delay_s=0.005) as good:
        replies, _ = complete_many(config(bad, good, concurrency=8, backoff_s=0.2, retries=8), 200)
    assert all(reply.body for reply in replies)
    assert good.sent.total() == 200
    assert bad.sent.total() < 40


def test_a_paused_server_comes_back() -> None:
    until = time.monotonic() + 0.3
    with StubServer(fault=lambda body, attempt: "503" if time.monotonic() < until else "") as server:
        replies, _ = complete_many(config(server, concurrency=8, retries=30), 60)
    assert all(reply.body for reply in replies)
    assert server.faults["503"] < 60


def test_servers_that_cannot_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    gone = free_url()
    with pytest.raises(ServerError, match=rf"no server answers: {gone}: .*start it, or correct --server"):
        use(config(servers=(gone,)), Client.check)

    async def check_and_complete(client: Client) -> Reply:
        await client.check()
        return await client.complete(json.dumps(BODY).encode())

    with StubServer() as server:
        reply, _ = use(config(servers=(gone, server.url)), check_and_complete)
        assert reply.body is not None
    assert f"warning: not reachable so far: {gone}" in capsys.readouterr().err


def test_a_run_in_which_everything_fails_says_so_and_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "_FIRST_PATIENCE_S", 0.3)
    monkeypatch.setattr(client, "_SHOWN_PAUSE_S", 0.04)
    with (
        StubServer(fault=lambda body, attempt: "503") as server,
        pytest.raises(ServerError, match=r"every request failed for \d s, .*HTTP 503: Fault 503\.; see what"),
    ):
        complete_many(config(server, retries=1000, concurrency=4), 10)
    warning = f"warning: {server.url}: HTTP 503: Fault 503.; it is asked again in 0 s"
    assert 2 <= capsys.readouterr().err.splitlines().count(warning) <= 6
    # Later in the run, and for rate limits, there is more patience.
    fault = lambda body, attempt: "429" if attempt < 3 else ""  # noqa: E731
    with StubServer(fault=fault) as server:
        replies, _ = complete_many(config(server, retries=30, patience_s=30.0, concurrency=4), 4)
    assert all(reply.body for reply in replies)
    with (
        StubServer(fault=lambda body, attempt: "500" if body["seed"] else "") as server,
        pytest.raises(ServerError, match="every request failed for 1 s"),
    ):
        complete_many(config(server, retries=1000, patience_s=0.8, concurrency=1), 2)


def test_a_pause_that_the_server_asks_for_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PATIENCE_S", 0.1)
    with StubServer(fault=lambda body, attempt: "" if attempt > 1 else "503 0.3") as server:
        reply, _ = complete(config(server))
    assert reply.body is not None


def test_a_pause_that_is_longer_than_the_patience_ends_the_run_at_once() -> None:
    with StubServer(fault=lambda body, attempt: "503 3600") as first:
        match = r"asks for a pause of 3600 s, which is longer than --server.patience-s \(900\); run the same"
        with pytest.raises(ServerError, match=match):
            complete_many(config(first, concurrency=4), 10)
        # Another server can go on.
        with StubServer(delay_s=0.01) as second:
            replies, _ = complete_many(config(first, second, concurrency=2), 20)
    assert all(reply.body for reply in replies)


def test_the_message_of_an_error_in_any_shape() -> None:
    shapes = {
        '{"error": {"message": "nested"}}': "nested",
        '{"object": "error", "message": "flat"}': "flat",
        '{"error": "text"}': "text",
        '{"detail": "detail"}': "detail",
        '{"detail": [{"loc": 1}]}': '[{"loc": 1}]',
        "<html>": "<html>",
        '["a"]': '["a"]',
        "null": "null",
    }
    assert {body: error_message(body.encode()) for body in shapes} == shapes
    assert len(error_message(b"x" * 10**6)) == 300


def test_without_aiohttp_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"pip install 'clsp_fast\[caption\]'"):
        Client(ServerConfig(servers=("http://localhost/v1",), model="m"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"servers": ("localhost:8000",)}, r"server\.servers must be URLs such as http://localhost:8000/v1"),
        ({"servers": ("http://user:pw@host/v1",)}, "URLs without a password, got 'one with it'"),
        ({"concurrency": 0}, r"server\.concurrency must be an integer > 0, got 0"),
        ({"timeout_s": -1.0}, r"server\.timeout_s must be seconds > 0"),
        ({"retries": -1}, r"server\.retries must be in \[0, 1000\]"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ServerConfig(**options)
    with pytest.raises(ValueError, match="the URL of at least one server"):
        Client(ServerConfig(model="m"))
    with pytest.raises(ValueError, match="the name of a model"):
        Client(ServerConfig(servers=("http://localhost/v1",)))


def test_requests_sent_again_are_counted_by_reason() -> None:
    def fault(body: dict[str, Any], attempt: int) -> str:
        return ("", "500", "invalid JSON", "429")[body["seed"] % 4] if not attempt else ""

    with StubServer(fault=fault) as server:
        replies, client = complete_many(config(server, concurrency=8), 40)
    assert all(reply.body for reply in replies)
    assert client.repeated == Counter({"HTTP 500": 10, "invalid JSON": 10, "HTTP 429": 10})
    assert server.sent.total() == 70
