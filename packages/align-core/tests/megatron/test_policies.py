"""Losses on sampled completions: the same three updates under every cut and layout, ratios that start at 1, the
critic's values, demonstrations beside, and what the update measures of the engine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_llama import LENGTHS, ragged_batch
from megatron_world import run_ranks

from align_core.advantages import mixed_rows, with_correction, with_group_advantages
from align_core.config import (
    GrpoLoss,
    LossConfig,
    OnlineDpoLoss,
    OptimizerConfig,
    ParallelConfig,
    PpoLoss,
    TrainerConfig,
    TrainingConfig,
    ValueLoss,
)
from align_core.errors import ConfigError, DataError
from align_core.megatron import MegatronTrainer, RankContext
from align_core.megatron.losses import prepare_loss
from align_core.types import Batch

REWARD = np.asarray((0.0, 1.0, 0.5, 3.0, 3.0, 1.0, -1.0, 0.0), np.float32)
GROUP = np.asarray((1, 1, 1, 2, 2, 2, 3, 3))
STEPS = 3
LOSSES: dict[str, LossConfig] = {
    "grpo": GrpoLoss(kl_coef=0.1),
    "grpo-sequence": GrpoLoss(reduction="sequence_mean"),
    "dr_grpo": GrpoLoss(variant="dr_grpo", length=12),
    "dapo": GrpoLoss(variant="dapo"),
    "gspo": GrpoLoss(variant="gspo", kl_coef=0.1),
    "cispo": GrpoLoss(variant="cispo"),
    "rloo": GrpoLoss(variant="rloo", kl_in_reward=0.05),
    "reinforce_pp": GrpoLoss(variant="reinforce_pp", kl_in_reward=0.05),
    "reinforce_pp_baseline": GrpoLoss(variant="reinforce_pp_baseline"),
    "online_dpo": OnlineDpoLoss(beta=1.0),
    "ppo": PpoLoss(),
    "value": ValueLoss(),
}


def test_three_updates_of_every_loss_are_alike_under_every_layout(llama: Callable[..., Path]) -> None:
    directory = llama()
    expected = run_ranks(_train_all, ParallelConfig(), directory, 4096)[0]
    for name, metrics in expected.items():
        assert metrics[0]["loss"] != metrics[-1]["loss"], name
    for parallel, budget in (
        (ParallelConfig(), 16),
        (ParallelConfig(tensor=2), 4096),
        (ParallelConfig(pipeline=2), 32),
        (ParallelConfig(data=2), 4096),
    ):
        found = run_ranks(_train_all, parallel, directory, budget)[0]
        for name, metrics in expected.items():
            for step, (ours, theirs) in enumerate(zip(found[name], metrics, strict=True)):
                for key, value in theirs.items():
                    assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (parallel, name, step, key)


def _train_all(context: RankContext, directory: Path, budget: int) -> dict[str, list[dict[str, float]]]:
    """Three updates by each loss on the same completions; the first's ratios are 1."""
    return {name: _train(context, directory, budget, loss) for name, loss in LOSSES.items()}


def _train(context: RankContext, directory: Path, budget: int, loss: LossConfig) -> list[dict[str, float]]:
    trainer = MegatronTrainer(_config(directory, context.parallel, loss, budget), context)
    batch = _completions()
    if isinstance(loss, ValueLoss):
        batch = batch.with_columns(tokens={"old_values": trainer.values(batch)})
    else:
        own = trainer.logprobs(batch)
        batch = batch.with_columns(tokens={"old_logprobs": own, "reference_logprobs": own - np.float32(0.1)})
    found = []
    for step in range(STEPS):
        metrics = dict(trainer.step(batch, loss))
        if step == 0 and not isinstance(loss, ValueLoss | OnlineDpoLoss):
            assert abs(metrics["approx_kl"]) < 1e-9  # k3 of a log-ratio of 1e-5 would be 5e-11
            assert metrics["clip_fraction"] == 0.0
        found.append({key: value for key, value in metrics.items() if "second" not in key and not key.endswith("_s")})
    return found


