"""The judge `openai`: a model behind any OpenAI-compatible chat service, with limits, retries and clear refusals.

Knows nothing of MT-Bench. Only errors that may pass are tried again (timeouts, broken connections, 408, 409, 425, 429,
5xx, replies that are not what the protocol says, empty replies), with exponential backoff and jitter, or when the
service says so (Retry-After). Everything else stops at once with the service's own words. The key is read from the
environment, sent in the header of requests, and struck out of every message.
"""

import asyncio
import ipaddress
import json
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import httpx

from align_core import registry
from align_core.backoff import backoff, retry_after
from align_core.config import JudgeConfig
from align_core.contracts import Judge
from align_core.errors import ConfigError
from align_core.keys import read_key
from align_core.types import ChatReply, ChatRequest, FinishReason
from align_eval.errors import RefusedError, UnansweredError
from align_eval.rates import RateLimit

_PASSING = frozenset({408, 409, 425, 429})
_HOPELESS_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})  # sent as 429, but waiting is in vain
_FIRST_WAIT = 0.5  # seconds
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 600.0  # a service that asks for more is down for this run
_FINISH: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length", "eos": "stop"}
_BYTES_PER_TOKEN = (
    3  # of English text less than of any tokenizer in use, so that limits and budgets err on the safe side
)


