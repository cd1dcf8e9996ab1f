"""The command: files and table it makes, and how it says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_eval.cli import main


def _arguments(data: Path, out: Path, *models: object, engine: str = "adding") -> list[str]:
    given = [argument for model in models for argument in ("--model", str(model))]
    options = ["--engine", engine, "--template", "plain", "--context", "64", "--max_tokens", "16"]
    return ["accuracy", *given, "--data", str(data), "--out", str(out), *options]


def test_accuracy_writes_items_summary_and_table(
    adding: Any, make_model: Callable[..., Path], sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong = make_model("weak", mistakes=2), make_model("strong", mistakes=11)
    out = tmp_path / "out"
    assert main(_arguments(sums, out, weak, strong)) == 0
    summary = json.loads((out / "accuracy.json").read_text())
    assert {name: (entry["n"], entry["correct"]) for name, entry in summary.items()} == {
        "weak": (10, 5),
        "strong": (10, 9),
    }
    entry = summary["weak"]
    assert entry["accuracy"] == 0.5
    assert entry["low"] < 0.5 < entry["high"]
    assert (entry["model"], entry["data"], entry["template"]) == (str(weak), str(sums), "plain")
    items = [json.loads(line) for line in (out / "weak.jsonl").read_text().splitlines()]
    assert [item["correct"] for item in items] == [False, True] * 5
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.json", "store", "strong.jsonl", "weak.jsonl"]
    printed = capsys.readouterr().out
    assert "strong" in printed
    assert "90.0%" in printed


def test_limit_shortens_the_evaluation(
    adding: Any, make_model: Callable[..., Path], sums: Path, tmp_path: Path
) -> None:
    assert main([*_arguments(sums, tmp_path / "out", make_model("m", mistakes=2)), "--limit", "4"]) == 0
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["m"]["n"] == 4


def test_summary_appears_when_all_models_are_done_and_items_before(
    adding: Any, make_model: Callable[..., Path], sums: Path, tmp_path: Path
) -> None:
    good, bad = make_model("good", mistakes=2), make_model("bad", mistakes=2)
    (bad / "tokenizer.json").unlink()
    assert main(_arguments(sums, tmp_path / "out", good, bad)) == 2
    assert [path.name for path in (tmp_path / "out").glob("*.json*")] == ["good.jsonl"]


def test_user_errors_are_one_line_and_status_2(
    adding: Any, make_model: Callable[..., Path], sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("m", mistakes=2)
    cases = [
        (_arguments(tmp_path / "none.jsonl", tmp_path, model), "does not exist"),
        (_arguments(sums, tmp_path, tmp_path / "nowhere"), "nowhere' does not exist"),
        (_arguments(sums, tmp_path, model, engine="addign"), "unknown rollout engine 'addign'; did you mean 'adding'?"),
        (_arguments(sums, tmp_path, model, model), "two models are called"),
        ([*_arguments(sums, tmp_path, model), "--limit", "0"], "limit must be greater than 0"),
        ([*_arguments(sums, tmp_path, model), "--max_tokens", "64"], "leaves no room for a prompt"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert "Traceback" not in printed


def test_uninstalled_engine_is_named_with_its_pip_line(
    adding: Any, make_model: Callable[..., Path], sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_arguments(sums, tmp_path, make_model("m", mistakes=2), engine="vllm")) == 2
    assert "pip install align-rollout" in capsys.readouterr().err


def test_bad_arguments_are_status_2_and_help_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["mt-bench"]) == 2
    assert "{answer,judge,report}" in capsys.readouterr().err
    assert main(["--help"]) == 0