def _completions() -> Batch:
    """Ragged sequences in groups with rewards; PPO's columns are made up, and 0 outside the mask."""
    batch = ragged_batch()
    noise = np.random.default_rng(5).standard_normal((3, len(batch.tokens))).astype(np.float32) * batch.mask
    return batch.with_columns(
        tokens={"advantages": noise[0], "returns": noise[1], "engine_logprobs": noise[2]},
        sequences={"group": GROUP, "reward": REWARD},
    )


def _config(directory: Path, parallel: ParallelConfig, loss: LossConfig, budget: int = 4096) -> TrainerConfig:
    return TrainerConfig(
        model=directory,
        head="score" if isinstance(loss, ValueLoss) else "lm",
        parallel=parallel,
        steps=STEPS,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(micro_batch_tokens=budget, device="cpu"),
    )


def test_values_are_of_the_token_before_and_end_in_the_score(llama: Callable[..., Path]) -> None:
    """A value is what the head says before the token is chosen; a sequence's score what it says after the last."""
    trainer = MegatronTrainer(_config(llama(), ParallelConfig(), ValueLoss()))
    batch = _completions()
    trainer.step(batch.with_columns(tokens={"old_values": np.zeros(len(batch.tokens), np.float32)}), ValueLoss())
    values, scores = trainer.values(batch), trainer.scores(batch)
    assert np.all(values[batch.offsets[:-1]] == 0)
    assert np.all(values[1] != 0)
    longer = Batch.of([np.append(part, 3) for part in np.split(batch.tokens, batch.offsets[1:-1])])
    np.testing.assert_allclose(trainer.values(longer)[longer.offsets[1:] - 1], scores, atol=1e-6)
    trainer.close()


def test_the_update_itself_gives_old_logprobs_and_measures_the_engine(llama: Callable[..., Path]) -> None:
    """Without a scoring pass: the same first update, and the mean distance to the engine's log-probs."""
    given, fused = (MegatronTrainer(_config(llama(), ParallelConfig(), GrpoLoss(), budget)) for budget in (4096, 16))
    batch = with_group_advantages(GrpoLoss(), _completions())
    own = given.logprobs(batch)
    scored = given.step(batch.with_columns(tokens={"old_logprobs": own}), GrpoLoss())
    metrics = fused.step(batch, GrpoLoss())
    for name in ("loss", "grad_norm", "entropy", "policy_loss"):
        assert metrics[name] == pytest.approx(scored[name], rel=1e-4, abs=1e-6)
    apart = np.abs(own - batch.token_column("engine_logprobs").astype(np.float32))[batch.mask].mean()
    assert metrics["canary_mean"] == pytest.approx(apart, rel=1e-4)
    assert "canary_mean" not in scored
    given.close()
    fused.close()


@pytest.mark.parametrize("loss", [GrpoLoss(), GrpoLoss(variant="rloo"), OnlineDpoLoss()])
def test_demonstrations_add_their_weighted_cross_entropy_and_change_nothing_else(
    llama: Callable[..., Path], loss: LossConfig
) -> None:
    trainer = MegatronTrainer(_config(llama(), ParallelConfig(), loss))
    alone = _completions()
    own = trainer.logprobs(alone)
    alone = alone.with_columns(tokens={"old_logprobs": own, "reference_logprobs": own * np.float32(0.9)})
    extra = alone.select(np.asarray([1, 3]))
    weight = np.concatenate([np.zeros(len(alone.tokens), np.float32), 0.5 * extra.mask]).astype(np.float32)
    mixed = Batch(
        tokens=np.concatenate([alone.tokens, extra.tokens]),
        offsets=np.concatenate([alone.offsets, len(alone.tokens) + extra.offsets[1:]]),
        token_columns={
            **{k: np.concatenate([v, np.zeros(len(extra.tokens), v.dtype)]) for k, v in alone.token_columns.items()},
            "sft_weight": weight,
        },
        sequence_columns={"group": np.append(GROUP, [8, 9]), "reward": np.append(REWARD, [0, 0]).astype(np.float32)},
    )
    nll = -own[np.isin(np.repeat(np.arange(len(LENGTHS)), LENGTHS), [1, 3]) & alone.mask].astype(np.float64).mean()
    with_them = trainer.evaluate(mixed, loss)
    without = trainer.evaluate(alone, loss)
    assert with_them["sft_loss"] == pytest.approx(nll, rel=1e-4)
    assert with_them["loss"] == pytest.approx(without["loss"] + 0.5 * nll, rel=1e-4)
    trainer.close()


