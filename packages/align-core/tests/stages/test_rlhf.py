"""PPO: who starts from what, where the KL and the score go, what the checkpoint keeps, and that it learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.advantages import with_value_advantages
from align_core.config import KlConfig, OptimizerConfig, PpoLoss, RlhfConfig, SftLoss, ValueLoss
from align_core.errors import ConfigError
from align_core.stages.rlhf import SteeredKl, explained_variance, run_rlhf
from align_core.stages.run import read_metrics
from align_core.types import Batch

pytestmark = pytest.mark.usefixtures("length")


def test_models_start_from_policy_and_reward_checkpoints(
    make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any], chat_model: Path, tmp_path: Path
) -> None:
    config = make_config("rlhf", steps=2, reward="length", reward_model=chat_model)
    world = fake_world()
    run_rlhf(config, world)
    policy, reference, value = (trainer.config for trainer in world.trainers)
    assert (policy.model, policy.head, policy.trainable) == (config.model, "lm", True)
    assert (reference.model, reference.head, reference.trainable) == (config.model, "lm", False)
    assert (value.model, value.head, value.trainable) == (chat_model, "score", True)
    assert value.optimizer == config.value_optimizer
    assert (config.out / "value").is_dir()


def test_value_model_without_a_reward_model_starts_from_the_policy(
    make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    run_rlhf(make_config("rlhf", steps=1), world)
    assert world.trainers[2].config.model == world.trainers[0].config.model


def test_advantages_by_hand() -> None:
    """One prompt token, three sampled; gamma 1, lam 1, KL 0.5 each at weight 0.1, score 2, values 1, 0, -1.

    Rewards: -0.05, -0.05, 1.95. Returns to go: 1.85, 1.9, 1.95. Advantages: 0.85, 1.9, 2.95.
    """
    batch = Batch.of(
        [[5, 6, 7, 8]],
        tokens={
            "mask": [np.array([False, True, True, True])],
            "old_values": [np.array([9, 1, 0, -1], np.float32)],
        },
        columns={"reward": np.array([2], np.float32)},
    )
    kl = np.array([0, 0.5, 0.5, 0.5], np.float32)
    found = with_value_advantages(batch, kl, kl_coef=0.1, gamma=1.0, lam=1.0, normalise=False)
    np.testing.assert_allclose(found.token_column("advantages"), [0, 0.85, 1.9, 2.95], rtol=1e-6)
    np.testing.assert_allclose(found.token_column("returns"), [0, 1.85, 1.9, 1.95], rtol=1e-6)
    white = with_value_advantages(batch, kl, kl_coef=0.1, gamma=1.0, lam=1.0, normalise=True).token_column("advantages")
    assert white[0] == 0
    assert np.mean(white[1:]) == pytest.approx(0, abs=1e-6)
    assert np.std(white[1:].astype(float)) == pytest.approx(1, abs=1e-5)


def test_updates_see_whole_rollout_statistics_and_the_same_old_columns(
    make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]
) -> None:
    """Two updates a rollout: their advantages together have mean 0 and variance 1, each alone need not."""
    world = fake_world()
    run_rlhf(make_config("rlhf", steps=1, updates_per_rollout=2), world)
    policy, _, value = world.trainers
    assert [len(policy.seen), len(value.seen)] == [2, 2]
    advantages = np.concatenate([b.token_column("advantages")[b.mask].astype(float) for b in policy.seen])
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.std() == pytest.approx(1, abs=1e-4)
    for ours, critics in zip(policy.seen, value.seen):
        np.testing.assert_array_equal(ours.token_column("old_values"), critics.token_column("old_values"))


def test_first_step_has_no_kl_and_metrics_of_all_models(
    make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]
) -> None:
    config = make_config("rlhf", steps=2)
    run_rlhf(config, fake_world())
    first, second = read_metrics(config.out)
    assert abs(first["kl"]) < 1e-5
    assert first["canary_max"] < 1e-5
    assert second["kl"] != 0
    assert {"value_loss", "value_lr", "kl_coef", "return", "seconds_values", "lr"} <= first.keys()


def test_kl_in_the_reward_holds_the_policy(
    make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]
) -> None:
    kls = []
    for name, coef in (("free", 0.0), ("held", 20.0)):
        config = make_config(
            "rlhf", out=name, steps=30, optimizer=OptimizerConfig(lr=5.0, schedule="linear"), kl=KlConfig(coef=coef)
        )
        run_rlhf(config, fake_world())
        kls.append(read_metrics(config.out)[-1]["kl"])
    assert kls[1] < kls[0] / 2


def test_policy_learns_to_earn_more(make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]) -> None:
    config = make_config("rlhf", steps=40, optimizer=OptimizerConfig(lr=5.0, schedule="linear"))
    run_rlhf(config, fake_world())
    rewards = [line["reward"] for line in read_metrics(config.out)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.5


def test_value_warmup_leaves_the_policy_alone(
    make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("rlhf", value_warmup=2), fake_world()
    run_rlhf(config, world)
    policy, _, value = world.trainers
    assert [len(policy.seen), len(value.seen)] == [4, 6]
    assert policy.config.steps == 4
    assert ["loss" in line for line in read_metrics(config.out)] == [False, False, True, True, True, True]


def test_kl_coefficient_survives_a_checkpoint_exactly() -> None:
    config = KlConfig(coef=0.1, adaptive=True, target=1.0, horizon=100)
    kl, again = SteeredKl(config), SteeredKl(config)
    kl.update(kl=5.0, num_samples=7)
    assert kl.coef == pytest.approx(0.1 * (1 + 0.2 * 0.07))
    again.restore({"step": "3", **kl.state()})
    assert again.coef == kl.coef


def test_explained_variance_by_hand() -> None:
    """Returns 1 and 3 (mean 2, mean square 5), values 2 and 3: errors 1 and 0, mean -0.5; (0.5 - 0.25) / 1 is left."""
    found = {"squared_error": 0.5, "squared_return": 5.0, "return": 2.0, "value": 2.5}
    assert explained_variance(found) == pytest.approx(0.75)
    assert explained_variance({**found, "squared_return": 4.0}) == 0.0
    assert np.isnan(explained_variance(dict.fromkeys(found, np.nan)))


def test_demonstrations_join_every_update(
    tmp_path: Path, make_config: Callable[..., RlhfConfig], fake_world: Callable[..., Any]
) -> None:
    """Two a step, under `sft_weight`; the policy's own mask and the value model do not see them."""
    data = tmp_path / "demonstrations.jsonl"
    data.write_text("".join(json.dumps({"prompt": str(n), "response": str(n)}) + "\n" for n in range(5)))
    config = make_config("rlhf", steps=2, sft_data=data, sft_coef=0.25, sft_batch_size=2)
    world = fake_world()
    run_rlhf(config, world)
    policy, _, value = world.trainers
    for ours, critics in zip(policy.seen, value.seen):
        assert len(ours) == len(critics) + 2
        assert int(ours.mask.sum()) == int(critics.mask.sum())
        weight = ours.token_column("sft_weight")
        assert set(np.unique(weight).tolist()) == {0.0, 0.25}
        assert not np.any(weight[: len(critics.tokens)])
        assert len(set(ours.sequence_column("group")[-2:].tolist()) & set(critics.sequence_column("group"))) == 0
    drawn = [b.tokens[-5:].tolist() for b in policy.seen]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "model", "reward_model": None}, "needs the directory of a reward model"),
        ({"value_warmup": 6}, "value_warmup must be less than the 6 steps"),
        ({"lam": 1.5}, "lam must lie between"),
        ({"sft_coef": 0.5}, "sft_data and sft_coef go together"),
        ({"kl": KlConfig(adaptive=True, horizon=2)}, "kl.horizon 2 is shorter than a step of 12"),
    ],
)
def test_contradictions_are_refused(make_config: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("rlhf", **changes)


def test_losses_refuse_bad_numbers() -> None:
    assert isinstance(SftLoss(), SftLoss)
    with pytest.raises(ConfigError, match="clip_low must be greater than 0"):
        PpoLoss(clip_low=0)
    with pytest.raises(ConfigError, match="clip must be greater than 0"):
        ValueLoss(clip=0)
