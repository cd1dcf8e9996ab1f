"""The client of chat services against a service that misbehaves: what is tried again, what stops, what is hidden."""

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from align_core.config import JudgeConfig
from align_core.conformance import check_judge
from align_core.errors import ConfigError
from align_core.types import ChatReply, ChatRequest
from align_eval.errors import RefusedError, UnansweredError
from align_eval.judges import OpenAiJudge, estimate_tokens, make_judge
from align_eval.stub_service import FAULTS, StubService

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_eval.judges._FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def _request(text: str = "Well?", **changes: Any) -> ChatRequest:
    return ChatRequest(
        **{"messages": ({"role": "user", "content": text},), "max_tokens": 64, "temperature": 0.0, **changes}
    )


def _ask(service: StubService, *requests: ChatRequest, accept_empty: bool = False, **settings: Any) -> list[ChatReply]:
    async def ask() -> list[ChatReply]:
        config = JudgeConfig(**{"base_url": service.url, "model": "m", "timeout": 20.0, **settings})
        judge = OpenAiJudge(config, accept_empty=accept_empty)
        try:
            return await asyncio.gather(*(judge.reply(request) for request in requests))
        finally:
            await judge.close()

    return asyncio.run(ask())


def test_request_and_reply_are_those_of_the_protocol() -> None:
    with StubService(reply=lambda _: "Yes.") as service:
        (reply,) = _ask(service, _request(seed=3))
    assert reply == ChatReply(
        text="Yes.", finish_reason="stop", model="m-2026-01-01", prompt_tokens=100, completion_tokens=1
    )
    (sent,) = service.requests
    assert sent["path"] == "/v1/chat/completions"
    assert sent["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "Well?"}],
        "max_tokens": 64,
        "temperature": 0.0,
        "seed": 3,
        "n": 1,
    }


def test_judge_keeps_the_contract() -> None:
    with StubService(fault_share=0.5, hang_seconds=0.1, reply=lambda m: f"about {m[-1]['content'][:9]}") as service:
        asyncio.run(check_judge(OpenAiJudge(JudgeConfig(base_url=service.url, timeout=20.0))))


def test_models_that_think_get_their_own_limit_and_no_temperature() -> None:
    with StubService() as service:
        _ask(service, _request(temperature=None), token_limit_field="max_completion_tokens")
    body = service.requests[0]["body"]
    assert body["max_completion_tokens"] == 64
    assert not {"temperature", "max_tokens"} & body.keys()


def test_extra_fields_go_into_every_request() -> None:
    """vLLM's structured output, for example, which holds a local judge to the form of a verdict."""
    with StubService() as service:
        _ask(service, _request(), extra='{"structured_outputs": {"regex": "x"}}')
    assert service.requests[0]["body"]["structured_outputs"] == {"regex": "x"}
    for extra, message in (("{", "are no JSON"), ("[1]", "must be a JSON object")):
        with pytest.raises(ConfigError, match=message):
            OpenAiJudge(JudgeConfig(base_url="http://127.0.0.1:1/v1", extra=extra))


def test_reply_cut_off_says_so() -> None:
    with StubService(reply=lambda _: "a b c d e") as service:
        (reply,) = _ask(service, _request(max_tokens=2))
    assert (reply.text, reply.finish_reason) == ("a b", "length")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_passing_fault_is_tried_again(fault: str) -> None:
    timeout = 2.0 if fault == "hang" else 20.0
    with StubService(fault_share=1.0, faults=[fault], reply=lambda _: "Yes.", retry_after="0.05") as service:
        (reply,) = _ask(service, _request(), timeout=timeout)
    assert reply.text == "Yes."
    assert [r["status"] for r in service.requests if r["status"] == "200"] == ["200"]
    assert len(service.requests) in (2, 3)
    # A refused connection or a 429 costs nothing; a reply that got lost may have.
    assert reply.lost_attempts == (0 if fault in ("429", "500") else len(service.requests) - 1)


def test_attempts_that_all_fail_are_unanswered_with_the_last_reason() -> None:
    with StubService(refuse=(503, "come back later")) as service, pytest.raises(UnansweredError) as caught:
        _ask(service, _request(), attempts=3)
    assert "no reply in 3 attempts, the last: HTTP 503: come back later" in str(caught.value)
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("status", "message"), [(400, "context too long"), (401, "bad key"), (403, "no"), (404, "none")]
)
def test_refusals_stop_at_once_with_the_services_words(status: int, message: str) -> None:
    with (
        StubService(refuse=(status, message)) as service,
        pytest.raises(RefusedError, match=f"HTTP {status}: {message}"),
    ):
        _ask(service, _request())
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_a_refusal_that_says_where_it_points(status: int) -> None:
    class Moved(StubService):
        def _respond(self, handler: Any, body: dict[str, Any]) -> tuple[str, Any]:
            return self._error(handler, status, "moved", {"Location": f"{self.url}/elsewhere"})

    with Moved() as service, pytest.raises(RefusedError) as caught:
        _ask(service, _request())
    assert f"HTTP {status}: moved (it points to '{service.url}/elsewhere'; give the final address)" in str(caught.value)
    assert len(service.requests) == 1


