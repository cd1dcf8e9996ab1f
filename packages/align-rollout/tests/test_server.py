"""The server over the fake engine: who may ask, OpenAI's form, many at once, weights that are checked as anywhere."""

import contextlib
import json
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import EngineConfig
from align_core.types import shared_memory
from align_rollout.fake import ArrayWeights, FakeEngine
from align_rollout.forms import GrowingText
from align_rollout.server import RolloutServer, make_server

_LETTERS = "abcdefgh"


class Letters:
    """A tokenizer as far as the server needs one."""

    directory = Path("letters")
    has_chat_template = False

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(_LETTERS[i] for i in ids)

    def encode_prompt(self, text: str) -> list[int]:
        return [_LETTERS.index(letter) for letter in text]

    encode = encode_continuation = encode_prompt


def counting(step: int) -> ArrayWeights:
    """Token i is followed by i + step."""
    table = np.full((8, 8), -50, np.float32)
    table[np.arange(8), (np.arange(8) + step) % 8] = 50
    return ArrayWeights({"bigram.weight": table, "bias": np.zeros(8, np.float32)})


@pytest.fixture
def bound() -> Iterator[RolloutServer]:
    """A server that does not serve yet."""
    tokenizer = Letters()
    engine = FakeEngine(weights=counting(1)._weights, context=64, decode=tokenizer.decode)
    config = EngineConfig(name="fake", context=64)
    server = make_server(engine, tokenizer, config=config, host="127.0.0.1", port=0, token="secret")  # type: ignore[arg-type]
    yield server
    server.server_close()
    engine.close()


@pytest.fixture
def server(bound: RolloutServer) -> Iterator[RolloutServer]:
    thread = threading.Thread(target=bound.serve_forever, args=(0.05,))
    thread.start()
    yield bound
    bound.shutdown()
    thread.join()


def ask(server: RolloutServer, path: str, body: dict[str, Any] | None = None, *, token: str = "secret") -> Any:
    address = f"http://127.0.0.1:{server.server_address[1]}{path}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def test_completion_in_openais_form(server: RolloutServer) -> None:
    status, answer = ask(server, "/v1/completions", {"prompt": "ab", "max_tokens": 3, "temperature": 0})
    assert status == 200
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["weight_version"]) == ("cde", "length", 0)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_token_ids_several_prompts_and_stop_texts(server: RolloutServer) -> None:
    body = {"prompt": ["a", "c"], "max_tokens": 9, "temperature": 0, "stop": "e"}
    assert [choice["text"] for choice in ask(server, "/v1/completions", body)[1]["choices"]] == ["bcde", "de"]
    body = {"prompt": [3, 4], "max_tokens": 2, "temperature": 0}
    assert ask(server, "/v1/completions", body)[1]["choices"][0]["token_ids"] == [5, 6]


def test_without_the_token_nothing_is_answered_but_health(server: RolloutServer) -> None:
    for path in ("/v1/completions", "/weights/begin", "/weights/commit"):
        assert ask(server, path, {}, token="guess")[0] == 401
    assert ask(server, "/v1/models", token="")[0] == 401
    assert ask(server, "/health", token="")[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "max_tokens": 99}, "leaves no room"),
        ({"prompt": "a", "stream": True, "max_tokens": 99}, "leaves no room"),
        ({"prompt": [900], "max_tokens": 2, "stream": True}, "vocabulary"),
        ({"prompt": [900], "max_tokens": 2}, "vocabulary"),
        ({"prompt": [2**31], "max_tokens": 2}, "bad request"),
        ({"prompt": "a", "max_tokens": float("inf")}, "bad request"),
    ],
)
def test_bad_requests_say_why(server: RolloutServer, body: dict[str, Any], message: str) -> None:
    status, answer = ask(server, "/v1/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]


@pytest.mark.parametrize("content", [None, 5, ["a"], [{"type": "image_url", "image_url": {"url": "x"}}]])
def test_a_chat_of_something_else_than_text_is_refused(server: RolloutServer, content: object) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    status, answer = ask(server, "/v1/chat/completions", body)
    assert status == 400
    assert "content is a text" in answer["error"]["message"]


def test_a_chat_may_come_in_parts_and_fill_the_context(server: RolloutServer) -> None:
    seen: list[str] = []
    server.service._tokenizer.encode_prompt = lambda text: (seen.append(text), [0, 1])[1]  # type: ignore[method-assign]
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    status, answer = ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert status == 200
    assert any("abcd" in text for text in seen)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 62, "total_tokens": 64}


@pytest.mark.parametrize(("length", "body", "message"), [(-1, b"", "bytes, not -1"), (None, b"[" * 200_000, "deeply")])
def test_a_body_that_cannot_be_read_is_refused(
    server: RolloutServer, length: int | None, body: bytes, message: str
) -> None:
    size = len(body) if length is None else length
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as client:
        head = f"POST /v1/completions HTTP/1.0\r\nAuthorization: Bearer secret\r\nContent-Length: {size}\r\n\r\n"
        client.sendall(head.encode() + body)
        answer = client.makefile().read()
    assert " 400 " in answer.splitlines()[0]
    assert message in answer


