"""`align-rollout generate` from file to file, with a stand-in tokenizer and the fake engine; refusals leave no file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from align_core import registry
from align_rollout import cli, jobs
from align_rollout.fake import FakeEngine, save_bigram

_LETTERS = "_$abcdef"  # ids 0 .. 7; $ ends a completion


class _Tokenizer:
    """One token a letter."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(_LETTERS[i] for i in ids).rstrip("$")


def _render(tokenizer: object, content: Any, *, template: str, max_tokens: int) -> NDArray[np.int32]:
    text = content if isinstance(content, str) else content[-1]["content"]
    return np.array([_LETTERS.index(letter) for letter in text][-max_tokens:], np.int32)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bigram model that says the alphabet from the prompt's last letter on: after f comes the end."""
    bigram = np.zeros((8, 8), np.float32)
    for letter in range(2, 8):
        bigram[letter, letter + 1 if letter < 7 else 1] = 50
    save_bigram(tmp_path, {"bigram.weight": bigram, "bias": np.zeros(8, np.float32)}, eos_id=1)
    monkeypatch.setattr(cli, "load_tokenizer", lambda directory: _Tokenizer())
    monkeypatch.setattr(jobs, "render_prompt", _render)
    monkeypatch.setattr(registry, "load", lambda group, name: FakeEngine)
    return tmp_path


def _interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_generate_writes_one_line_a_completion_and_keeps_columns(model: Path, tmp_path: Path) -> None:
    prompts = _write(
        tmp_path / "p.jsonl", '{"prompt": "ad", "answer": 7}', "", '{"messages": [{"role": "user", "content": "c"}]}'
    )
    out = tmp_path / "sub" / "out.jsonl"
    assert cli.main(["generate", str(prompts), str(out), "--model", str(model), "--max-tokens", "3"]) == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == {
        "prompt": "ad",
        "answer": 7,
        "response": "ef",
        "sample": 0,
        "finish_reason": "stop",
        "response_tokens": 3,
    }
    assert (second["response"], second["finish_reason"]) == ("def", "length")
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"], "a temporary file is left"


def test_generate_in_portions_gives_the_same_as_at_once(model: Path, tmp_path: Path) -> None:
    prompts = _write(tmp_path / "p.jsonl", *(json.dumps({"prompt": letter}) for letter in "_a_b_c_d"))
    found = []
    for at_once in ("1", "256"):
        out = tmp_path / f"{at_once}.jsonl"
        words = [
            "--model",
            str(model),
            "--max-tokens",
            "4",
            "--n",
            "3",
            "--temperature",
            "1",
            "--max-sequences",
            at_once,
        ]
        assert cli.main(["generate", str(prompts), str(out), *words]) == 0
        found.append(out.read_text())
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 24


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ('{"text": "a"}', [], 'p.jsonl:2: expected {"prompt"'),
        ("{", [], "p.jsonl:2: not JSON"),
        ('{"messages": []}', [], "p.jsonl:2: expected"),
        ('{"prompt": "a"}', ["--max-tokens", "2048"], "leaves no room for a prompt in --context 2048"),
        ('{"prompt": "a"}', ["--n", "2"], "set n to 1 or temperature above 0"),
    ],
)
def test_refusals_name_the_cause_and_write_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], line: str, words: list[str], message: str
) -> None:
    prompts = _write(model / "p.jsonl", '{"prompt": "a"}', line)
    out = model / "out.jsonl"
    assert cli.main(["generate", str(prompts), str(out), "--model", str(model), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_existing_file_is_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = _write(tmp_path / "p.jsonl", '{"prompt": "a"}'), _write(tmp_path / "out.jsonl", "mine")
    words = ["generate", str(prompts), str(out), "--model", str(model)]
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine\n"
    assert cli.main([*words, "--overwrite"]) == 0
    assert json.loads(out.read_text())["response"] == "bcdef"


@pytest.mark.parametrize("change", ["weights", "--dtype=bfloat16", "--context=1024", "--engine=other"])
def test_an_interrupted_job_is_not_continued_by_another_model_or_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    prompts, out = _write(tmp_path / "p.jsonl", '{"prompt": "a"}'), tmp_path / "out.jsonl"
    words = ["generate", str(prompts), str(out), "--model", str(model)]
    with monkeypatch.context() as interrupted:
        interrupted.setattr(cli, "write_records", _interrupted)
        assert cli.main(words) == 130
    if change == "weights":
        save_bigram(tmp_path, {"bigram.weight": np.ones((8, 8), np.float32), "bias": np.zeros(8, np.float32)}, eos_id=1)
    assert cli.main(words if change == "weights" else [*words, change]) == 2
    assert "a job with other settings, or another model" in capsys.readouterr().err
    if change != "weights":
        assert cli.main(words) == 0


def test_an_unknown_engine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert cli.main(["generate", "p.jsonl", str(out), "--model", str(tmp_path), "--engine", "vlm"]) == 2
    assert "unknown rollout engine 'vlm'; did you mean 'vllm'" in capsys.readouterr().err


def test_a_missing_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
