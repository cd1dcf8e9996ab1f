"""Answering: through an engine and through a service, turn after turn, resumed, keyed by all that shapes an answer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine, WeightSink
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import Completion, FinishReason, Prompt
from align_eval.cli import main
from align_eval.mt_bench.fastchat import read_answers
from align_eval.mt_bench.folder import Folder
from align_eval.mt_bench.questions import Bench
from align_eval.mt_bench.sheet import TEMPERATURES
from align_eval.stub_service import StubService


class EchoEngine:
    """Answers with the prompt's last 20 characters; remembers what it was asked, and fails when told to."""

    calls: list[tuple[list[str], SamplingConfig]] = []  # noqa: RUF012
    fail_at: int | None = None
    finish: FinishReason = "stop"
    ending = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_model(cls, model: Path, config: EngineConfig) -> "EchoEngine":
        return cls(load_tokenizer(model))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        if self.fail_at == len(self.calls):
            raise RuntimeError("the engine died")
        texts = [self._tokenizer.decode(prompt.tokens) for prompt in prompts]
        self.calls.append((texts, sampling))
        return [self._completion(prompt.id, text) for prompt, text in zip(prompts, texts)]

    def _completion(self, prompt_id: int, text: str) -> Completion:
        tokens = np.asarray(self._tokenizer.encode(f" echo {text[-20:]!r}{self.ending}"), dtype=np.int32)
        return Completion(
            prompt_id=prompt_id,
            sample=0,
            tokens=tokens,
            logprobs=np.zeros(len(tokens), np.float32),
            finish_reason=self.finish,
            version=0,
        )

    def weight_sink(self) -> WeightSink:
        raise NotImplementedError

    def close(self) -> None:
        pass


_conforms: type[RolloutEngine] = EchoEngine


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> type[EchoEngine]:
    class Point:
        name = "echo"

        def load(self) -> object:
            return EchoEngine

    monkeypatch.setattr("align_core.registry.entry_points", lambda group: [Point()] if group == "align.engines" else [])
    monkeypatch.setattr(EchoEngine, "calls", [])
    return EchoEngine


@pytest.fixture
def model(tmp_path: Path, tokenizer_files: Path) -> Path:
    directory = tmp_path / "some-model"
    directory.mkdir()
    for file in tokenizer_files.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def _arguments(out: Path, data: Path, model: Path, *more: object) -> list[str]:
    common = ["mt-bench", "answer", "--out", str(out), "--data", str(data), "--model", str(model), "--engine", "echo"]
    return [*common, "--max-tokens", "64", *map(str, more)]


def test_every_question_is_answered_in_two_turns(
    echo: type[EchoEngine], data: Path, model: Path, tmp_path: Path, bench: Bench
) -> None:
    out = tmp_path / "run"
    assert main(_arguments(out, data, model)) == 0
    answers = read_answers(Folder(out).answers("some-model"))
    assert sorted(answers) == [question.id for question in bench.questions]
    asked = [text for texts, _ in echo.calls for text in texts]
    assert len(asked) == 160
    assert "\n\nHuman: First 81?\n\nAssistant:" in asked
    first = answers[81].turns[0]
    assert f"\n\nHuman: First 81?\n\nAssistant: {first}\n\nHuman: Then 81 {{x}}?\n\nAssistant:" in asked
    assert first.startswith("echo '")  # stripped


def test_temperatures_are_those_of_the_categories(
    echo: type[EchoEngine], data: Path, model: Path, tmp_path: Path, bench: Bench
) -> None:
    assert main(_arguments(tmp_path / "run", data, model)) == 0
    category = {str(q.id): q.category for q in bench.questions}
    for texts, sampling in echo.calls:
        for text in texts:
            number = text.split("First ")[1].split("?")[0]
            assert sampling.temperature == TEMPERATURES[category[number]]
            assert (sampling.n, sampling.max_tokens, sampling.stop) == (1, 64, ("\n\nHuman:",))
    echo.calls.clear()
    assert main(_arguments(tmp_path / "other", data, model, "--temperature", 0)) == 0
    assert {sampling.temperature for _, sampling in echo.calls} == {0.0}


