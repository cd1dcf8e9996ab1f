"""Binds the settings of DPO and its kin, and of KTO, to the formulas of align_algos. Knows no ranks and no models.

Legend: N flat tokens.
"""

import numpy as np
import torch
from torch import Tensor

from align_algos.losses import (
    LossOutput,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from align_core.config import DpoLoss, KtoLoss
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.prepared import PreparedLoss, count_targets
from align_core.types import Batch


def prepare_pairs(loss: DpoLoss, batch: Batch) -> PreparedLoss:
    """A preference loss over sequences that alternate chosen, rejected.

    Raises:
        DataError: no `reference_logprobs` for a form that needs them, or nothing to learn from.
    """
    count_targets(batch)
    if loss.needs_reference:
        batch.token_column("reference_logprobs")
    num_pairs = len(batch) // 2

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        mask_N = micro.token_column("mask").bool()
        offsets = _offsets(micro)
        if loss.form == "simpo":
            return simpo_loss(
                logprobs_N,
                mask_N,
                offsets,
                beta=loss.beta,
                margin=loss.simpo_margin,
                num_pairs=num_pairs,
                label_smoothing=loss.label_smoothing,
            )
        if loss.form == "orpo":
            return orpo_loss(logprobs_N, mask_N, offsets, beta=loss.beta, num_pairs=num_pairs)
        return _with_reference(loss, logprobs_N, micro, mask_N, offsets, num_pairs=num_pairs)

    return PreparedLoss(batch=batch, unit="pair", compute=compute)


def _with_reference(
    loss: DpoLoss, logprobs_N: Tensor, micro: MicroBatch, mask_N: Tensor, offsets: Tensor, *, num_pairs: int
) -> LossOutput:
    reference_N = micro.token_column("reference_logprobs")
    beta, mean, swapped = loss.beta, loss.takes_mean, loss.label_smoothing
    columns = (logprobs_N, reference_N, mask_N, offsets)
    if loss.form == "ipo":
        return ipo_loss(*columns, beta=beta, num_pairs=num_pairs, length_normalised=mean)
    if loss.form == "hinge":
        return hinge_loss(*columns, beta=beta, num_pairs=num_pairs, length_normalised=mean)
    if loss.form == "robust":
        return robust_dpo_loss(
            *columns, beta=beta, num_pairs=num_pairs, label_smoothing=swapped, length_normalised=mean
        )
    return dpo_loss(*columns, beta=beta, num_pairs=num_pairs, label_smoothing=swapped, length_normalised=mean)


def prepare_kto(loss: KtoLoss, batch: Batch) -> PreparedLoss:
    """KTO over single responses, with the columns `desirable` and `kl` (the baseline, the same for all of a batch).

    Raises:
        DataError: a column is missing, or there is nothing to learn from.
    """
    count_targets(batch)
    batch.token_column("reference_logprobs")
    batch.sequence_column("desirable")
    kl = float(batch.sequence_column("kl").astype(np.float32)[0])
    num_sequences = len(batch)

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        return kto_loss(
            logprobs_N,
            micro.token_column("reference_logprobs"),
            micro.token_column("mask").bool(),
            _offsets(micro),
            desirable_B=micro.sequence_column("desirable").bool(),
            beta=loss.beta,
            kl=kl,
            num_sequences=num_sequences,
            desirable_weight=loss.desirable_weight,
            undesirable_weight=loss.undesirable_weight,
        )

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def _offsets(micro: MicroBatch) -> Tensor:
    return torch.from_numpy(micro.batch.offsets).to(micro.tokens.device)
