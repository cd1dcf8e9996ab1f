"""Online DPO: a frozen reference, rewards that order the policy's own completions, and that it learns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from align_core.config import CorrectionConfig, OnlineDpoConfig, OnlineDpoLoss, OptimizerConfig, SamplingConfig
from align_core.errors import ConfigError
from align_core.stages.online_dpo import run_online_dpo
from align_core.stages.run import read_lines, read_metrics

pytestmark = pytest.mark.usefixtures("length")


def test_every_batch_has_rewards_groups_and_the_untrained_models_logprobs(
    make_config: Callable[..., OnlineDpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    run_online_dpo(make_config("online-dpo"), world)
    policy, reference = world.trainers
    assert (policy.config.trainable, reference.config.trainable) == (True, False)
    untrained = fake_world().trainer(policy.config)
    for batch in policy.seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))
        assert np.all(np.diff(batch.sequence_column("group")) >= 0)  # a group is adjacent, so one micro-batch holds it
        assert len(np.unique(batch.sequence_column("reward"))) > 1


def test_policy_learns_to_earn_more(
    make_config: Callable[..., OnlineDpoConfig], fake_world: Callable[..., Any]
) -> None:
    config = make_config(
        "online-dpo", steps=40, optimizer=OptimizerConfig(lr=20.0, schedule="linear"), loss=OnlineDpoLoss(beta=1.0)
    )
    run_online_dpo(config, fake_world())
    rewards = [line["reward"] for line in read_metrics(config.out)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 1


def test_samples_are_written_for_people(
    make_config: Callable[..., OnlineDpoConfig], fake_world: Callable[..., Any]
) -> None:
    """Two of twelve completions a step, with prompt, reply and reward."""
    config = make_config("online-dpo", samples=2)
    run_online_dpo(config, fake_world())
    rows = read_lines(config.out / "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(6) for _ in range(2)]
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman: What is ")
        assert row["reward"] == row["parts"]["length"] == len(row["reply"])
        assert row["finish_reason"] in ("stop", "length")


def test_the_distance_of_engine_and_trainer_is_shown_and_cannot_be_corrected(
    make_config: Callable[..., OnlineDpoConfig], fake_world: Callable[..., Any]
) -> None:
    config = make_config("online-dpo", steps=2)
    run_online_dpo(config, fake_world())
    for line in read_metrics(config.out):
        assert line["mismatch_abs"] == pytest.approx(line["canary_mean"], abs=1e-9)
        assert abs(line["mismatch_kl"]) < 1e-4
    with pytest.raises(ConfigError, match="correction 'truncated' weighs ratios to old log-probs"):
        make_config("online-dpo", correction=CorrectionConfig(method="truncated"))


def test_one_completion_makes_no_pair(make_config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="a group of 1 completion"):
        make_config("online-dpo", sampling=SamplingConfig(n=1))
