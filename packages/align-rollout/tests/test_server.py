"""The server over the fake engine: who may ask, OpenAI's form, many at once, weights that are checked as anywhere."""

import json
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import EngineConfig
from align_core.types import shared_memory
from align_rollout.fake import ArrayWeights, FakeEngine
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
def server() -> Iterator[RolloutServer]:
    tokenizer = Letters()
    engine = FakeEngine(weights=counting(1)._weights, context=64, decode=tokenizer.decode)
    config = EngineConfig(name="fake", context=64)
    server = make_server(engine, tokenizer, config=config, host="127.0.0.1", port=0, token="secret")  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    engine.close()


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
        ({"prompt": "a", "stream": True}, "answers come whole"),
        ({"prompt": [900], "max_tokens": 2}, "vocabulary"),
    ],
)
def test_bad_requests_say_why(server: RolloutServer, body: dict[str, Any], message: str) -> None:
    status, answer = ask(server, "/v1/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]


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
