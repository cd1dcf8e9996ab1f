"""Completions over HTTP in OpenAI's form, and weight updates: one engine, many requests at a time.

Bound to localhost unless told otherwise; every request needs the token. Weights come as files in shared memory, so the
sender is on the same host. Standard library only; answers come whole, not as a stream.
"""

import hmac
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate
from align_core.errors import AlignError, DataError
from align_core.text import Tokenizer, render_prompt
from align_core.types import Completion, ParamMeta, Prompt, WeightTensor, shared_memory

TOKEN_VARIABLE = "ALIGN_ROLLOUT_TOKEN"
_LONGEST_BODY = 16 << 20
_POLL_S = 0.5


class Engine(RolloutEngine, SupportsAsyncGenerate, Protocol):
    """What can be served."""


class Service:
    """The engine's requests, each waited for by the thread that brought it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self._engine, self._tokenizer, self._config = engine, tokenizer, config
        self._ids = count()
        self._sink_lock = threading.Lock()
        self._news = threading.Condition()
        self._waiting: dict[int, list[Completion]] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._pump = threading.Thread(target=self._deliver, name="align-rollout-serve", daemon=True)
        self._pump.start()

    def complete(self, body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
        """The answer to a request in OpenAI's form."""
        if body.get("stream"):
            raise DataError("stream: answers come whole here; leave it out")
        sampling = _sampling(body)
        prompts = [self._prompt(text, sampling) for text in (_chat(body) if chat else _texts(body))]
        choices = []
        for place, completions in enumerate(self._generate(prompts, sampling)):
            for completion in completions:
                choices.append(
                    _choice(completion, self._tokenizer, index=place * sampling.n + completion.sample, chat=chat)
                )
        asked = sum(len(prompt.tokens) for prompt in prompts)
        new = sum(len(choice["token_ids"]) for choice in choices)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": choices,
            "usage": {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new},
        }

    @property
    def name(self) -> str:
        """Of the model, as clients call it."""
        return self._tokenizer.directory.name

    def update(self, step: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One step of a weight update: `begin`, `load` or `commit`."""
        sink = self._engine.weight_sink()
        with self._sink_lock:
            if step == "begin":
                sink.begin([_meta(item) for item in body["metadata"]], int(body["version"]))
            elif step == "load":
                sink.load([_weight(item) for item in body["weights"]])
            else:
                sink.commit()
        return {"done": step}

    def close(self) -> None:
        """Stops delivering."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._pump.join()

    def _prompt(self, content: object, sampling: SamplingConfig) -> Prompt:
        room = self._config.context - sampling.max_tokens
        if room < 1:
            raise DataError(f"max_tokens {sampling.max_tokens} leaves no room in a context of {self._config.context}")
        if isinstance(content, list) and content and all(isinstance(item, int) for item in content):
            tokens = np.asarray(content, dtype=np.int32)
        elif isinstance(content, str):
            tokens = np.asarray(self._tokenizer.encode_prompt(content), dtype=np.int32)
        else:
            tokens = render_prompt(self._tokenizer, content, template="auto", max_tokens=room)  # type: ignore[arg-type]
        return Prompt(id=next(self._ids), tokens=tokens)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[list[Completion]]:
        with self._news:
            self._waiting |= {prompt.id: [] for prompt in prompts}
        try:
            self._engine.submit(prompts, sampling)
            with self._news:
                self._news.notify_all()
                self._news.wait_for(lambda: self._closed or self._failure or self._complete(prompts, sampling))
                if self._failure is not None:
                    raise self._failure
                found = [sorted(self._waiting[prompt.id], key=lambda c: c.sample) for prompt in prompts]
        finally:
            with self._news:
                for prompt in prompts:
                    del self._waiting[prompt.id]
        return found

    def _complete(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> bool:
        return all(len(self._waiting[prompt.id]) == sampling.n for prompt in prompts)

    def _deliver(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
            try:
                found = self._engine.poll(_POLL_S)
            except BaseException as failure:
                with self._news:
                    self._failure = failure
                    self._news.notify_all()
                return
            with self._news:
                for completion in found:
                    self._waiting.get(completion.prompt_id, []).append(completion)
                self._news.notify_all()
                if not found:
                    self._news.wait(0.01)  # submitted, and not yet under way; or paused


class RolloutServer(ThreadingHTTPServer):
    """An HTTP server over a `Service`."""

    daemon_threads = True

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

    def do_GET(self) -> None:
        """Health and the name of the model."""
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        elif self._allowed() and self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": self.server.service.name, "object": "model"}]})
        elif self._allowed(answer=False):
            self._answer(404, _error(f"no page {self.path}"))

    def do_POST(self) -> None:
        """Completions and weight updates."""
        service = self.server.service
        calls: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "/v1/completions": lambda body: service.complete(body, chat=False),
            "/v1/chat/completions": lambda body: service.complete(body, chat=True),
            **{f"/weights/{step}": self._update(step) for step in ("begin", "load", "commit")},
        }
        if not self._allowed():
            return
        if self.path not in calls:
            self._answer(404, _error(f"no page {self.path}; there are {sorted(calls)}"))
            return
        try:
            self._answer(200, calls[self.path](self._body()))
        except (AlignError, KeyError, TypeError, ValueError) as error:
            self._answer(400, _error(str(error) if isinstance(error, AlignError) else f"bad request: {error!r}"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet: a request may hold what does not belong in a log."""

    def _update(self, step: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        return lambda body: self.server.service.update(step, body)

    def _allowed(self, *, answer: bool = True) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        allowed = hmac.compare_digest(given.encode(), self.server.token.encode())
        if not allowed and answer:
            self._answer(401, _error("give the server's token as 'Authorization: Bearer TOKEN'"))
        return allowed

    def _body(self) -> Mapping[str, Any]:
        length = int(self.headers.get("Content-Length", "0"))
        if length > _LONGEST_BODY:
            raise DataError(f"a request of {length} bytes is longer than {_LONGEST_BODY}")
        body = json.loads(self.rfile.read(length) or b"{}")
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


def _sampling(body: Mapping[str, Any]) -> SamplingConfig:
    stop = body.get("stop") or ()
    return SamplingConfig(
        n=int(body.get("n", 1)),
        max_tokens=int(body.get("max_completion_tokens") or body.get("max_tokens") or 16),
        temperature=float(body.get("temperature", 1.0)),
        top_p=float(body.get("top_p", 1.0)),
        seed=int(body.get("seed") or 0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_tokens=tuple(body.get("stop_token_ids") or ()),
    )


def _texts(body: Mapping[str, Any]) -> list[object]:
    prompt = body["prompt"]
    several = isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int))
    return list(prompt) if several else [prompt]


def _chat(body: Mapping[str, Any]) -> list[object]:
    messages = body["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise DataError("messages is a list of {'role': ..., 'content': ...}")
    return [messages]


def _choice(completion: Completion, tokenizer: Tokenizer, *, index: int, chat: bool) -> dict[str, Any]:
    text = tokenizer.decode(completion.tokens)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "index": index,
        **said,
        "finish_reason": completion.finish_reason,
        "token_ids": completion.tokens.tolist(),
        "logprobs": {"token_logprobs": completion.logprobs.tolist()},
        "weight_version": completion.version,
    }


def _meta(item: Mapping[str, Any]) -> ParamMeta:
    if item["dtype"] not in ("float32", "bfloat16", "float16"):
        raise DataError(f"weight {item['name']!r} has dtype {item['dtype']!r}; use float32, bfloat16 or float16")
    return ParamMeta(name=str(item["name"]), shape=tuple(int(n) for n in item["shape"]), dtype=item["dtype"])


def _weight(item: Mapping[str, Any]) -> WeightTensor:
    file = Path(item["file"])
    if file.parent != shared_memory() or not file.name.startswith("align-weights-"):
        raise DataError(f"weights come in files {shared_memory()}/align-weights-*, not {str(file)!r}")
    return WeightTensor(meta=_meta(item), checksum=int(item["checksum"]), file=file, offset=int(item["offset"]))


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}