def test_a_silent_client_is_let_go(server: RolloutServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.RequestHandlerClass.timeout == 60  # type: ignore[attr-defined]
    monkeypatch.setattr(server.RequestHandlerClass, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as client:
        assert client.recv(1) == b""


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_dead_engine_is_told_within_a_stream_and_ever_after(server: RolloutServer, kind: type[Exception]) -> None:
    engine: Any = server.service._engine
    step, steps = engine._stream._stepper.step, iter(range(9))
    engine._stream._stepper.step = lambda: step() if next(steps) < 3 else _fail(kind("device-side assert"))
    address = f"http://127.0.0.1:{server.server_address[1]}/v1/completions"
    body = json.dumps({"prompt": "a", "max_tokens": 8, "stream": True}).encode()
    request = urllib.request.Request(address, data=body, headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        lines = answer.read().decode().split("\n\n")
    assert len(lines) == 5
    assert "device-side assert" in json.loads(lines[3].removeprefix("data: "))["error"]["message"]
    for path, asked in (("/v1/completions", {"prompt": "a"}), ("/health", None)):
        status, told = ask(server, path, asked)
        assert status == 503
        assert "device-side assert" in told["error"]["message"]


def _fail(failure: Exception) -> Any:
    raise failure


def events(server: RolloutServer, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of each server-sent event, as they stand in the answer."""
    address = f"http://127.0.0.1:{server.server_address[1]}{path}"
    request = urllib.request.Request(
        address, data=json.dumps({**body, "stream": True}).encode(), headers={"Authorization": "Bearer secret"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_stream_says_token_by_token_what_the_whole_answer_says(server: RolloutServer) -> None:
    body = {"prompt": ["ab", "c"], "max_tokens": 5, "temperature": 0.0, "stop": "h"}
    whole = ask(server, "/v1/completions", body)[1]
    found = events(server, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    assert {event["object"] for event in found} == {"text_completion"}
    assert len({event["id"] for event in found}) == 1
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in found[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert [token for each in mine for token in each["token_ids"]] == choice["token_ids"]
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert len(mine) == len(choice["token_ids"])


def test_a_chat_stream_begins_with_the_role(server: RolloutServer) -> None:
    server.service._tokenizer.encode_prompt = lambda text: [0, 1]  # type: ignore[method-assign]
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2, "temperature": 0}
    found = [event["choices"][0] for event in events(server, "/v1/chat/completions", body)]
    assert found[0]["delta"] == {"role": "assistant", "content": ""}
    assert [each["delta"].get("content") for each in found[1:]] == ["c", "d"]
    assert [each["finish_reason"] for each in found] == [None, None, "length"]


def test_a_character_of_several_tokens_is_said_when_it_is_whole() -> None:
    """Two tokens a character; a tokenizer writes half a character as U+FFFD."""

    class Halves:
        directory = Path("halves")

        def decode(self, ids: Sequence[int]) -> str:
            pairs = [ids[i : i + 2] for i in range(0, len(ids), 2)]
            return "".join("\u00fc" if len(pair) == 2 else "\ufffd" for pair in pairs)

    text = GrowingText(Halves())  # type: ignore[arg-type]
    said = [text.add([token], finish_reason=None) for token in range(5)]
    assert said == ["", "\u00fc", "", "\u00fc", ""]
    assert text.add([], finish_reason="length") == "\ufffd"


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_ends_its_request(server: RolloutServer, streams: bool) -> None:
    """Paused, so that the request cannot end by itself; the other client's goes on."""
    engine: Any = server.service._engine
    engine.pause()
    body = json.dumps({"prompt": "a", "max_tokens": 60, "stream": streams}).encode()
    with socket.create_connection(("127.0.0.1", server.server_address[1])) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_for(lambda: len(engine._stream._running) == 1)
    wait_for(lambda: not engine._stream._running)
    engine.resume()
    assert ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 2, "temperature": 0})[0] == 200


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_clients_that_come_before_one_is_served_are_let_in(bound: RolloutServer) -> None:
    with contextlib.ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(socket.create_connection(("127.0.0.1", bound.server_address[1]), timeout=5))


def test_many_clients_at_once_each_get_their_own(server: RolloutServer) -> None:
    found: dict[int, str] = {}

    def client(number: int) -> None:
        body = {"prompt": _LETTERS[number % 8], "max_tokens": 1 + number, "temperature": 0}
        found[number] = ask(server, "/v1/completions", body)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {n: "".join(_LETTERS[(n + 1 + k) % 8] for k in range(1 + n)) for n in range(16)}
    assert found == expected


def test_weights_come_through_shared_memory_and_are_checked(server: RolloutServer) -> None:
    source = counting(2)
    metadata = [{"name": m.name, "shape": m.shape, "dtype": m.dtype} for m in source.metadata()]
    with tempfile.NamedTemporaryFile(prefix="align-weights-", dir=shared_memory()) as file:
        weights = []
        for weight in source.iterate():
            described = {"name": weight.meta.name, "shape": weight.meta.shape, "dtype": weight.meta.dtype}
            weights.append({**described, "file": file.name, "offset": file.tell(), "checksum": weight.checksum})
            file.write(weight.bytes().tobytes())
        file.flush()
        assert ask(server, "/weights/begin", {"metadata": metadata, "version": 1})[0] == 200
        spoilt = [{**weights[0], "checksum": weights[0]["checksum"] ^ 1}]
        status, answer = ask(server, "/weights/load", {"weights": spoilt})
        assert status == 400
        assert "'bigram.weight'" in answer["error"]["message"]
        assert ask(server, "/weights/load", {"weights": weights})[0] == 200
        assert ask(server, "/weights/commit", {})[0] == 200
    choice = ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 3, "temperature": 0})[1]["choices"][0]
    assert (choice["text"], choice["weight_version"]) == ("ceg", 1)
    outside = [{**weights[0], "file": "/etc/hostname"}]
    ask(server, "/weights/begin", {"metadata": metadata, "version": 2})
    status, answer = ask(server, "/weights/load", {"weights": outside})
    assert status == 400
    assert "align-weights-" in answer["error"]["message"]
