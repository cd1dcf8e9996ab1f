"""Evaluation on an engine that adds: which answers count, and that the engine is freed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.config import EngineConfig, SamplingConfig
from align_core.errors import ConfigError, WorkerError
from align_eval.accuracy.run import Evaluation, evaluate_model
from align_eval.accuracy.tasks import read_tasks
from align_eval.statistics import wilson

GREEDY = SamplingConfig(n=1, max_tokens=16, temperature=0.0)


def _evaluate(model: Path, data: Path, **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "engine": EngineConfig(name="adding", context=64),
        "sampling": GREEDY,
        "template": "plain",
        **changes,
    }
    return evaluate_model(model, read_tasks(data), **arguments)


def test_accuracy_counts_right_answers(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    """Sums 2 .. 11, wrong at the multiples of 3 (3, 6, 9): 7 of 10."""
    evaluation = _evaluate(make_model("m", mistakes=3), sums)
    result = evaluation.accuracy
    assert (result.n, result.correct, result.accuracy, result.strict_correct) == (10, 7, 0.7, 7)
    assert (result.low, result.high) == wilson(7, 10)
    assert [item.line for item in evaluation.items if not item.correct] == [2, 5, 8]
    assert [item.extracted for item in evaluation.items[:2]] == ["2", "4"]
    assert evaluation.items[0].prompt == "1+1"


def test_strict_grading_wants_the_mark(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    result = _evaluate(make_model("m", mistakes=3, reply="it is {}"), sums).accuracy
    assert (result.correct, result.strict_correct, result.strict_low, result.unanswered) == (7, 0, 0.0, 0)


def test_unanswered_and_truncated_are_counted(
    adding: Any, make_model: Callable[..., Path], sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "finish_reason", "length")
    result = _evaluate(make_model("m", mistakes=3, reply="hm"), sums).accuracy
    assert (result.correct, result.unanswered, result.truncated) == (0, 10, 10)


def test_progress_reports_every_task(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    done: list[int] = []
    _evaluate(make_model("m", mistakes=3), sums, progress=done.append)
    assert sum(done) == 10


def test_engine_is_closed_after_success_and_failure(
    adding: Any, make_model: Callable[..., Path], sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("m", mistakes=3)
    _evaluate(model, sums)
    assert adding.live == 0
    monkeypatch.setattr(adding, "finish_reason", "abort")
    with pytest.raises(WorkerError, match="line 1 of the data"):
        _evaluate(model, sums)
    assert adding.live == 0


def test_context_without_room_for_a_prompt_is_refused(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens 16 leaves no room for a prompt in a context of 16"):
        _evaluate(make_model("m", mistakes=3), sums, engine=EngineConfig(name="adding", context=16))


def test_several_completions_a_task_are_refused(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    with pytest.raises(ConfigError, match=r"got sampling\.n 2"):
        _evaluate(make_model("m", mistakes=3), sums, sampling=SamplingConfig(n=2, max_tokens=16))
