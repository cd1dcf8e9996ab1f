"""From a loss setting to the function of one micro-batch, whose results add up to those of the whole batch.

Everything that needs the whole batch (counts, group advantages) is computed here, before the batch is cut. The formulas
are `align_algos`'s. Knows nothing about ranks and models.
"""

import numpy as np
import torch
from torch import Tensor

from align_algos.errors import InputError
from align_algos.losses import LossOutput, count_pairs, reward_loss, sft_loss
from align_core.config import (
    DpoLoss,
    GrpoLoss,
    KtoLoss,
    LossConfig,
    OnlineDpoLoss,
    PpoLoss,
    RewardLoss,
    SftLoss,
    ValueLoss,
)
from align_core.errors import ConfigError, DataError
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.policies import (
    prepare_group,
    prepare_online_dpo,
    prepare_ppo,
    prepare_value,
    with_demonstrations,
)
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
    return with_demonstrations(prepared) if "sft_weight" in batch.token_columns else prepared


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
            return prepare_group(loss, batch)
        case OnlineDpoLoss():
            return prepare_online_dpo(loss, batch)
        case PpoLoss():
            return prepare_ppo(loss, batch)
        case ValueLoss():
            return prepare_value(loss, batch)


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