def test_service_that_is_not_there_is_unanswered() -> None:
    with StubService() as service:
        pass
    with pytest.raises(UnansweredError, match="does not answer"):
        _ask(service, _request(), attempts=2)


def test_retry_after_is_kept() -> None:
    with StubService(fault_share=1.0, faults=["429"], retry_after="0.4") as service:
        begin = time.monotonic()
        _ask(service, _request())
    assert time.monotonic() - begin >= 0.4 * (len(service.requests) - 1)


def test_retry_after_of_hours_is_a_refusal() -> None:
    with StubService(fault_share=1.0, faults=["429"], retry_after="7200") as service:
        with pytest.raises(RefusedError, match="come back in 7200 s"):
            _ask(service, _request())
        assert len(service.requests) == 1


def test_half_a_surrogate_pair_is_replaced() -> None:
    with StubService(reply=lambda _: "good \ud83d") as service:
        (reply,) = _ask(service, _request())
    assert reply.text == "good ?"


def test_reply_that_cannot_be_decoded_is_tried_again() -> None:
    class Corrupt(StubService):
        def _respond(self, handler: Any, body: dict[str, Any]) -> tuple[str, Any]:
            return self._error(handler, 200, "no gzip", {"Content-Encoding": "gzip"})

    with Corrupt() as service, pytest.raises(UnansweredError, match="no reply in 2 attempts, the last: DecodingError"):
        _ask(service, _request(), attempts=2)
    assert len(service.requests) == 2


def test_empty_reply_is_an_answer_only_if_asked_for() -> None:
    with StubService(reply=lambda _: "") as service:
        with pytest.raises(UnansweredError, match="an empty reply"):
            _ask(service, _request(), attempts=2)
        (reply,) = _ask(service, _request(), accept_empty=True)
    assert reply.text == ""


def test_concurrency_is_kept_and_used() -> None:
    """Five times eight requests are answered when there are eight, and a ninth never comes before."""
    eight, lock, under_way, most = threading.Barrier(8, timeout=60), threading.Lock(), 0, 0

    def reply(_: object) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        eight.wait()
        time.sleep(0.02)  # for a ninth to come
        with lock:
            under_way -= 1
        return "Yes."

    with StubService(reply=reply) as service:
        _ask(service, *(_request(str(i)) for i in range(40)), concurrency=8, timeout=120.0)
    assert most == 8


def test_rate_is_kept() -> None:
    """600 a minute: of 20 requests 10 at once, the other 10 at 10 a second (on a clock of its own: test_rates.py)."""
    with StubService() as service:
        begin = time.monotonic()
        _ask(service, *(_request(str(i)) for i in range(20)), requests_per_minute=600)
        assert 0.9 <= time.monotonic() - begin < 30


def test_key_comes_from_the_environment_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service repeats the key in its message, as some do; neither errors nor logs may."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    with StubService(key=KEY) as service:
        _ask(service, _request(), key_variable="MY_KEY")
    with StubService(key="another") as service, pytest.raises(RefusedError) as caught:
        _ask(service, _request(), key_variable="MY_KEY")
    assert "HTTP 401: Incorrect API key provided: Bearer ***" in str(caught.value)
    shown = capsys.readouterr()
    for text in (str(caught.value), repr(caught.value), caplog.text, shown.out, shown.err):
        assert KEY not in text
    config = JudgeConfig(base_url=service.url, key_variable="MY_KEY")
    assert KEY not in repr(config)


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_line_end_after_the_key_is_not_part_of_it(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("MY_KEY", KEY + end)
    with StubService(key=KEY, reply=lambda _: "Yes.") as service:
        (reply,) = _ask(service, _request(), key_variable="MY_KEY", attempts=1)
    assert reply.text == "Yes."


@pytest.mark.parametrize("character", ["\r", "\n", "\x7f", "\u00e9"])
def test_what_cannot_be_a_key_is_told_without_showing_it(monkeypatch: pytest.MonkeyPatch, character: str) -> None:
    monkeypatch.setenv("MY_KEY", f"sk-very{character}secret")
    with pytest.raises(ConfigError, match="MY_KEY holds characters that are not printable ASCII") as caught:
        OpenAiJudge(JudgeConfig(base_url="http://127.0.0.1:1/v1", key_variable="MY_KEY"))
    assert "secret" not in str(caught.value)


def test_missing_key_is_asked_for_by_name_except_on_this_machine() -> None:
    with pytest.raises(ConfigError, match="environment variable OPENAI_API_KEY, which is not set"):
        OpenAiJudge(JudgeConfig())
    for url in ("http://127.0.0.1:8000/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1"):
        asyncio.run(OpenAiJudge(JudgeConfig(base_url=url)).close())


def test_judge_is_found_by_name() -> None:
    judge = make_judge(JudgeConfig(base_url="http://127.0.0.1:8000/v1"))
    assert isinstance(judge, OpenAiJudge)
    asyncio.run(judge.close())
    with pytest.raises(ConfigError, match=r"unknown judge 'opnai'; did you mean 'openai'\?"):
        make_judge(JudgeConfig(name="opnai", base_url="http://127.0.0.1:8000/v1"))


def test_tokens_are_estimated_too_high_rather_than_too_low() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20  # 10 tokens a sentence in GPT-4's vocabulary
    assert 200 <= estimate_tokens(_request(text)) <= 400
