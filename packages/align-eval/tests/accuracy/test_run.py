"""Evaluation on an engine that adds: which answers count, and that the engine is freed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError, WorkerError
from align_core.types import Score
from align_eval.accuracy.completions import KEY_FIELDS
from align_eval.accuracy.run import Evaluation, evaluate_model, summarise
from align_eval.accuracy.tasks import read_tasks
from align_eval.accuracy.verifiers import make_verifier
from align_eval.statistics import cluster_bootstrap, wilson
from align_eval.store import Store

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


def test_several_samples_give_mean_and_pass_at_k(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    """Sums 2 .. 11, sample s wrong where 3 divides sum + s: with 4 samples a task has 1 or 2 wrong ones.

    s = 0 and s = 3 are wrong at 3, 6, 9 (2 right of 4); elsewhere one of them is (3 right of 4): 3 x 2 + 7 x 3 = 27 of
    40 right. pass@2 is 1 - C(2,2)/C(4,2) = 5/6 for the three and 1 for the seven: 0.95.
    """
    sampling = SamplingConfig(n=4, max_tokens=16, temperature=1.0)
    evaluation = _evaluate(make_model("m", mistakes=3), sums, sampling=sampling)
    result = evaluation.accuracy
    assert (result.n, result.samples, result.correct, result.accuracy) == (10, 4, 27, 0.675)
    assert {k: share.value for k, share in result.pass_at.items()} == pytest.approx({1: 0.675, 2: 0.95, 4: 1.0})
    assert (result.low, result.high) == cluster_bootstrap([3, 2, 3, 3, 2, 3, 3, 2, 3, 3], [4] * 10)
    assert result.pass_at[2].low < 0.95 < result.pass_at[2].high
    assert [(item.line, item.sample) for item in evaluation.items[:5]] == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    with pytest.raises(ConfigError, match="not 3 for each"):
        summarise(evaluation.items, samples=3, seconds=0.0)


def test_greedy_has_no_pass_at_k(adding: Any, make_model: Callable[..., Path], sums: Path) -> None:
    assert _evaluate(make_model("m", mistakes=3), sums).accuracy.pass_at == {}


def test_latex_and_reward_verifiers_decide(
    adding: Any, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""MATH's records: the gold is the solution's box; the model boxes a fraction in another spelling."""
    data = tmp_path / "math.jsonl"
    solution = r"We add. So it is $\boxed{\frac{2}{1}}$."
    data.write_text(json.dumps({"problem": "1+1", "solution": solution, "level": "Level 1"}) + "\n")
    model = make_model("m", mistakes=7, reply=r"it is \boxed{{\dfrac {}1}}")
    verifier = make_verifier("math")
    evaluation = evaluate_model(
        model,
        read_tasks(data, verifier),
        engine=EngineConfig(name="adding", context=64),
        sampling=SamplingConfig(max_tokens=32, temperature=0.0),
        template="plain",
        verifier=verifier,
    )
    (item,) = evaluation.items
    assert (item.correct, item.strict_correct, item.answer, item.method) == (True, True, r"\frac{2}{1}", "boxed")


def test_reward_function_is_a_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed() -> RewardFunction:
        return lambda _prompts, completions, columns: [
            Score(value=1.0, extracted="x") if text == want else Score(value=0.0)
            for text, want in zip(completions, columns["want"])
        ]

    monkeypatch.setattr("align_core.registry.load", lambda group, name: fixed)
    verifier = make_verifier("reward:mine")
    verdicts = verifier.grade(["p", "p"], ["a", "b"], [{"want": "a"}, {"want": "c"}])
    assert [(v.flexible, v.method) for v in verdicts] == [(True, "mine"), (False, "mine")]
    assert verifier.gold({"want": "a"}) == ""

    def failing() -> RewardFunction:
        return lambda _prompts, completions, _columns: [Score(value=None, error="no gold") for _ in completions]

    monkeypatch.setattr("align_core.registry.load", lambda group, name: failing)
    with pytest.raises(DataError, match="could not score 'a': no gold"):
        make_verifier("reward:mine").grade(["p"], ["a"], [{}])


def test_unknown_verifier_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown verifier 'gsm'; did you mean 'gsm8k'"):
        make_verifier("gsm")


def test_interrupted_evaluation_continues_and_regrades(
    adding: Any, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 tasks go to the engine 256 at a time; it dies in the third call, and 88 are left."""
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+1", "answer": a + 1}) + "\n" for a in range(600)))
    model, path = make_model("m", mistakes=10), tmp_path / "store.jsonl"

    def run(**changes: Any) -> Evaluation:
        with Store(path, KEY_FIELDS) as store:
            return _evaluate(model, data, store=store, **changes)

    monkeypatch.setattr(adding, "fail_after", 512)
    with pytest.raises(RuntimeError, match="the engine died"):
        run()
    assert adding.live == 0
    monkeypatch.setattr(adding, "fail_after", None)
    monkeypatch.setattr(adding, "asked", 0)
    whole = run()
    assert adding.asked == 88
    again = run()
    assert adding.asked == 88
    assert again.items == whole.items
    assert whole.accuracy.correct == 540
    run(sampling=SamplingConfig(max_tokens=17, temperature=0.0))
    assert adding.asked == 688  # another setting is another completion
    (model / "skill.json").write_text(json.dumps({"mistakes": 2, "reply": "#### {}"}))
    assert run().accuracy.correct == 300  # and so is another model
