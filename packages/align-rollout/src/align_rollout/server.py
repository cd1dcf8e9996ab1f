"""Completions over HTTP in OpenAI's form, whole or token by token, and weight updates: one engine, many requests.

Bound to localhost unless told otherwise; every request needs the token. Weights come as files in shared memory, so the
sender is on the same host. Standard library only.
"""

import contextlib
import hmac
import json
import select
import socket
from collections.abc import Generator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from align_core.config import EngineConfig
from align_core.errors import AlignError, DataError
from align_core.text import Tokenizer
from align_rollout.forms import error
from align_rollout.service import ClientGoneError, Engine, EngineFailedError, Service

TOKEN_VARIABLE = "ALIGN_ROLLOUT_TOKEN"
_LONGEST_BODY = 16 << 20
_COMPLETIONS = {"/v1/completions": False, "/v1/chat/completions": True}
_UPDATES = {f"/weights/{step}": step for step in ("begin", "load", "commit")}


class RolloutServer(ThreadingHTTPServer):
    """An HTTP server over a `Service`."""

    daemon_threads = True
    request_queue_size = 1024  # with the 5 of the standard library, some of a dozen clients that come at once are reset

    def __init__(self, address: tuple[str, int], service: Service, token: str) -> None:
        self.service, self.token = service, token
        super().__init__(address, _Handler)

    def server_close(self) -> None:
        """Frees the port and stops delivering."""
        super().server_close()
        self.service.close()


def make_server(
    engine: Engine, tokenizer: Tokenizer, *, config: EngineConfig, host: str, port: int, token: str
) -> RolloutServer:
    """A server that is bound and not yet serving; call `serve_forever`."""
    return RolloutServer((host, port), Service(engine, tokenizer, config), token)


class _Handler(BaseHTTPRequestHandler):
    server: RolloutServer
    timeout = 60  # seconds; a client that sends and reads nothing would hold its thread for ever

    def do_GET(self) -> None:
        """Health and the name of the model."""
        if self.path == "/health":
            try:
                self.server.service.check_alive()
            except EngineFailedError as failure:
                self._answer(503, error(str(failure)))
            else:
                self._answer(200, {"status": "ok"})
        elif self._allowed() and self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": self.server.service.name, "object": "model"}]})
        elif self._allowed(answer=False):
            self._answer(404, error(f"no page {self.path}"))

    def do_POST(self) -> None:
        """Completions and weight updates."""
        if not self._allowed():
            return
        try:
            if self.path in _COMPLETIONS:
                self._complete(self._body(), chat=_COMPLETIONS[self.path])
            elif self.path in _UPDATES:
                self._answer(200, self.server.service.update(_UPDATES[self.path], self._body()))
            else:
                self._answer(404, error(f"no page {self.path}; there are {sorted([*_COMPLETIONS, *_UPDATES])}"))
        except (ClientGoneError, ConnectionError, TimeoutError):
            self.close_connection = True
        except EngineFailedError as failure:
            self._answer(503, error(str(failure)))
        except (AlignError, KeyError, TypeError, ValueError, OverflowError) as refusal:
            self._answer(400, error(_said(refusal)))
        except Exception as failure:  # the client is told, whatever an engine raises
            self._answer(500, error(f"the engine failed: {failure!r}"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet: a request may hold what does not belong in a log."""

    def _complete(self, body: Mapping[str, Any], *, chat: bool) -> None:
        service = self.server.service
        if body.get("stream"):
            self._stream(service.stream(body, chat=chat, gone=self._gone))
        else:
            self._answer(200, service.complete(body, chat=chat, gone=self._gone))

    def _stream(self, events: Generator[dict[str, Any], None, None]) -> None:
        """Server-sent events; the end of the connection is the end of the answer."""
        begun = False
        with contextlib.closing(events):  # which aborts what is left, once the first event was asked for
            try:
                for event in events:
                    if not begun:
                        self._begin_events()
                        begun = True
                    self._event(json.dumps(event))
            except (ClientGoneError, ConnectionError, TimeoutError):
                raise
            except Exception as refusal:
                if not begun:
                    raise
                self._event(json.dumps(error(_said(refusal))))  # too late for a status
                return
        self._event("[DONE]")

    def _begin_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _gone(self) -> bool:
        """Whether the client has closed its end: it sends nothing after its request, so any news is the end."""
        news = select.poll()
        news.register(self.connection, select.POLLIN)
        try:
            return bool(news.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _allowed(self, *, answer: bool = True) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        allowed = hmac.compare_digest(given.encode(), self.server.token.encode())
        if not allowed and answer:
            self._answer(401, error("give the server's token as 'Authorization: Bearer TOKEN'"))
        return allowed

    def _body(self) -> Mapping[str, Any]:
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 <= length <= _LONGEST_BODY:
            raise DataError(f"a request has 0 to {_LONGEST_BODY} bytes, not {length}")
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except RecursionError as refusal:
            raise DataError("a request's JSON is nested too deeply") from refusal
        if not isinstance(body, dict):
            raise DataError("a request is a JSON object")
        return body

    def _answer(self, status: int, content: Mapping[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _said(refusal: Exception) -> str:
    return str(refusal) if isinstance(refusal, AlignError) else f"bad request: {refusal!r}"
