"""Binds the settings of the losses on sampled completions to the formulas of align_algos: GRPO's family, PPO and its
value model, online DPO, and demonstrations beside any of them. Knows nothing about ranks and models.

Legend: N flat tokens, B sequences.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_algos.losses import (
    LossOutput,
    cispo_loss,
    count_preferences,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    kl_loss,
    online_dpo_loss,
    ppo_policy_loss,
    reinforce_pp_loss,
    rloo_loss,
    sft_mixing_loss,
    value_loss,
)
from align_core.advantages import with_group_advantages
from align_core.config import GrpoLoss, OnlineDpoLoss, PpoLoss, ValueLoss
from align_core.errors import ConfigError, DataError
from align_core.megatron.added_losses import AddedLoss, added_loss
from align_core.megatron.microbatch import MicroBatch
from align_core.megatron.prepared import PreparedLoss, count_targets
from align_core.types import Batch

_OVER_TOKENS: dict[str, Callable[..., LossOutput]] = {"dapo": dapo_loss, "cispo": cispo_loss}
_OVER_SEQUENCES: dict[str, Callable[..., LossOutput]] = {"gspo": gspo_loss, "rloo": rloo_loss}


def prepare_group(loss: GrpoLoss, batch: Batch) -> PreparedLoss:
    """GRPO and its family, with advantages over the whole batch where it does not bring them.

    Raises:
        ConfigError: dr_grpo without its constant length, or another package's loss that does not fit.
        DataError: a column is missing, or there is nothing to learn from.
    """
    num_tokens = count_targets(batch)
    _check_old(batch)
    if loss.kl_coef > 0:
        batch.token_column("reference_logprobs")
    if loss.variant == "dr_grpo" and loss.length is None:
        raise ConfigError("variant 'dr_grpo' divides by a constant number of tokens; set loss.length")
    added = None if loss.shipped else added_loss(loss)
    if "advantages" not in batch.token_columns:
        batch = with_group_advantages(loss, batch)
    # Sequences without a target (demonstrations) would count in the divisor of a mean over sequences.
    share = len(batch) / int(np.sum(np.add.reduceat(batch.mask, batch.offsets[:-1]) > 0))
    over_sequences = loss.variant in ("gspo", "rloo", "dr_grpo") or loss.reduction == "sequence_mean"
    if added is not None:
        over_sequences = "num_sequences" in added.entry.counts

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        counts = {"num_tokens": num_tokens, "num_sequences": len(batch)}
        if added is None:
            found = _group_loss(loss, logprobs_N, micro, **counts)
        else:
            found = _added_loss(added, loss, logprobs_N, micro, **counts)
        if over_sequences:
            found = LossOutput(found.loss * share, found.metrics)
        return _with_mismatch(found, logprobs_N, micro, num_tokens=num_tokens)

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def prepare_ppo(loss: PpoLoss, batch: Batch) -> PreparedLoss:
    """The policy of PPO; `advantages` come with the batch."""
    num_tokens = count_targets(batch)
    _check_old(batch)
    batch.token_column("advantages")

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        found = ppo_policy_loss(
            *_policy_columns(logprobs_N, micro),
            num_tokens=num_tokens,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            dual_clip=loss.dual_clip,
            weights_N=_optional(micro, "weights"),
        )
        return _with_mismatch(found, logprobs_N, micro, num_tokens=num_tokens)

    return PreparedLoss(batch=batch, unit="sequence", compute=compute)


def prepare_value(loss: ValueLoss, batch: Batch) -> PreparedLoss:
    """The value model of PPO; `returns` and `old_values` come with the batch."""
    num_tokens = count_targets(batch)
    for name in ("old_values", "returns"):
        batch.token_column(name)

    def compute(values_N: Tensor, micro: MicroBatch) -> LossOutput:
        return value_loss(
            values_N,
            micro.token_column("old_values"),
            micro.token_column("returns"),
            _mask(micro),
            num_tokens=num_tokens,
            clip=loss.clip,
        )

    return PreparedLoss(batch=batch, unit="sequence", compute=compute, reads="values")


def prepare_online_dpo(loss: OnlineDpoLoss, batch: Batch) -> PreparedLoss:
    """Preferences within each group by `reward`; a batch in which all groups are tied has loss 0."""
    num_tokens = count_targets(batch)
    batch.token_column("reference_logprobs")
    reward_B = torch.from_numpy(batch.sequence_column("reward").astype(np.float32))
    group_B = torch.from_numpy(batch.sequence_column("group").astype(np.int64))
    num_pairs = count_preferences(reward_B, group_B, pairs=loss.pairs)

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        found = online_dpo_loss(
            logprobs_N,
            micro.token_column("reference_logprobs"),
            _mask(micro),
            _offsets(micro),
            rewards_B=micro.sequence_column("reward").float(),
            group_B=micro.sequence_column("group").long(),
            beta=loss.beta,
            num_pairs=max(num_pairs, 1),
            pairs=loss.pairs,
            length_normalised=loss.length_normalised,
        )
        entropy = -logprobs_N.detach()[_mask(micro)].sum() / num_tokens
        return _with_mismatch(
            LossOutput(found.loss, {**found.metrics, "entropy": entropy}), logprobs_N, micro, num_tokens=num_tokens
        )

    return PreparedLoss(batch=batch, unit="group", compute=compute)


def with_demonstrations(prepared: PreparedLoss) -> PreparedLoss:
    """The loss plus the cross-entropy of the tokens with an `sft_weight`, averaged over them, times that weight."""
    weight_N = prepared.batch.token_column("sft_weight").astype(np.float32)
    num_tokens, weight = int(np.sum(weight_N > 0)), float(np.max(weight_N, initial=0.0))
    if num_tokens == 0:
        raise DataError("sft_weight is 0 everywhere; leave the column out, or mix demonstrations in")

    def compute(logprobs_N: Tensor, micro: MicroBatch) -> LossOutput:
        loss, metrics = prepared.compute(logprobs_N, micro)
        learnt_N = micro.token_column("sft_weight") > 0
        imitated = sft_mixing_loss(logprobs_N, learnt_N, num_tokens=num_tokens, coef=weight)
        return LossOutput(loss + imitated.loss, {**metrics, "sft_loss": imitated.loss.detach() / weight})

    return replace(prepared, compute=compute)


def _group_loss(
    loss: GrpoLoss, logprobs_N: Tensor, micro: MicroBatch, *, num_tokens: int, num_sequences: int
) -> LossOutput:
    """The variant's loss of one micro-batch, its KL term included."""
    new_N, old_N, advantages_N, mask_N = _policy_columns(logprobs_N, micro)
    low, high = loss.clip
    counts: dict[str, Any] = {
        "num_tokens": num_tokens,
        "clip_low": low,
        "clip_high": high,
        "weights_N": _optional(micro, "weights"),
    }
    reference_N = _optional(micro, "reference_logprobs")
    kl: dict[str, Any] = {"reference_logprobs_N": reference_N, "kl_coef": loss.kl_coef}
    offsets = _offsets(micro)
    whole: dict[str, Any] = {"num_sequences": num_sequences}
    if loss.variant == "grpo":
        whole |= {"offsets": offsets, "reduction": loss.reduction}
        return grpo_loss(new_N, old_N, advantages_N, mask_N, **counts, **kl, **whole)
    if loss.variant == "dr_grpo":
        whole["length"] = loss.length
        return dr_grpo_loss(new_N, old_N, advantages_N, mask_N, offsets, **counts, **kl, **whole)
    if loss.variant in ("reinforce_pp", "reinforce_pp_baseline"):
        return reinforce_pp_loss(new_N, old_N, advantages_N, mask_N, **counts, **kl)
    if loss.variant in _OVER_TOKENS:
        found = _OVER_TOKENS[loss.variant](new_N, old_N, advantages_N, mask_N, **counts)
    else:
        found = _OVER_SEQUENCES[loss.variant](new_N, old_N, advantages_N, mask_N, offsets, **counts, **whole)
    return _with_kl(found, loss, logprobs_N, micro, num_tokens=num_tokens)


