"""Asks OpenAI-compatible servers for chat completions.

A request goes to the least busy server. If it fails in a way that may pass, such as a timeout, a dropped
connection or an overloaded server, it is sent again after a delay. A server that fails repeatedly is paused.
An error that every request would meet, such as a wrong key, stops the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import importlib
import io
import json
import math
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from clsp_fast.checks import is_positive, listed, require

if TYPE_CHECKING:
    import aiohttp

RETRIED_STATUS = frozenset({408, 409, 425, 429})
"""HTTP statuses of errors that may pass, besides all of 500 and above."""
STOPPING_STATUS = frozenset({401, 403, 404, 405})
"""HTTP statuses that every request would get: a wrong key, model or address."""
_FAILURES_BEFORE_PAUSE = 3
_LONGEST_PAUSE_S = 60.0
_SHOWN_PAUSE_S = 4.0
_FIRST_PATIENCE_S = 60.0
_LONGEST_RETRY_AFTER_S = 3600.0
_LONGEST_BODY = 2**25
_LARGE_PAYLOAD = 2**20


class ServerError(Exception):
    """No request can succeed until the user changes something. The message names what to change."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which servers are asked, and how patiently."""

    servers: tuple[str, ...] = ()
    """Base URLs of the servers, such as http://localhost:8000/v1. All must serve the same model."""
    model: str = ""
    """Name of the model, as the servers list it under /models."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key. Servers without keys ignore it."""
    concurrency: int = 64
    """Requests that each server works on at the same time."""
    connect_s: float = 10.0
    """Seconds in which a server must accept a connection."""
    timeout_s: float = 300.0
    """Seconds in which a server must answer a request."""
    retries: int = 8
    """How often a request is sent again after errors that may pass."""
    backoff_s: float = 1.0
    """Pause before the first repetition, in seconds. It doubles each time, up to a minute, and varies at
    random. A server's Retry-After has priority."""
    patience_s: float = 900.0
    """The run stops after this many seconds in which every request failed, or if the servers ask for a longer
    pause. At its beginning, one minute suffices, except for timeouts and rate limits."""

    def __post_init__(self) -> None:
        for url in self.servers:
            parts = urlsplit(url)
            expected = "URLs such as http://localhost:8000/v1"
            require(parts.scheme in ("http", "https") and bool(parts.netloc), "server.servers", expected, url)
            require(parts.username is None, "server.servers", "URLs without a password", "one with it")
        require(is_positive(self.concurrency), "server.concurrency", "an integer > 0", self.concurrency)
        require(0 <= self.retries <= 1000, "server.retries", "in [0, 1000]", self.retries)
        for name in ("connect_s", "timeout_s", "backoff_s", "patience_s"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"server.{name}", "seconds > 0", value)

    def require_model(self) -> None:
        """Raises ValueError if the model has no name."""
        require(bool(self.model.strip()), "server.model", "the name of a model", self.model)

    def require_servers(self) -> None:
        """Raises ValueError if no server or no model is named."""
        require(bool(self.servers), "server.servers", "the URL of at least one server", self.servers)
        self.require_model()


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a request: the body of a complete answer, or an error.

    Attributes:
        status: the last HTTP status; 0: no response arrived.
        body: the answer, with at least one choice; None: the request failed.
        error: what went wrong; empty if nothing did.
    """

    status: int
    body: Mapping[str, Any] | None
    error: str = ""


@dataclass(slots=True)
class _Endpoint:
    """A server.

    Attributes:
        url: its base URL, without a slash at the end.
        limit: how many requests it may work on. It falls when the server is overloaded or fails, and grows by
            one with each answer.
        busy: how many requests it works on.
        failures: failures since the last answer.
        paused_until: when it may be asked next, on the clock of the event loop.
        asked_until: the end of the pause that it asked for itself (Retry-After).
    """

    url: str
    limit: int
    busy: int = 0
    failures: int = 0
    paused_until: float = 0.0
    asked_until: float = 0.0

    def pause(self, now: float, seconds: float) -> None:
        self.paused_until = max(self.paused_until, now + seconds)

    def note_failure(self, now: float, backoff_s: float) -> float:
        """Counts a failure. From the third in a row on, the server is paused; then one request tries it.

        Returns the seconds of the pause, 0 if none begins.
        """
        if self.paused_until > now:  # requests that were under way when the pause began
            return 0.0
        self.failures += 1
        doublings = self.failures - _FAILURES_BEFORE_PAUSE
        if doublings < 0:
            return 0.0
        self.limit = 1
        seconds = min(_LONGEST_PAUSE_S, backoff_s * 2.0 ** min(doublings, 30))
        self.pause(now, seconds)
        return seconds

    def note_success(self, concurrency: int) -> None:
        self.failures = 0
        self.limit = min(concurrency, self.limit + 1)


class Client:
    """Sends requests to the servers of a `ServerConfig`. It is an asynchronous context manager.

    Attributes:
        repeated: reason -> how many requests were sent again for it.
    """

    def __init__(self, config: ServerConfig) -> None:
        config.require_servers()
        self._config = config
        urls = dict.fromkeys(url.rstrip("/").removesuffix("/chat/completions") for url in config.servers)
        self._endpoints = [_Endpoint(url, config.concurrency) for url in urls]
        self._key = os.environ.get(config.api_key_env, "").strip()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._random = random.Random()
        self._last_success, self._succeeded = 0.0, False
        self._aiohttp: Any = import_aiohttp()
        self._session: aiohttp.ClientSession
        self.repeated: Counter[str] = Counter()

    @property
    def concurrency(self) -> int:
        """Requests under way at the same time, over all servers."""
        return self._config.concurrency * len(self._endpoints)

    async def __aenter__(self) -> Client:
        aiohttp = self._aiohttp
        self._last_success = asyncio.get_running_loop().time()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = aiohttp.ClientTimeout(total=self._config.timeout_s, sock_connect=self._config.connect_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=limits, headers=headers
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def check(self) -> None:
        """Finds servers that cannot be reached or refuse the key, before any work is done.

        Raises:
            ServerError: no server can be reached, or one refuses the key.
        """
        outcomes = await asyncio.gather(*(self._list_models(endpoint) for endpoint in self._endpoints))
        unreachable = {}
        now = asyncio.get_running_loop().time()
        for endpoint, (status, text, _) in zip(self._endpoints, outcomes, strict=True):
            if status in (401, 403):
                raise self._refused(endpoint, status, text)
            if not status:
                unreachable[endpoint.url] = text
                endpoint.failures, endpoint.limit = _FAILURES_BEFORE_PAUSE, 1
                endpoint.pause(now, self._config.backoff_s)
        reasons = listed([f"{url}: {text}" for url, text in unreachable.items()], separator="; ")
        if len(unreachable) == len(self._endpoints):
            raise ServerError(f"no server answers: {reasons}; start it, or correct --server.servers")
        if unreachable:
            _warn(f"not reachable so far: {reasons}")

    async def complete(self, payload: bytes) -> Reply:
        """Sends the JSON of one chat completion until it is answered, refused, or failed too often.

        Raises:
            ServerError: every request would fail.
        """
        loop = asyncio.get_running_loop()
        for attempt in range(self._config.retries + 1):
            endpoint = await self._acquire()
            try:
                reply, reason, retry_after = await self._post(endpoint, payload)
            finally:
                self._release(endpoint)
            now = loop.time()
            if not reason:
                endpoint.note_success(self._config.concurrency)
                self._last_success, self._succeeded = now, True
                return reply
            if reply.status in STOPPING_STATUS or 300 <= reply.status < 400:
                raise await self._explained(endpoint, reply)
            if reason == "refused":
                # The request is at fault, not the server.
                endpoint.note_success(self._config.concurrency)
                self._last_success = now
                return reply
            self._note_failure(endpoint, reply, reason, now, retry_after)
            if attempt == self._config.retries:
                break
            self.repeated[reason] += 1
            if retry_after is None:
                pause = min(_LONGEST_PAUSE_S, self._config.backoff_s * 2.0**attempt)
                await asyncio.sleep(pause * self._random.uniform(0.5, 1.0))
        return reply

    def _note_failure(
        self, endpoint: _Endpoint, reply: Reply, reason: str, now: float, retry_after: float | None
    ) -> None:
        """Slows down or pauses the server. ServerError if every request failed for too long."""
        if retry_after is not None or reply.status == 429:
            pause = retry_after or 0.0
            already = endpoint.paused_until - now
            endpoint.limit = max(1, endpoint.limit // 2)
            endpoint.pause(now, pause)
            endpoint.asked_until = max(endpoint.asked_until, now + pause)
            pause = 0.0 if already > pause / 2 else pause
        else:
            pause = endpoint.note_failure(now, self._config.backoff_s)
        if pause >= _SHOWN_PAUSE_S:
            _warn(f"{endpoint.url}: {reply.error}; it is asked again in {pause:.0f} s")
        patience = self._config.patience_s
        if not self._succeeded and retry_after is None and reason not in ("timeout", "HTTP 429"):
            patience = min(patience, _FIRST_PATIENCE_S)
        # A request that is under way may still succeed.
        if now - self._last_success > patience and not any(e.busy for e in self._endpoints):
            raise ServerError(
                f"every request failed for {now - self._last_success:.0f} s, the last one because of: "
                f"{reply.error}; see what the server says. The same command then continues the work"
            )

    async def _acquire(self) -> _Endpoint:
        """The least busy server that is not paused. Waits for one if there is none."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            free = [e for e in self._endpoints if e.paused_until <= now and e.busy < e.limit]
            if free:
                endpoint = min(free, key=lambda e: e.busy)
                endpoint.busy += 1
                return endpoint
            self._check_pauses(now)
            pauses = [e.paused_until - now for e in self._endpoints if e.paused_until > now]
            ready = loop.create_future()
            self._waiting.append(ready)
            # asyncio.wait_for of Python 3.11 and older may swallow the cancellation that ends a run.
            await asyncio.wait([ready], timeout=min(pauses, default=None))
            ready.cancel()

    def _check_pauses(self, now: float) -> None:
        """ServerError if all servers ask for a pause that is longer than the patience."""
        endpoint = min(self._endpoints, key=lambda e: e.asked_until)
        pause, patience = endpoint.asked_until - now, self._config.patience_s
        if pause > patience and not any(e.busy for e in self._endpoints):
            raise ServerError(
                f"{endpoint.url} asks for a pause of {pause:.0f} s, which is longer than --server.patience-s "
                f"({patience:g}); run the same command later, or with more patience"
            )

    def _release(self, endpoint: _Endpoint) -> None:
        endpoint.busy -= 1
        # The limit may have grown, so that two may begin for one that ended.
        for _ in range(2):
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft()
            if self._waiting:
                self._waiting.popleft().set_result(None)

    async def _post(self, endpoint: _Endpoint, payload: bytes) -> tuple[Reply, str, float | None]:
        """One attempt: the reply, why it failed ("" if it did not), and the seconds of Retry-After."""
        # aiohttp asks for a stream if the body is large, so that sending it does not block the event loop.
        data = payload if len(payload) < _LARGE_PAYLOAD else io.BytesIO(payload)
        url = f"{endpoint.url}/chat/completions"
        try:
            async with self._session.post(url, data=data, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                body = await _read_body(response)
        except asyncio.TimeoutError:  # before the others: aiohttp's timeouts are also ClientErrors
            return Reply(0, None, f"{url}: no answer in time"), "timeout", None
        except (self._aiohttp.ClientError, OSError) as error:
            return Reply(0, None, f"{url}: {self._clean(describe(error))}"), "connection", None
        if status != 200:
            reply = Reply(status, None, f"HTTP {status}: {self._clean(error_message(body))}")
            if status in RETRIED_STATUS or status >= 500:
                return reply, f"HTTP {status}", retry_after_s(headers.get("Retry-After"))
            return reply, "refused", None
        return (*_parse_answer(body), None)

    async def _list_models(self, endpoint: _Endpoint) -> tuple[int, str, list[str]]:
        """HTTP status (0: not reached), error, and the names of the models that a server lists."""
        url = f"{endpoint.url}/models"
        timeout = self._aiohttp.ClientTimeout(total=3 * self._config.connect_s)
        try:
            async with self._session.get(url, timeout=timeout) as response:
                status, body = response.status, await _read_body(response)
        except asyncio.TimeoutError:
            return 0, "no answer in time", []
        except (self._aiohttp.ClientError, OSError) as error:
            return 0, self._clean(describe(error)), []
        if status != 200:
            return status, self._clean(error_message(body)), []
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            value = json.loads(body)
            models = value["data"] if isinstance(value, dict) else value
            return status, "", [str(model["id"]) for model in models]
        return status, "", []

    async def _explained(self, endpoint: _Endpoint, reply: Reply) -> ServerError:
        """The error of a status that every request would get, with the way to correct it."""
        if reply.status in (401, 403):
            return self._refused(endpoint, reply.status, reply.error)
        hint = await self.hint_at_model(endpoint.url)
        where = "check --server.servers: a base URL usually ends in /v1"
        return ServerError(f"{endpoint.url}: {reply.error}; {hint or where}")

    async def hint_at_model(self, url: str = "") -> str:
        """What to do if a server lists other models than the one that is asked for; empty if none does."""
        for endpoint in self._endpoints:
            if url in ("", endpoint.url):
                _, _, models = await self._list_models(endpoint)
                if models and self._config.model not in models:
                    return (
                        f"{endpoint.url} does not serve {self._config.model!r}, it serves "
                        f"{listed(models)}: correct --server.model"
                    )
        return ""

    def _refused(self, endpoint: _Endpoint, status: int, text: str) -> ServerError:
        name = self._config.api_key_env
        text = text if text.startswith("HTTP") else f"HTTP {status}: {text}"
        if self._key:
            return ServerError(
                f"{endpoint.url} refuses the key in the environment variable {name}: {text}; correct the key"
            )
        return ServerError(
            f"{endpoint.url} refuses requests without a key: {text}; "
            f"put the key into the environment variable {name} (--server.api-key-env)"
        )

    def _clean(self, text: str) -> str:
        """An error without the key, which servers may repeat, and in one line."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())


def _warn(text: str) -> None:
    """A line on standard error, below the progress line."""
    lead = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    print(f"{lead}warning: {text}", file=sys.stderr)


def import_aiohttp() -> Any:
    """The HTTP library. ImportError names the extra that installs it."""
    try:
        return importlib.import_module("aiohttp")
    except ModuleNotFoundError as error:
        raise ImportError("requests to servers need aiohttp: pip install 'clsp_fast[caption]'") from error


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    """The body, cut to a size that no answer has, so that a server cannot fill the memory."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > _LONGEST_BODY:
            response.close()
            break
    return b"".join(parts)


def _parse_answer(body: bytes) -> tuple[Reply, str]:
    """The reply for a response with status 200, and why it cannot be used ("" if it can)."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return Reply(200, None, "the answer is not JSON"), "invalid JSON"
    if not isinstance(value, dict) or not isinstance(value.get("choices"), list):
        return Reply(200, None, f"the answer has no choices: {error_message(body)}"), "no choices"
    if not value["choices"] or not all(isinstance(choice, dict) for choice in value["choices"]):
        return Reply(200, None, "the answer has an empty list of choices"), "no choices"
    return Reply(200, value), ""


def error_message(body: bytes) -> str:
    """The message of an error's body, as text or JSON: in "error", "message" or "detail", nested or not."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body[:300].decode("utf-8", "replace")
    if isinstance(value, dict):
        value = value.get("error") or value
    if isinstance(value, dict):
        value = value.get("message") or value.get("detail") or value
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:300]


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait, at most an hour; None without a usable header.

    The header holds seconds or a date (RFC 9110, section 10.2.3).
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), _LONGEST_RETRY_AFTER_S)


def describe(error: BaseException) -> str:
    """An exception as text; its type if it has no message."""
    return str(error) or type(error).__name__
