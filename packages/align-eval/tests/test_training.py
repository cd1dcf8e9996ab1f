"""Evaluations on a live engine: what stages find through `align.evaluations`, and that they agree with the reward."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core import registry
from align_core.config import EvaluationConfig, SamplingConfig
from align_core.text import load_tokenizer
from align_core.types import Completion, Prompt
from align_eval.accuracy.math import MathReward
from align_eval.mt_bench.fastchat import read_answers
from align_eval.mt_bench.folder import Folder
from align_eval.training import accuracy, mt_bench_answers


def test_stages_find_them_by_name() -> None:
    assert registry.load("align.evaluations", "accuracy") is accuracy
    assert registry.load("align.evaluations", "mt-bench-answers") is mt_bench_answers


def test_accuracy_is_the_mean_of_the_math_reward_on_greedy_answers(
    adding: Any, make_model: Callable[..., Path], sums: Path, tmp_path: Path
) -> None:
    """What `align grpo --eval_data` logs as eval_reward: the reward function on greedy answers to held-out prompts."""
    model = make_model("m", mistakes=3)
    engine = adding.from_model(model, None)
    config = EvaluationConfig(data=sums, out=tmp_path / "out", template="plain", context=64, max_tokens=16)
    metrics = accuracy(engine, load_tokenizer(model), config, step=7)
    items = [json.loads(line) for line in (tmp_path / "out" / "accuracy_step_7.jsonl").read_text().splitlines()]
    columns = {"answer": [item["answer"] for item in items]}
    scores = MathReward()([item["prompt"] for item in items], [item["completion"] for item in items], columns)
    assert metrics["accuracy"] == np.mean([score.value for score in scores]) == 0.7
    assert metrics["accuracy_low"] < 0.7 < metrics["accuracy_high"]
    assert (metrics["accuracy_strict"], metrics["accuracy_unanswered"], metrics["accuracy_truncated"]) == (0.7, 0, 0)
    assert adding.live == 1  # the engine stays with the stage
    engine.close()


def test_mt_bench_answers_are_written_for_the_judge(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    question = {"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]}
    (data / "question.jsonl").write_text(json.dumps(question) + "\n")
    prompt = {"name": "single-v1", "system_prompt": "s", "prompt_template": "{question}"}
    (data / "judge_prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    (data / "gpt-4.jsonl").write_text("")
    model = make_model("m", mistakes=3)
    tokenizer = load_tokenizer(model)

    class Fixed:
        def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
            tokens = np.asarray(tokenizer.encode("Well."), dtype=np.int32)
            return [
                Completion(
                    prompt_id=prompt.id,
                    sample=0,
                    tokens=tokens,
                    logprobs=np.zeros(len(tokens), np.float32),
                    finish_reason="stop",
                    version=3,
                )
                for prompt in prompts
            ]

    config = EvaluationConfig(data=data, out=tmp_path / "out", context=256, max_tokens=16)
    engine: Any = Fixed()
    metrics = mt_bench_answers(engine, tokenizer, config, step=20)
    assert metrics == {"mt_bench_tokens": 5.0, "mt_bench_truncated": 0.0, "mt_bench_empty": 0.0}
    assert read_answers(Folder(tmp_path / "out").answers("step_20"))[81].turns == ("Well.", "Well.")
