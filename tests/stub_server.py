"""A server on loopback that speaks the OpenAI protocol and fails on request.

Its answers depend on nothing but the request, so that any order of sending gives the same answers. Tests use
`StubServer` in a thread; `python tests/stub_server.py` serves from a process of its own until its standard
input is closed, and first prints its URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

Body = dict[str, Any]
MODEL = "stub-captioner"
# Faults of the transport: what the server does instead of answering.
TRANSPORT = ("429", "429 date", "500", "503", "slow", "hang", "reset", "400", "flat 400", "401", "404")
# Faults of an answer that arrives with status 200.
ANSWERS = ("no choices", "null content", "invalid JSON", "half JSON")
# Faults of a text: its first candidate breaks a rule.
TEXTS = ("truncated", "newline", "quotation", "negation", "first speaker", "think", "short", "reasoning")

VOICES = ("A low male voice", "A bright female voice", "A soft, breathy voice", "A firm and resonant voice")
BEGINS = (
    "begins quietly and at a measured pace",
    "starts with energy, the pitch high from the first word",
    "opens hesitantly, with a long pause after the first phrase",
)
MIDDLES = (
    "then the tempo rises and the pitch moves in wide steps",
    "then the loudness swells over several words while the tone stays warm",
    "then the delivery turns slow, each syllable drawn out with care",
)
ENDS = (
    "and the last phrase falls in pitch and fades into a murmur.",
    "and the ending is crisp, loud and confident.",
    "and the sentence closes on a rising, almost questioning note.",
)


def key_of(body: Body) -> str:
    """A digest of a request's messages and seed: what the answer depends on."""
    text = json.dumps([body.get("messages"), body.get("seed")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def caption(key: str, candidate: int) -> str:
    """A caption of 130 to 260 characters that breaks no rule."""
    digest = hashlib.sha256(f"{key}/{candidate}".encode()).digest()
    parts = [
        words[byte % len(words)]
        for words, byte in zip((VOICES, BEGINS, MIDDLES, ENDS), digest[:4], strict=True)
    ]
    return f"{parts[0]} {parts[1]}, {parts[2]}, {parts[3]}"


def spoiled(text: str, fault: str) -> tuple[str | None, str]:
    """The text with a fault, and its finish_reason."""
    if fault == "truncated":
        return text[: len(text) // 2], "length"
    changed: dict[str, str | None] = {
        "newline": text.replace(", ", ",\n", 1),
        "quotation": f'{text} The voice says "come here at once".',
        "negation": f"{text} There is no hesitation in it.",
        "first speaker": f"The first speaker is heard alone. {text}",
        "think": f"<think>\nThe clip is calm.\n</think>\n\n{text}",
        "short": text[:60],
        "null content": None,
    }
    return changed.get(fault, text), "stop"


def no_fault(body: Body, attempt: int) -> str:
    """The faults of a server that works."""
    return ""


class StubServer:
    """A server in a thread. It is a context manager.

    Args:
        fault: called with a request and how often it was sent before; returns the name of a fault or "".
        content: called with a request; returns the content of its choices, or None for captions. Tests of the
            verifier and the judge pass their answers here.
        delay_s: seconds that an answer takes.
        slow_s: seconds that the fault "slow" takes.
        key: if not empty, the API key that requests must have.
        choices: at most this many choices an answer, as servers that ignore `n`; None: as many as asked.
        port: port to listen on; 0: any.

    Attributes:
        url: base URL.
        sent: key of a request -> how often it arrived.
        faults: fault -> how often it was played.
        most_at_once: the largest number of requests that were being answered at the same time.
        bodies: the requests, if `keep` is true.
    """

    def __init__(
        self,
        *,
        fault: Callable[[Body, int], str] = no_fault,
        content: Callable[[Body], str | None] = lambda body: None,
        delay_s: float = 0.0,
        slow_s: float = 0.2,
        key: str = "",
        choices: int | None = None,
        keep: bool = False,
        port: int = 0,
    ) -> None:
        self.fault, self.content, self.delay_s, self.slow_s = fault, content, delay_s, slow_s
        self.key, self.choices, self.keep, self.port = key, choices, keep, port
        self.sent: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.bodies: list[Body] = []
        self.busy = self.most_at_once = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> StubServer:
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=1024)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def _unauthorised(self, request: web.Request) -> web.Response | None:
        sent = request.headers.get("Authorization", "")
        if not self.key or sent == f"Bearer {self.key}":
            return None
        # Some servers repeat the key in their message.
        return error(401, f"Incorrect API key provided: {sent.removeprefix('Bearer ')}.")

    async def _models(self, request: web.Request) -> web.Response:
        models = [{"id": MODEL, "object": "model"}]
        return self._unauthorised(request) or web.json_response({"object": "list", "data": models})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.busy += 1
        self.most_at_once = max(self.most_at_once, self.busy)
        try:
            return await self._outcome(request)
        finally:
            self.busy -= 1

    async def _outcome(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._unauthorised(request):
            return refusal
        body = await request.json()
        if body.get("model") != MODEL:
            return error(404, f"The model `{body.get('model')}` does not exist.")
        key = key_of(body)
        fault = self.fault(body, self.sent[key])
        self.sent[key] += 1
        if self.keep:
            self.bodies.append(body)
        if fault:
            self.faults[fault] += 1
        if response := await self._transport_fault(request, fault):
            return response
        if self.delay_s or fault == "slow":
            await asyncio.sleep(self.slow_s if fault == "slow" else self.delay_s)
        answer = self.answer(body, fault)
        if fault == "invalid JSON":
            return web.Response(text="<html>busy</html>", content_type="application/json")
        text = json.dumps(answer)
        if fault == "half JSON":
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json")

    async def _transport_fault(self, request: web.Request, fault: str) -> web.Response | None:
        if fault == "429":
            return error(429, "Rate limit reached.", {"Retry-After": "0.2"})
        if fault.startswith("503 "):  # with the seconds of the pause that the server asks for
            return error(503, "Closed.", {"Retry-After": fault[4:]})
        if fault == "429 date":
            return error(429, "Rate limit.", {"Retry-After": email.utils.formatdate(time.time() + 1)})
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "flat 400":
            flat = {"object": "error", "message": "The prompt is too long.", "code": 400}
            return web.json_response(flat, status=400)
        return error(int(fault), f"Fault {fault}.") if fault.isdigit() else None

    def answer(self, body: Body, fault: str = "") -> Body:
        """The body of an answer with status 200."""
        key, content = key_of(body), self.content(body)
        count = min(body.get("n") or 1, self.choices or 1000)
        choices = []
        for i in range(count):
            text, reason = (caption(key, i), "stop") if content is None else (content, "stop")
            if i == 0:
                text, reason = spoiled(text, fault)
            message: Body = {"role": "assistant", "content": text}
            if fault == "reasoning":
                message["reasoning_content"] = "The clip is calm."
            choices.append({"index": i, "message": message, "finish_reason": reason})
        usage = {"prompt_tokens": 100, "completion_tokens": 10 * count, "total_tokens": 100 + 10 * count}
        common = {"id": f"chatcmpl-{key}", "object": "chat.completion", "model": MODEL, "usage": usage}
        return common | {"choices": [] if fault == "no choices" else choices}


def error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """An error in the nested shape."""
    body = {"error": {"message": message, "type": "stub", "code": status}}
    return web.json_response(body, status=status, headers=headers)


@contextlib.contextmanager
def stub_process(*words: str) -> Iterator[str]:
    """Runs the server in a process of its own. Gives its base URL."""
    import subprocess

    command = [sys.executable, __file__, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


if __name__ == "__main__":
    with StubServer(delay_s=float(sys.argv[1]) if sys.argv[1:] else 0.0) as server:
        print(server.url, flush=True)
        sys.stdin.read()
