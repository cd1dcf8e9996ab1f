"""A loss that another package installs and the settings name: it trains as one of ours, or is refused with reasons."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron_llama import LENGTHS, ragged_batch

from align_core.config import GrpoLoss, OptimizerConfig, TrainerConfig, TrainingConfig
from align_core.errors import ConfigError
from align_core.megatron import MegatronTrainer
from align_core.megatron.losses import prepare_loss
from align_core.types import Batch

SOURCE = """
from align_algos import Loss, grpo_loss, gspo_loss, dpo_loss


def clipped(logprobs_N, old_logprobs_N, advantages_N, mask_N, *, num_tokens, clip_high=0.2, clip_low=0.2):
    numbers = {"num_tokens": num_tokens, "clip_low": clip_low, "clip_high": clip_high}
    return grpo_loss(logprobs_N, old_logprobs_N, advantages_N, mask_N, **numbers)


OVER_TOKENS = Loss(function=clipped, counts=("num_tokens",), unit="token")
OVER_SEQUENCES = Loss(function=gspo_loss, counts=("num_tokens", "num_sequences"), unit="sequence")
WITH_KL = Loss(function=grpo_loss, counts=("num_tokens",), unit="token")
PAIRS = Loss(function=dpo_loss, counts=("num_pairs",), unit="pair")
WHOLE_GROUPS = Loss(function=clipped, counts=("num_tokens",), unit="group")
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with entry points, as pip would leave it."""
    tmp_path.joinpath("their_losses.py").write_text(SOURCE, encoding="utf-8")
    information = tmp_path / "their_losses-1.0.dist-info"
    information.mkdir()
    information.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    names = ("over_tokens", "over_sequences", "with_kl", "pairs", "whole_groups")
    points = "".join(f"{name} = their_losses:{name.upper()}\n" for name in names)
    information.joinpath("entry_points.txt").write_text(f"[align.losses]\n{points}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def completions() -> Batch:
    batch = ragged_batch()
    rewards = np.asarray((0.0, 1.0, 0.5, 3.0, 3.0, 1.0, -1.0, 0.0), np.float32)
    return batch.with_columns(sequences={"group": np.asarray((1, 1, 1, 2, 2, 2, 3, 3)), "reward": rewards})


@pytest.mark.parametrize("budget", [16, 4096])
def test_it_gives_the_numbers_of_the_same_loss_of_ours(llama: Callable[..., Path], budget: int) -> None:
    """Small micro-batches and one; the KL to the reference beside it, or the loss's own."""
    config = TrainerConfig(
        model=llama(),
        steps=1,
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(micro_batch_tokens=budget, device="cpu"),
    )
    trainer = MegatronTrainer(config)
    batch = completions()
    own = trainer.logprobs(batch)
    noise = np.random.default_rng(0).standard_normal((2, int(sum(LENGTHS)))).astype(np.float32) * batch.mask
    batch = batch.with_columns(tokens={"old_logprobs": own + noise[0], "reference_logprobs": own + 0.1 * noise[1]})
    for theirs, ours in (
        (GrpoLoss(variant="over_tokens", kl_coef=0.1), GrpoLoss(kl_coef=0.1)),
        (GrpoLoss(variant="over_tokens", clip_high=0.4), GrpoLoss(clip_high=0.4)),
        (GrpoLoss(variant="with_kl", kl_coef=0.1), GrpoLoss(kl_coef=0.1)),
        (GrpoLoss(variant="over_sequences", kl_coef=0.1), GrpoLoss(variant="gspo", kl_coef=0.1)),
    ):
        assert trainer.evaluate(batch, theirs) == pytest.approx(trainer.evaluate(batch, ours), rel=1e-6)
    trainer.close()


def test_what_a_variant_of_grpo_cannot_give_is_refused() -> None:
    batch = completions().with_columns(tokens={"old_logprobs": np.zeros(int(sum(LENGTHS)), np.float32)})
    with pytest.raises(ConfigError, match=r"the loss 'pairs' asks for 'beta' or 'num_pairs'; .* 'advantages_N', 'clip"):
        prepare_loss(GrpoLoss(variant="pairs"), batch, head="lm")
    with pytest.raises(ConfigError, match="'whole_groups' has unit 'group'; a variant of grpo gets whole sequences"):
        prepare_loss(GrpoLoss(variant="whole_groups"), batch, head="lm")


def test_an_unknown_variant_lists_ours_and_theirs() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown variant 'over_token'; did you mean 'over_tokens'\? .*'cispo'.*'pairs'"
    ):
        GrpoLoss(variant="over_token")