class OpenAiJudge:
    """A `Judge` on `POST {base_url}/chat/completions`. Use it within one event loop."""

    def __init__(self, config: JudgeConfig, *, accept_empty: bool = False) -> None:
        """Reads the key from the environment; connects to nothing yet.

        An empty reply is a failure that may pass, unless `accept_empty` says that the model may have nothing to say.

        Raises:
            ConfigError: the environment has no key, and the service is not on this machine; or what it has is no key.
        """
        self._config = config
        self._accept_empty = accept_empty
        self._extra = _extra_fields(config.extra)
        local = _is_local(config.base_url)
        self._key = read_key(config.key_variable)
        if not self._key and not local:
            raise ConfigError(
                f"the key for {config.base_url} is read from the environment variable {config.key_variable}, which is "
                "not set; set it, or name another variable"
            )
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(config.timeout, connect=min(config.timeout, 30.0), pool=None),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            trust_env=not local,  # a proxy of the environment does not know this machine's own services
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._requests = RateLimit(config.requests_per_minute)
        self._tokens = RateLimit(config.tokens_per_minute)

    async def reply(self, request: ChatRequest) -> ChatReply:
        """Asks until there is a reply.

        Raises:
            RefusedError: the service refuses, and would again; carries its message.
            UnansweredError: `config.attempts` failures that might have passed; carries the last one.
        """
        lost = 0
        for attempt in range(1, self._config.attempts + 1):
            try:
                reply = await self._attempt(request)
            except _Passing as failure:
                lost += failure.may_cost
                if attempt == self._config.attempts:
                    raise UnansweredError(f"no reply in {attempt} attempts, the last: {failure}", lost) from failure
                wait = backoff(attempt, first=_FIRST_WAIT, longest=_LONGEST_WAIT)
                await asyncio.sleep(wait if failure.wait is None else failure.wait)
            else:
                return ChatReply(
                    text=reply.text,
                    finish_reason=reply.finish_reason,
                    model=reply.model,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                    lost_attempts=lost,
                )
        raise AssertionError("attempts is at least 1")

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def _attempt(self, request: ChatRequest) -> ChatReply:
        body = self._body(request)
        await self._requests.acquire()
        await self._tokens.acquire(estimate_tokens(request) + request.max_tokens)
        async with self._slots:  # given back while waiting for the next attempt, so that others are not held up
            try:
                response = await self._client.post(f"{self._config.base_url.rstrip('/')}/chat/completions", json=body)
            except httpx.ConnectError as error:
                raise _Passing(f"{self._config.base_url} does not answer ({self._clean(error)})") from None
            except httpx.TimeoutException as error:
                raise _Passing(f"{type(error).__name__} after {self._config.timeout:g} s", may_cost=True) from None
            except httpx.RequestError as error:
                raise _Passing(f"{type(error).__name__}: {self._clean(error)}", may_cost=True) from None
        if response.status_code != httpx.codes.OK:
            raise self._failure(response)
        return self._parse(response)

    def _body(self, request: ChatRequest) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self._config.model,
            "messages": [dict(message) for message in request.messages],
            self._config.token_limit_field: request.max_tokens,
            "seed": request.seed,
            "n": 1,
            **self._extra,
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        return body

    def _failure(self, response: httpx.Response) -> Exception:
        message, code = _error_of(response)
        told = f"HTTP {response.status_code}: {self._clean(message)}"
        if response.has_redirect_location:  # not followed: the key and the conversation are for this service alone
            told += f" (it points to {response.headers['location']!r}; give the final address)"
        passing = response.status_code in _PASSING or response.status_code >= 500
        if not passing or code in _HOPELESS_CODES:
            return RefusedError(f"{self._config.base_url} refuses {self._config.model!r}: {told}")
        wait = retry_after(response.headers.get("retry-after"))
        if wait is not None and wait > _LONGEST_RETRY_AFTER:
            return RefusedError(f"{self._config.base_url} asks to come back in {wait:.0f} s: {told}")
        return _Passing(told, wait=wait)

    def _parse(self, response: httpx.Response) -> ChatReply:
        try:
            data = json.loads(response.content)
            choice = data["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            model, usage = str(data.get("model") or self._config.model), data.get("usage") or {}
            tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = self._clean(response.text[:200])
            raise _Passing(f"not a chat completion ({type(error).__name__}): {shown!r}", may_cost=True) from None
        if reason == "content_filter":
            raise _Passing("the service withheld the reply (content_filter)", may_cost=True)
        if text is None and self._accept_empty:
            text = ""
        if not isinstance(text, str) or not (text.strip() or (self._accept_empty and reason == "stop")):
            raise _Passing(f"an empty reply (finish_reason {reason!r})", may_cost=True)
        return ChatReply(
            text=text.encode(errors="replace").decode(),  # half a surrogate pair goes into no file
            finish_reason=_FINISH.get(reason, "stop"),
            model=model,
            prompt_tokens=tokens[0] if isinstance(tokens[0], int) else None,
            completion_tokens=tokens[1] if isinstance(tokens[1], int) else None,
        )

    def _clean(self, message: object) -> str:
        """`message` without the key, as it stands or quoted: some services repeat it."""
        text = str(message)
        for form in (self._key, repr(self._key)[1:-1]):
            text = text.replace(form, "***") if form else text
        return text


class _Passing(Exception):
    """A failure of one attempt that may pass."""

    def __init__(self, message: str, *, wait: float | None = None, may_cost: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.may_cost = may_cost


def make_judge(config: JudgeConfig, *, accept_empty: bool = False) -> Judge:
    """The judge that `config.name` names in `align.judges`; only `openai` knows `accept_empty`."""
    factory = registry.load("align.judges", config.name)
    if factory is OpenAiJudge:
        return OpenAiJudge(config, accept_empty=accept_empty)
    return cast("Callable[[JudgeConfig], Judge]", factory)(config)


def estimate_tokens(request: ChatRequest) -> int:
    """About how many tokens the prompt has, rather too many; for limits and budgets, where no tokenizer is at hand."""
    size = sum(len(message["content"].encode()) + 16 for message in request.messages)
    return -(-size // _BYTES_PER_TOKEN)


def _extra_fields(extra: str) -> dict[str, object]:
    try:
        fields = json.loads(extra or "{}")
    except ValueError as error:
        raise ConfigError(f"the extra fields of requests are no JSON ({error}): {extra!r}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"the extra fields of requests must be a JSON object, got {extra!r}")
    return fields


def _is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _error_of(response: httpx.Response) -> tuple[str, str]:
    """The service's message and code, in the shapes that OpenAI and vLLM use; else the beginning of the body."""
    try:
        data: Any = json.loads(response.content)
    except ValueError:
        data = None
    error = data.get("error", data) if isinstance(data, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])[:1000], str(error.get("code") or "")
    return (str(error) if error else response.text)[:1000].strip() or response.reason_phrase, ""


_conforms: type[Judge] = OpenAiJudge