def _added_loss(
    added: AddedLoss, loss: GrpoLoss, logprobs_N: Tensor, micro: MicroBatch, *, num_tokens: int, num_sequences: int
) -> LossOutput:
    """Another package's loss of one micro-batch, the KL term included."""
    columns = ("logprobs_N", "old_logprobs_N", "advantages_N", "mask_N")
    low, high = loss.clip
    found = added(
        {
            **dict(zip(columns, _policy_columns(logprobs_N, micro), strict=True)),
            "offsets": _offsets(micro),
            "reference_logprobs_N": _optional(micro, "reference_logprobs"),
            "weights_N": _optional(micro, "weights"),
            "num_tokens": num_tokens,
            "num_sequences": num_sequences,
            "clip_low": low,
            "clip_high": high,
            "kl_coef": loss.kl_coef,
            "length": loss.length,
        }
    )
    return found if added.brings_kl else _with_kl(found, loss, logprobs_N, micro, num_tokens=num_tokens)


def _with_kl(
    found: LossOutput, loss: GrpoLoss, logprobs_N: Tensor, micro: MicroBatch, *, num_tokens: int
) -> LossOutput:
    """Plus the k3 KL to the reference, a mean over tokens, where the batch has a reference."""
    reference_N = _optional(micro, "reference_logprobs")
    if reference_N is None:
        return found
    penalty = kl_loss(logprobs_N, reference_N, _mask(micro), num_tokens=num_tokens, coef=loss.kl_coef)
    return LossOutput(found.loss + penalty.loss, {**found.metrics, **penalty.metrics})


def _check_old(batch: Batch) -> None:
    """A batch as it came from the engine needs no old log-probs; any other without them is a mistake."""
    if "engine_logprobs" not in batch.token_columns:
        batch.token_column("old_logprobs")


def _policy_columns(logprobs_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages, mask. Without a column of old log-probs they are those of this very pass:
    exact for the one update that follows a rollout."""
    old_N = _optional(micro, "old_logprobs")
    return (
        logprobs_N,
        logprobs_N.detach() if old_N is None else old_N,
        micro.token_column("advantages"),
        _mask(micro),
    )


def _with_mismatch(found: LossOutput, logprobs_N: Tensor, micro: MicroBatch, *, num_tokens: int) -> LossOutput:
    """Without a scoring pass before the update, the update itself measures how far the engine was from the trainer."""
    engine_N = _optional(micro, "engine_logprobs")
    if engine_N is None or _optional(micro, "old_logprobs") is not None:
        return found
    apart_N = (logprobs_N.detach() - engine_N)[_mask(micro)].abs()
    return LossOutput(found.loss, {**found.metrics, "canary_mean": apart_N.sum() / num_tokens})


def _optional(micro: MicroBatch, name: str) -> Tensor | None:
    return micro.token_column(name) if name in micro.batch.token_columns else None


def _mask(micro: MicroBatch) -> Tensor:
    return micro.token_column("mask").bool()


def _offsets(micro: MicroBatch) -> Tensor:
    return torch.from_numpy(micro.batch.offsets).to(micro.tokens.device)
