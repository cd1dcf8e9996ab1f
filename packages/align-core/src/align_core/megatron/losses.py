"""From a loss setting to the function of one micro-batch, whose results add up to those of the whole batch.

Everything that needs the whole batch (counts, group advantages) is computed here, before the batch is cut. The formulas
are `align_algos`'s. Knows nothing about ranks and models.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align_algos.errors import InputError
from align_algos.losses import (
    LossOutput,
    count_pairs,
    dpo_loss,
    grpo_loss,
    ppo_policy_loss,
    reward_loss,
    sft_loss,
    value_loss,
)
from align_core.config import DpoLoss, GrpoLoss, LossConfig, PpoLoss, RewardLoss, SftLoss, ValueLoss
from align_core.errors import ConfigError, DataError
from align_core.megatron.advantages import with_group_advantages
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.packing import Unit
from align_core.types import Batch, Head

Output = Literal["logprobs", "scores", "values"]
"""What a loss reads off the model: log-prob of each token, score of each sequence, value before each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedLoss:
    """A loss for one particular batch."""

    batch: Batch
    """The batch with the columns that were computed over all of it."""
    unit: Unit
    """What must stay in one micro-batch."""
    compute: Callable[[Tensor, MicroBatch], LossOutput]
    """(what `reads` names, of a micro-batch; the micro-batch) to its share of loss and metrics."""
    reads: Output = "logprobs"


def prepare_loss(loss: LossConfig, batch: Batch, *, head: Head) -> PreparedLoss:
    """Count, check and bind.

    Raises:
        ConfigError: the loss needs another head than the model has.
        DataError: a column is missing, or the batch holds nothing to learn from.
    """
    needed: Head = "score" if isinstance(loss, RewardLoss | ValueLoss) else "lm"
    if head != needed:
        raise ConfigError(
            f"{type(loss).__name__} needs a model with head {needed!r}, this one has {head!r}; load it with that head"
        )
    try:
        prepared = _bind(loss, batch)
    except InputError as error:
        raise DataError(f"the batch does not fit {type(loss).__name__}: {error}") from error
    return _with_demonstrations(prepared) if "sft_weight" in batch.token_columns else prepared


def _bind(loss: LossConfig, batch: Batch) -> PreparedLoss:
    match loss:
        case SftLoss():
            return _sft(batch)
        case RewardLoss():
            return _reward(batch)
        case DpoLoss():
            return _dpo(loss, batch)
        case GrpoLoss():
            return _grpo(loss, batch)
        case PpoLoss():
            return _ppo(loss, batch)
        case ValueLoss():
            return _value(loss, batch)
    raise ConfigError(f"{type(loss).__name__} has no binding yet")


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

    return PreparedLoss(batch=batch, unit="group", compute=compute, reads="scores")


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
        batch = with_group_advantages(loss, batch)
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


def _ppo(loss: PpoLoss, batch: Batch) -> PreparedLoss:
    num_tokens = _count_targets(batch)
    for name in ("old_logprobs", "advantages"):
        batch.token_column(name)

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        return ppo_policy_loss(
            logprobs_N,
            micro.token_column("old_logprobs"),
            micro.token_column("advantages"),
            micro.token_column("mask").bool(),
            num_tokens=num_tokens,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
        )

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def _value(loss: ValueLoss, batch: Batch) -> PreparedLoss:
    num_tokens = _count_targets(batch)
    for name in ("old_values", "returns"):
        batch.token_column(name)

    def compute(values_N: Tensor, micro: MicroBatch) -> LossOutput:
        return value_loss(
            values_N,
            micro.token_column("old_values"),
            micro.token_column("returns"),
            micro.token_column("mask").bool(),
            num_tokens=num_tokens,
            clip=loss.clip,
        )

    return PreparedLoss(batch=batch, unit="sequence", compute=compute, reads="values")


def _with_demonstrations(prepared: PreparedLoss) -> PreparedLoss:
    """The loss plus the cross-entropy of the tokens with an `sft_weight`, averaged over them, times that weight.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2 (PPO-ptx).
    """
    weight_N = prepared.batch.token_column("sft_weight").astype(np.float32)
    num_tokens, weight = int(np.sum(weight_N > 0)), float(np.max(weight_N, initial=0.0))
    if num_tokens == 0:
        raise DataError("sft_weight is 0 everywhere; leave the column out, or mix demonstrations in")

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        loss, metrics = prepared.compute(logprobs_N, micro)
        imitated = sft_loss(logprobs_N, micro.token_column("sft_weight") > 0, num_tokens=num_tokens)
        return LossOutput(loss + weight * imitated.loss, {**metrics, "sft_loss": imitated.loss.detach()})

    return replace(prepared, compute=compute)


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
