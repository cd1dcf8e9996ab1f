"""From a loss setting to the function of one micro-batch, whose results add up to those of the whole batch.

Everything that needs the whole batch (counts, group advantages) is computed here, before the batch is cut. The formulas
are `align_algos`'s. Knows nothing about ranks and models.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from align_algos.errors import InputError
from align_algos.losses import (
    LossOutput,
    count_pairs,
    grpo_loss,
    ppo_policy_loss,
    reward_loss,
    sft_loss,
    value_loss,
)
from align_core.config import DpoLoss, GrpoLoss, KtoLoss, LossConfig, PpoLoss, RewardLoss, SftLoss, ValueLoss
from align_core.errors import ConfigError, DataError
from align_core.megatron.advantages import with_group_advantages
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.preferences import prepare_kto, prepare_pairs
from align_core.megatron.prepared import PreparedLoss, count_targets
from align_core.types import Batch, Head


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


def _bind(loss: LossConfig, batch: Batch) -> PreparedLoss:  # noqa: PLR0911  (a table)
    match loss:
        case SftLoss():
            return _sft(batch)
        case RewardLoss():
            return _reward(loss, batch)
        case DpoLoss():
            return prepare_pairs(loss, batch)
        case KtoLoss():
            return prepare_kto(loss, batch)
        case GrpoLoss():
            return _grpo(loss, batch)
        case PpoLoss():
            return _ppo(loss, batch)
        case ValueLoss():
            return _value(loss, batch)
    raise ConfigError(f"{type(loss).__name__} has no binding yet")


def _sft(batch: Batch) -> PreparedLoss:
    num_tokens = count_targets(batch)

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        return sft_loss(logprobs_N, micro.token_column("mask").bool(), num_tokens=num_tokens)

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def _reward(loss: RewardLoss, batch: Batch) -> PreparedLoss:
    label_B = torch.from_numpy(batch.sequence_column("label").astype(np.float32))
    num_pairs = count_pairs(label_B, torch.from_numpy(batch.sequence_column("group").astype(np.int64)))
    if num_pairs == 0:
        raise DataError("no two responses of a prompt have different labels in this batch; there is nothing to rank")

    def compute(scores_B: Tensor, micro: MicroBatch) -> LossOutput:
        label_B, group_B = micro.sequence_column("label").float(), micro.sequence_column("group").long()
        return reward_loss(
            scores_B,
            label_B,
            group_B,
            num_pairs=num_pairs,
            margin_scale=loss.margin_scale,
            centre_coef=loss.centre_coef,
        )

    return PreparedLoss(batch=batch, unit="group", compute=compute, reads="scores")


def _grpo(loss: GrpoLoss, batch: Batch) -> PreparedLoss:
    num_tokens = count_targets(batch)
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
    num_tokens = count_targets(batch)
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
    num_tokens = count_targets(batch)
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
