"""The server over the real vLLM engine, asked by OpenAI's own client: streams, new weights on the way, the command."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")
pytest.importorskip("sentencepiece")

import openai
import torch
from transformers import LlamaForCausalLM

from align_core.config import EngineConfig
from align_core.text import load_tokenizer
from align_core.types import checksum, shared_memory
from align_rollout.forms import GrowingText
from align_rollout.server import RolloutServer, make_server
from align_rollout.vllm import VllmEngine

pytestmark = pytest.mark.slow

_QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of its own."""
    tiny = pytest.importorskip("align_core.tutorial.tiny")
    path = tmp_path_factory.mktemp("serving") / "tiny"
    tiny.make_tiny_model(path, seed=1)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[RolloutServer]:
    config = EngineConfig(context=256, kv_cache_mib=64, device="cpu", in_flight="continue")
    engine = VllmEngine.from_model(model, config)
    server = make_server(engine, load_tokenizer(model), config=config, host="127.0.0.1", port=0, token="secret")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    engine.close()


@pytest.fixture
def client(server: RolloutServer) -> Iterator[Any]:
    with client_of(server.server_address[1], "secret") as made:
        yield made


def client_of(port: int, token: str) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0, timeout=60)


def test_completion_and_stream_say_the_same(client: Any) -> None:
    """By tokens: bytes that are no characters, of which the tiny model says many, are written by how they are cut."""
    settings = {"model": "tiny", "prompt": "12 + 30 = ", "max_tokens": 24, "temperature": 0}
    (whole,) = client.completions.create(**settings).choices
    events = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    choices = [event.choices[0] for event in events if event.choices]
    assert [token for choice in choices for token in choice.token_ids] == whole.token_ids
    assert choices[-1].finish_reason == whole.finish_reason
    assert events[-1].usage.completion_tokens == len(whole.token_ids) > 5
    assert len(choices) == len(whole.token_ids)
    assert whole.weight_version == 0


def test_chat_and_chat_stream_say_the_same(client: Any) -> None:
    """With a seed, a request is answered alike twice; without one it is not."""
    settings = {"model": "tiny", "messages": _QUESTION, "max_completion_tokens": 24, "n": 2}
    whole = client.chat.completions.create(**settings, seed=3)
    events = list(client.chat.completions.create(**settings, seed=3, stream=True))
    for choice in whole.choices:
        mine = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert [token for each in mine[1:] for token in each.token_ids] == choice.token_ids
        assert mine[-1].finish_reason == choice.finish_reason
    others = {tuple(client.chat.completions.create(**settings).choices[0].token_ids) for _ in range(3)}
    assert len(others) == 3


def test_text_that_grows_by_a_token_is_the_text(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    text = "Gr\u00f6\u00dfe: 12 + 30 = 42, \u2603 snow  and \U0001f600!"
    tokens = tokenizer.encode_prompt(text)[1:]
    growing = GrowingText(tokenizer)
    said = [growing.add([token], finish_reason=None) for token in tokens]
    assert "".join(said) + growing.add([], finish_reason="length") == tokenizer.decode(tokens) == text
    assert not any("\ufffd" in piece for piece in said)


def test_a_wrong_token_is_401(server: RolloutServer) -> None:
    with client_of(server.server_address[1], "guess") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="tiny", prompt="a", stream=True)


def test_a_stream_that_is_closed_ends_the_request(server: RolloutServer, client: Any) -> None:
    engine: Any = server.service._engine
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=240, n=8, stream=True)
    next(iter(stream))
    assert engine._stream._running
    stream.close()
    deadline = time.monotonic() + 60
    while engine._stream._running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_weights_that_change_while_a_stream_is_open(
    server: RolloutServer, client: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of each version are what Hugging Face's model of that version says after the tokens before."""
    stepper: Any = server.service._engine._stream._stepper  # type: ignore[attr-defined]
    step, changed = stepper.step, threading.Event()
    # Slowly until the weights have changed, so that the stream does not end before.
    monkeypatch.setattr(stepper, "step", lambda: (changed.is_set() or time.sleep(0.05), step())[1])
    old = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    new = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    prompt = load_tokenizer(model).encode_prompt("12 + 30 = ")
    settings = {"prompt": prompt, "max_tokens": 200, "temperature": 0}
    ids: list[int] = []
    versions: list[int] = []
    for number, event in enumerate(client.completions.create(model="tiny", stream=True, **settings)):
        if number == 3:
            send(server, new, version=1)
            changed.set()
        ids += event.choices[0].token_ids
        versions += [event.choices[0].weight_version] * len(event.choices[0].token_ids)
    change = versions.index(1)
    assert versions == [0] * change + [1] * (len(ids) - change)
    assert 3 < change < len(ids)
    assert ids == greedy(old, prompt, change) + greedy(new, prompt + ids[:change], len(ids) - change)
    whole = client.completions.create(model="tiny", **{**settings, "max_tokens": 20}).choices[0]
    assert (whole.weight_version, whole.token_ids) == (1, greedy(new, prompt, len(whole.token_ids)))


def greedy(model: LlamaForCausalLM, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


def send(server: RolloutServer, model: LlamaForCausalLM, *, version: int) -> None:
    """Through the server's endpoint, as another process of this host would."""
    named = [(name, parameter.detach().numpy()) for name, parameter in model.named_parameters()]
    metadata = [{"name": name, "shape": array.shape, "dtype": "float32"} for name, array in named]
    with tempfile.NamedTemporaryFile(prefix="align-weights-", dir=shared_memory()) as file:
        weights = []
        for meta, (_, array) in zip(metadata, named, strict=True):
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            found = checksum(data, item_bytes=4)
            weights.append({**meta, "file": file.name, "offset": file.tell(), "checksum": found})
            file.write(data.data)
        file.flush()
        post(server, "begin", {"metadata": metadata, "version": version})
        post(server, "load", {"weights": weights})
        post(server, "commit", {})


def post(server: RolloutServer, step: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server_address[1]}/weights/{step}",
        data=json.dumps(body).encode(),
        headers={"Authorization": "Bearer secret"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer) == {"done": step}


@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_on_localhost_and_stops_when_asked_to(model: Path, wish: signal.Signals) -> None:
    """Also where SIGINT is ignored when it starts, as in the background of a shell."""
    run = "import sys; from align_rollout.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "serve", "--model", str(model), "--port", "0"]
    command += ["--context", "128", "--kv-cache-mib", "32"]
    environment = {**os.environ, "ALIGN_ROLLOUT_TOKEN": "from-the-environment"}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        try:
            said = next(line for line in process.stderr if "serving on" in line)
            assert "http://127.0.0.1:" in said
            assert "from-the-environment" not in said
            port = int(said.rsplit(":", 1)[1])
            with client_of(port, "from-the-environment") as client:
                answer = client.completions.create(model="tiny", prompt="a", max_tokens=3)
            assert answer.usage.completion_tokens >= 1
            assert listening(port) == {"0100007F"}
        finally:
            process.send_signal(wish)
            try:
                process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
    assert process.returncode == 130


def listening(port: int) -> set[str]:
    """Local addresses, as the kernel lists them, on which a process of this machine listens on `port`."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        address
        for address, _, number in (row[1].partition(":") for row in rows if row[3] == "0A")
        if int(number, 16) == port
    }