def test_advantages_of_the_family_by_hand() -> None:
    """Rewards 1, 3 in a group: GRPO -1, +1; without deviation -1, +1 as well; leave-one-out -2, +2; a third alone 0.

    REINFORCE++ whitens over tokens: sequence rewards 1, 3, 9 on 1, 2, 1 sampled tokens have mean 4, variance 9.
    """
    batch = Batch.of(
        [[5, 6], [5, 6, 7], [5, 6]],
        tokens={"mask": [np.array([False, True]), np.array([False, True, True]), np.array([False, True])]},
        columns={"group": np.array([4, 4, 5]), "reward": np.array([1, 3, 9], np.float32)},
    )

    def of(variant: Any) -> list[float]:
        found = with_group_advantages(GrpoLoss(variant=variant, length=1), batch).token_column("advantages")
        return [float(x) for x in found[batch.mask]]

    assert of("grpo") == pytest.approx([-1, 1, 1, 0], abs=1e-4)
    assert of("dr_grpo") == pytest.approx([-1, 1, 1, 0])
    assert of("rloo") == pytest.approx([-2, 2, 2, 0])
    assert of("reinforce_pp") == pytest.approx([-1, -1 / 3, -1 / 3, 5 / 3], abs=1e-4)
    assert mixed_rows(batch).tolist() == [0, 1]


def test_mismatch_is_always_measured_and_corrected_by_name() -> None:
    """Ratios 1 and e^1: the second is cut to 2 by truncation, mean |difference| is 0.5."""
    from align_core.config import CorrectionConfig

    batch = Batch.of(
        [[5, 6, 7]],
        tokens={
            "mask": [np.array([False, True, True])],
            "old_logprobs": [np.array([0, -1, -1], np.float32)],
            "engine_logprobs": [np.array([0, -1, -2], np.float32)],
        },
    )
    same, figures = with_correction(batch, CorrectionConfig())
    assert same is batch
    assert figures["mismatch_abs"] == pytest.approx(0.5)
    corrected, figures = with_correction(batch, CorrectionConfig(method="truncated", cap=2.0))
    assert corrected.token_column("weights").tolist() == [0, 1, 2]
    assert figures["corrected_fraction"] == 0.5
    assert figures["effective_share"] == pytest.approx(1.5**2 / 2.5)
    masked, _ = with_correction(batch, CorrectionConfig(method="masked", high=2.0))
    assert masked.token_column("weights").tolist() == [0, 1, 0]


def test_tied_groups_teach_online_dpo_nothing(llama: Callable[..., Path]) -> None:
    trainer = MegatronTrainer(_config(llama(), ParallelConfig(), OnlineDpoLoss()))
    batch = _completions().with_columns(sequences={"reward": np.zeros(len(LENGTHS), np.float32)})
    batch = batch.with_columns(tokens={"reference_logprobs": trainer.logprobs(batch)})
    metrics = trainer.step(batch, OnlineDpoLoss())
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    trainer.close()


def test_what_is_missing_is_named() -> None:
    plain = _completions()
    with pytest.raises(ConfigError, match=r"set loss\.length"):
        prepare_loss(GrpoLoss(variant="dr_grpo"), plain, head="lm")
    with pytest.raises(DataError, match="'reference_logprobs'"):
        prepare_loss(OnlineDpoLoss(), plain, head="lm")
    with pytest.raises(DataError, match="'old_values'"):
        prepare_loss(ValueLoss(), plain, head="score")
    with pytest.raises(DataError, match="sft_weight is 0 everywhere"):
        nothing = {"sft_weight": np.zeros(len(plain.tokens), np.float32)}
        prepare_loss(GrpoLoss(), plain.with_columns(tokens=nothing), head="lm")