def test_interrupted_run_continues_where_it_was(
    echo: type[EchoEngine], data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    monkeypatch.setattr(echo, "fail_at", 4)
    with pytest.raises(RuntimeError, match="the engine died"):
        main(_arguments(out, data, model))
    asked = sum(len(texts) for texts, _ in echo.calls)
    assert 0 < asked < 160
    monkeypatch.setattr(echo, "fail_at", None)
    assert main(_arguments(out, data, model)) == 0
    assert sum(len(texts) for texts, _ in echo.calls) == 160
    assert main(_arguments(out, data, model)) == 0
    assert sum(len(texts) for texts, _ in echo.calls) == 160
    assert main(_arguments(whole, data, model)) == 0
    once, twice = (read_answers(Folder(folder).answers("some-model")) for folder in (whole, out))
    assert {q: a.turns for q, a in once.items()} == {q: a.turns for q, a in twice.items()}


def test_changed_settings_and_changed_weights_ask_again(
    echo: type[EchoEngine], data: Path, model: Path, tmp_path: Path
) -> None:
    def asked(*more: object) -> int:
        echo.calls.clear()
        assert main(_arguments(tmp_path / "run", data, model, "--limit", 1, *more)) == 0
        return sum(len(texts) for texts, _ in echo.calls)

    assert asked() == 16
    assert asked() == 0
    assert asked("--seed", 1) == 16
    assert asked("--template", "plain") == 16
    assert asked("--template", "human-assistant") == 0  # what auto had chosen
    assert asked("--dtype", "bfloat16") == 16
    assert asked("--context", 4000) == 16
    (model / "model.safetensors").write_bytes(b"weighty")
    assert asked() == 16
    summary = json.loads(Folder(tmp_path / "run").answer_summary("some-model").read_text())
    assert (summary["turns"], summary["answered"], summary["template"]) == (16, 16, "human-assistant")
    assert len(summary["template_hash"]) == 16


def test_answer_ends_where_the_next_turn_would_begin(
    echo: type[EchoEngine], data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(echo, "ending", "\n\nHuman: and now I ask")
    assert main(_arguments(tmp_path / "run", data, model, "--limit", 1)) == 0
    answers = read_answers(Folder(tmp_path / "run").answers("some-model"))
    assert not any("Human" in turn for answer in answers.values() for turn in answer.turns[:1])


def test_cut_answers_and_prompts_are_counted(
    echo: type[EchoEngine], data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer has one token a character: a second turn has more than the 80 that --context 144 leaves."""
    monkeypatch.setattr(echo, "finish", "length")
    assert main(_arguments(tmp_path / "run", data, model, "--limit", 1, "--context", 144)) == 0
    summary = json.loads(Folder(tmp_path / "run").answer_summary("some-model").read_text())
    assert (summary["cut_off"], summary["prompts_cut"]) == (16, 8)
    for texts, _ in echo.calls:
        for text in texts:
            assert text.endswith("Assistant:")
            assert len(text) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "64"], "leaves no room for a prompt"),
        (["--template", "chat"], "has no chat template"),
        (["--engine", "ecko"], "unknown rollout engine 'ecko'; did you mean 'echo'?"),
        (["--url", "http://127.0.0.1:9/v1", "--template", "plain"], "the service applies its own template"),
    ],
)
def test_bad_options_are_told(  # noqa: PLR0917, fixtures
    echo: type[EchoEngine],
    data: Path,
    model: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*_arguments(tmp_path / "run", data, model), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def _service(out: Path, data: Path, service: StubService, *more: object) -> list[str]:
    common = ["mt-bench", "answer", "--out", str(out), "--data", str(data), "--url", service.url]
    return [*common, "--model", "mine=served-name", "--max-tokens", "64", *map(str, more)]


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_eval.judges._FIRST_WAIT", 0.01)


@pytest.mark.usefixtures("_fast")
def test_service_is_asked_for_the_second_turn_with_its_first(data: Path, tmp_path: Path) -> None:
    reply: Callable[[Sequence[Any]], str] = lambda messages: f"  said {len(messages)}  "  # noqa: E731
    with StubService(reply=reply, fault_share=0.3, hang_seconds=1.5) as service:
        assert main(_service(tmp_path / "run", data, service, "--timeout", 1.2)) == 0
        done = [request["body"] for request in service.requests if request["status"] == "200"]
    answers = read_answers(Folder(tmp_path / "run").answers("mine"))
    assert len(answers) == 80
    assert {answer.turns for answer in answers.values()} == {("said 1", "said 3")}
    assert {body["model"] for body in done} == {"served-name"}
    second = [b["messages"] for b in done if len(b["messages"]) == 3]
    assert [m["role"] for m in second[0]] == ["user", "assistant", "user"]
    assert {b["temperature"] for b in done} == {0.0, 0.1, 0.7}


@pytest.mark.usefixtures("_fast")
def test_failed_request_is_never_an_answer(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The service breaks on question 81 and says nothing on 82: both stay open, and a later run asks only them."""
    words = {"First 81?": "", "First 82?": ""}
    with StubService(reply=lambda m: words.get(m[-1]["content"], "fine")) as service:
        assert main(_service(tmp_path / "run", data, service, "--attempts", 2)) == 1
        assert "2 questions have no answer" in " ".join(capsys.readouterr().err.split())
        answers = read_answers(Folder(tmp_path / "run").answers("mine"))
        assert not {81, 82} & answers.keys()
        assert len(answers) == 78
        words.clear()
        before = len(service.requests)
        assert main(_service(tmp_path / "run", data, service)) == 0
        assert len(service.requests) - before == 4
    assert len(read_answers(Folder(tmp_path / "run").answers("mine"))) == 80


def test_refused_service_stops_at_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubService(refuse=(404, "The model `served-name` does not exist.")) as service:
        assert main(_service(tmp_path / "run", data, service, "--concurrency", 4)) == 2
        assert len(service.requests) <= 8
    assert "HTTP 404: The model `served-name` does not exist." in capsys.readouterr().err
