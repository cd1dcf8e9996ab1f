"""A chat service on the loopback address that does what real ones do on bad days, the same on every run.

Each conversation has a right reply, a function of its words. Before it comes, the service may fail a few times: which
way, and how often, is a function of the words too. Every request is written down with how long it was worked on.
For tests, ours and those of other judges; needs the standard library only.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "hang", "malformed", "truncated", "empty", "broken")
Reply = Callable[[Sequence[Mapping[str, str]]], str]


def rating_reply(messages: Sequence[Mapping[str, str]]) -> str:
    """`Rating: [[x]]`, x from 1 to 10 by the words of the last message."""
    return f"It is what it is. Rating: [[{1 + _number(messages, 'rating') % 10}]]"


def _number(messages: Sequence[Mapping[str, str]], salt: str) -> int:
    text = salt + "".join(message["content"] for message in messages)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass
class StubService:
    """The service; `url` is its address. Use it as a context manager."""

    reply: Reply = rating_reply
    seconds: float = 0.0
    """Time to answer, also with an error."""
    fault_share: float = 0.0
    """Share of conversations that meet faults before their reply."""
    faults: Sequence[str] = FAULTS
    slow_share: float = 0.0
    """Share of conversations whose reply takes three times as long."""
    hang_seconds: float = 3.0
    retry_after: str = "0.2"
    refuse: tuple[int, str] | None = None
    """Status and message for every request."""
    key: str | None = None
    """Requests must carry it."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Body, path, status, begin and seconds of every request, in the order of their beginnings; while one is worked on,
    its status is None."""

    def __enter__(self) -> "StubService":
        self._lock = threading.Lock()
        self._tries: Counter[int] = Counter()
        self._closing = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else the body waits 40 ms for the receipt of the headers

            def do_POST(self) -> None:
                service.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a killed client

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def seconds_worked(self) -> float:
        """Sum over all requests."""
        return sum(float(request["seconds"]) for request in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        begin = time.monotonic()
        length = int(handler.headers["Content-Length"])
        body = json.loads(handler.rfile.read(length))
        request = {"body": body, "status": None, "begin": begin, "seconds": 0.0, "path": handler.path}
        self.requests.append(request)
        status, send = self._respond(handler, body)
        # Before the client hears of it: a test that has its reply may look here at once.
        request.update(status=status, seconds=time.monotonic() - begin)
        send()

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> tuple[str, Callable[[], None]]:
        """Takes the time that an answer takes; what it is, and what sends it."""
        messages = body["messages"]
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return self._error(handler, 401, f"Incorrect API key provided: {handler.headers.get('Authorization')}")
        if self.refuse is not None:
            return self._error(handler, *self.refuse)
        number = _number(messages, "fault")
        with self._lock:
            attempt = self._tries[number]
            self._tries[number] += 1
        slow = _number(messages, "slow") % 1000 < 1000 * self.slow_share
        time.sleep(self.seconds * (3 if slow else 1))
        if number % 1000 < 1000 * self.fault_share and attempt < 1 + number % 2:
            return self._fault(handler, self.faults[(number // 1000 + attempt) % len(self.faults)])
        return "200", partial(_send, handler, 200, _completion(body, self.reply(messages)))

    def _fault(self, handler: BaseHTTPRequestHandler, fault: str) -> tuple[str, Callable[[], None]]:
        if fault == "429":
            return self._error(handler, 429, "slow down", {"Retry-After": self.retry_after})
        if fault == "500":
            return self._error(handler, 500, "something broke")
        if fault == "malformed":
            return fault, partial(_send, handler, 200, b'{"choices": [{"message": {"content": "Rat')
        if fault == "empty":
            return fault, partial(_send, handler, 200, _completion({"model": "stub"}, ""))
        handler.close_connection = True
        if fault == "truncated":
            return fault, partial(_send, handler, 200, b'{"choices": [{"message"', announced=5000)
        if fault == "hang":
            self._closing.wait(self.hang_seconds)
        return fault, handler.connection.close

    @staticmethod
    def _error(
        handler: BaseHTTPRequestHandler, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> tuple[str, Callable[[], None]]:
        body = json.dumps({"error": {"message": message, "type": "stub", "code": None}}).encode()
        return str(status), partial(_send, handler, status, body, headers)


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    announced: int | None = None,
) -> None:
    """Sends a response; `announced` is the length it claims, if not its own."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body) if announced is None else announced))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def _completion(body: Mapping[str, Any], text: str) -> bytes:
    reason = "stop"
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10**9
    words = text.split(" ")
    if len(words) > limit:
        text, reason = " ".join(words[:limit]), "length"
    completion = {
        "model": f"{body['model']}-2026-01-01",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": len(words)},
    }
    return json.dumps(completion).encode()
