"""From a loss setting to the function of one micro-batch, whose results add up to those of the whole batch.

Everything that needs the whole batch (counts, group advantages) is computed here, before the batch is cut. The formulas
are `align_algos`'s. Knows nothing about ranks and models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align_algos.advantages import group_normalised
from align_algos.errors import InputError
from align_algos.losses import LossOutput, count_pairs, dpo_loss, grpo_loss, reward_loss, sft_loss
from align_core.config import DpoLoss, GrpoLoss, LossConfig, RewardLoss, SftLoss
from align_core.errors import ConfigError, DataError
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.packing import Unit
from align_core.types import Batch, Head

_STD_EPS = 1e-6  # keeps advantages of nearly equal rewards finite; far below any difference between real rewards


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedLoss:
    """A loss for one particular batch."""

    batch: Batch
    """The batch with the columns that were computed over all of it."""
    unit: Unit
    """What must stay in one micro-batch."""
    compute: Callable[[Tensor, MicroBatch], LossOutput]
    """(log-probs [N] or scores [B] of a micro-batch, the micro-batch) to its share of loss and metrics."""


def prepare_loss(loss: LossConfig, batch: Batch, *, head: Head) -> PreparedLoss:
    """Count, check and bind.

    Raises:
        ConfigError: the loss needs another head than the model has.
        DataError: a column is missing, or the batch holds nothing to learn from.
    """
    needed: Head = "score" if isinstance(loss, RewardLoss) else "lm"
    if head != needed:
        raise ConfigError(
            f"{type(loss).__name__} needs a model with head {needed!r}, this one has {head!r}; load it with that head"
        )
    try:
        if isinstance(loss, SftLoss):
            return _sft(batch)
        if isinstance(loss, RewardLoss):
            return _reward(batch)
        if isinstance(loss, DpoLoss):
            return _dpo(loss, batch)
        return _grpo(loss, batch)
    except InputError as error:
        raise DataError(f"the batch does not fit {type(loss).__name__}: {error}") from error


def _sft(batch: Batch) -> PreparedLoss:
    num_tokens = _count_targets(batch)

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        return sft_loss(logprobs_N, micro.token_column("mask").bool(), num_tokens=num_tokens)

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def _reward(batch: Batch) -> PreparedLoss:
    label_B = torch.from_numpy(batch.sequence_column("label").astype(np.float32))
    num_pairs = count_pairs(label_B, torch.from_numpy(batch.sequence_column("group").astype(np.int64)))
    if num_pairs == 0:
        raise DataError("no two responses of a prompt have different labels in this batch; there is nothing to rank")

    def compute(scores_B: Tensor, micro: MicroBatch) -> LossOutput:
        label_B, group_B = micro.sequence_column("label").float(), micro.sequence_column("group").long()
        return reward_loss(scores_B, label_B, group_B, num_pairs=num_pairs)

    return PreparedLoss(batch=batch, unit="group", compute=compute)


def _dpo(loss: DpoLoss, batch: Batch) -> PreparedLoss:
    _count_targets(batch)
    batch.token_column("reference_logprobs")
    num_pairs = len(batch) // 2

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        return dpo_loss(
            logprobs_N,
            micro.token_column("reference_logprobs"),
            micro.token_column("mask").bool(),
            torch.from_numpy(micro.batch.offsets).to(logprobs_N.device),
            beta=loss.beta,
            num_pairs=num_pairs,
            label_smoothing=loss.label_smoothing,
        )

    return PreparedLoss(batch=batch, unit="pair", compute=compute)


def _grpo(loss: GrpoLoss, batch: Batch) -> PreparedLoss:
    num_tokens = _count_targets(batch)
    batch.token_column("old_logprobs")
    if loss.kl_coef > 0:
        batch.token_column("reference_logprobs")
    if "advantages" not in batch.token_columns:
        batch = _with_advantages(loss, batch)
    has_reference = "reference_logprobs" in batch.token_columns

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        return grpo_loss(
            logprobs_N,
            micro.token_column("old_logprobs"),
            micro.token_column("advantages"),
            micro.token_column("mask").bool(),
            num_tokens=num_tokens,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            reference_logprobs_N=micro.token_column("reference_logprobs") if has_reference else None,
            kl_coef=loss.kl_coef,
        )

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def _with_advantages(loss: GrpoLoss, batch: Batch) -> Batch:
    """Each token gets the advantage of its sequence within its group."""
    advantages_B = group_normalised(
        torch.from_numpy(batch.sequence_column("reward").astype(np.float32)),
        torch.from_numpy(batch.sequence_column("group").astype(np.int64)),
        eps=_STD_EPS,
        std=loss.normalise_std,
    )
    return batch.with_columns(tokens={"advantages": np.repeat(advantages_B.numpy(), batch.lengths)})


def _count_targets(batch: Batch) -> int:
    """Tokens inside the mask.

    Raises:
        DataError: none, or a sequence's first token, which nothing predicts.
    """
    mask_N = batch.mask
    first = np.flatnonzero(mask_N[batch.offsets[:-1]])
    if len(first):
        raise DataError(
            f"the mask of sequence {first[0]} covers its first token, which no token predicts; "
            "begin each sequence with a token that is not a target, such as the beginning-of-sequence token"
        )
    count = int(mask_N.sum())
    if count == 0:
        raise DataError(f"the mask covers none of the batch's {len(mask_N)} tokens; there is nothing to learn from")
    return count
