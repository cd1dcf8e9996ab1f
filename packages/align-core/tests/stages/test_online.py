"""What a run that samples is told when it begins or continues: changed demonstrations and rewards, biased sampling."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.config import GrpoConfig, SamplingConfig
from align_core.errors import DataError
from align_core.stages.grpo import run_grpo
from align_core.stages.online import open_run, reward_files
from align_core.stages.prepare import open_demonstrations
from align_core.stages.rollout import Prompts
from align_core.stages.run import Run

pytestmark = pytest.mark.usefixtures("length")
REWARD = "def digits(prompts, completions, columns):\n    return [float(len(text)) for text in completions]\n"


def begun(config: GrpoConfig) -> None:
    """Opens the run and gives it a checkpoint."""
    reopened(config)
    (config.out / "checkpoints" / "step_2").mkdir(parents=True)


def reopened(config: GrpoConfig) -> Run:
    prompts = Prompts(config)
    return open_run(config, prompts, open_demonstrations(config, prompts.tokenizer))


def test_changed_demonstrations_are_refused(make_config: Callable[..., GrpoConfig], tmp_path: Path) -> None:
    file = tmp_path / "demonstrations.jsonl"
    rows = [json.dumps({"prompt": f"{n}", "response": f"{n}"}) + "\n" for n in range(4)]
    file.write_text("".join(rows), encoding="utf-8")
    config = make_config("grpo", sft_data=file, sft_coef=0.1, sft_batch_size=2)
    begun(config)
    reopened(config)
    file.write_text("".join(rows[:3]), encoding="utf-8")
    with pytest.raises(DataError, match=r"^sft_data of the run in .* has changed: .*records was 4, is 3"):
        reopened(config)


def test_a_changed_reward_is_told_and_not_refused(
    make_config: Callable[..., GrpoConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training, evaluation = tmp_path / "reward.py", tmp_path / "evaluation.py"
    for file in (training, evaluation):
        file.write_text(REWARD, encoding="utf-8")
    config = make_config("grpo", reward=f"length=2,{training}:digits", eval_reward=f"{evaluation}:digits=0.5")
    assert reward_files(config) == [training, evaluation]
    begun(config)
    with caplog.at_level(logging.WARNING):
        reopened(config)
        assert caplog.text == ""
        evaluation.write_text(REWARD.replace("len(text)", "-len(text)"), encoding="utf-8")
        reopened(config)
    assert f"{evaluation} has changed since the run in {config.out} began" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_biased_sampling_is_told_once(
    make_config: Callable[..., GrpoConfig],
    fake_world: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    top_p: float,
) -> None:
    config = make_config("grpo", steps=2, sampling=SamplingConfig(n=3, max_tokens=5, top_p=top_p))
    with caplog.at_level(logging.WARNING):
        run_grpo(config, fake_world())
    assert [("top_p 0.9 do not sample" in record.getMessage()) for record in caplog.records] == [True] * (top_p < 1)
