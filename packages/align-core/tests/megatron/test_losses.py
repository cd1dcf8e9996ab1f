"""What is computed over the whole batch before it is cut, and batches that fit no loss."""

import numpy as np
import pytest
import torch

from align_core.config import DpoLoss, GrpoLoss, RewardLoss, SftLoss
from align_core.errors import ConfigError, DataError
from align_core.megatron.losses import prepare_loss
from align_core.megatron.microbatch import pack
from align_core.types import Batch

CPU = torch.device("cpu")


def _batch(*masks: list[int], **columns: list[float]) -> Batch:
    return Batch.of(
        [np.zeros(len(mask), np.int32) for mask in masks],
        tokens={"mask": [np.asarray(mask, np.bool_) for mask in masks]},
        columns={name: np.asarray(values) for name, values in columns.items()},
    )


def test_sft_divides_by_the_targets_of_the_whole_batch() -> None:
    """3 targets in all; the micro-batch of sequence 0 holds 2 of them, with log-probs -1 and -2: loss 3 / 3 = 1."""
    batch = _batch([0, 1, 1], [0, 0, 1])
    prepared = prepare_loss(SftLoss(), batch, head="lm")
    micro = pack(batch, np.asarray([0]), multiple=1, device=CPU)
    loss, _ = prepared.compute(torch.tensor([0.0, -1.0, -2.0]), micro)
    assert prepared.unit == "sequence"
    assert float(loss) == 1.0


def test_grpo_advantages_come_from_rewards_of_the_whole_group() -> None:
    """Group 4 has rewards 1 and 3: mean 2, deviation 1, advantages -1 and +1. Group 5 is alone: 0."""
    batch = _batch([0, 1], [0, 1, 1], [0, 1], group=[4, 4, 5], reward=[1.0, 3.0, 9.0])
    batch = batch.with_columns(tokens={"old_logprobs": np.zeros(7, np.float32)})
    prepared = prepare_loss(GrpoLoss(), batch, head="lm")
    found = prepared.batch.token_column("advantages")
    np.testing.assert_allclose(found.astype(np.float64), [-1, -1, 1, 1, 1, 0, 0], atol=1e-5)


def test_grpo_leaves_given_advantages_alone() -> None:
    given = np.asarray([0.0, 0.5], np.float32)
    batch = _batch([0, 1]).with_columns(tokens={"old_logprobs": np.zeros(2, np.float32), "advantages": given})
    assert prepare_loss(GrpoLoss(), batch, head="lm").batch.token_column("advantages") is given


def test_reward_loss_keeps_groups_whole() -> None:
    batch = _batch([0], [0], group=[1, 1], label=[0.0, 1.0])
    assert prepare_loss(RewardLoss(), batch, head="score").unit == "group"


@pytest.mark.parametrize(
    ("loss", "batch", "complaint"),
    [
        (SftLoss(), _batch([0, 0]), "covers none of the batch's 2 tokens"),
        (SftLoss(), _batch([0, 1], [1, 0]), "mask of sequence 1 covers its first token"),
        (DpoLoss(), _batch([0, 1], [0, 1]), "no per-token column 'reference_logprobs'"),
        (GrpoLoss(), _batch([0, 1], group=[1], reward=[1.0]), "no per-token column 'old_logprobs'"),
        (RewardLoss(), _batch([0], [0], group=[1, 2], label=[0.0, 1.0]), "nothing to rank"),
        (RewardLoss(), _batch([0], [0], group=[1, 1], label=[0.0, np.nan]), "does not fit RewardLoss"),
    ],
    ids=["no-target", "first-token", "no-reference", "no-old", "no-pair", "nan-label"],
)
def test_a_batch_that_does_not_fit_is_refused(loss: object, batch: Batch, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        prepare_loss(loss, batch, head="score" if isinstance(loss, RewardLoss) else "lm")  # type: ignore[arg-type]


def test_a_loss_for_the_other_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="SftLoss needs a model with head 'lm', this one has 'score'"):
        prepare_loss(SftLoss(), _batch([0, 1]), head="score")
