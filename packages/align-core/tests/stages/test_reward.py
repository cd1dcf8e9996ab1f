"""The reward stage ranks responses within their prompt, and its held-out accuracy is that of ordered pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import RewardConfig
from align_core.data.examples import Example
from align_core.errors import DataError
from align_core.stages.reward import ranked_batch, run_reward


def example(*tokens: int) -> Example:
    return Example(tokens=np.array(tokens, np.int32), mask=np.ones(len(tokens), np.bool_))


def test_ranked_batch_has_the_prompt_as_group_and_the_score_as_label() -> None:
    groups = [([example(5), example(6, 7)], [1, 0]), ([example(8), example(9), example(10)], [0.5, 2, 1])]
    batch = ranked_batch(groups)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.sequence_column("group").tolist() == [0, 0, 1, 1, 1]
    assert batch.sequence_column("label").tolist() == [1.0, 0.0, 0.5, 2.0, 1.0]


def test_stage_learns_the_ranking_and_measures_it_on_the_held_out_file(
    tmp_path: Path, make_config: Callable[..., RewardConfig], fake_world: Callable[..., Any]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "12?", "chosen": "7", "rejected": "1"}\n', encoding="utf-8")
    config, world = make_config("reward", eval_data=held_out), fake_world()
    run_reward(config, world)
    (trainer,) = world.trainers
    assert (trainer.config.head, trainer.config.trainable) == ("score", True)
    assert len(trainer.seen[0]) == 4 * 3
    result = json.loads((config.out / "result.json").read_text())
    assert (result["records"], result["eval_records"], result["eval_accuracy"]) == (10, 1, 1.0)
    assert result["last_step"]["step"] == 5


def test_without_a_held_out_file_there_is_no_accuracy(
    make_config: Callable[..., RewardConfig], fake_world: Callable[..., Any]
) -> None:
    config = make_config("reward")
    run_reward(config, fake_world())
    assert json.loads((config.out / "result.json").read_text())["eval_accuracy"] is None


def test_missing_held_out_file_is_found_before_training(
    tmp_path: Path, make_config: Callable[..., RewardConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    with pytest.raises(Exception, match="nowhere' does not exist"):
        run_reward(make_config("reward", eval_data=tmp_path / "nowhere"), world)
    assert world.trainers == []


def test_held_out_file_that_ranks_nothing_is_refused_before_anything_is_written(
    tmp_path: Path, make_config: Callable[..., RewardConfig], fake_world: Callable[..., Any]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "12?", "response": ["7", "1"], "score": [1, 1]}\n' * 2, encoding="utf-8")
    config, world = make_config("reward", eval_data=held_out), fake_world()
    with pytest.raises(DataError, match=r"held_out.jsonl, line 1\) scores one response above another"):
        run_reward(config, world)
    assert world.trainers == []
    assert not config.out.exists()
