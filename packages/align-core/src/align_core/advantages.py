"""Advantages of a whole rollout, before it is cut into updates, micro-batches and ranks: numpy in, numpy out.

The formulas are `align_algos`'s. Runs in the driver, on CPU: it sees every token of the rollout, so statistics are
those of all of it. Knows nothing about models and ranks, and stands outside `align_core.megatron` so that the driver
need not import Megatron-core.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_algos.advantages import gae, group_normalised, leave_one_out, mixed_groups, moments, returns_to_go, whiten
from align_algos.correction import (
    Correction,
    masked_importance,
    mismatch_metrics,
    negative_sequence_mask,
    truncated_importance,
)
from align_algos.kl import AdaptiveKl, Estimator, FixedKl, KlController, kl_estimate
from align_algos.reductions import per_token, segment_sum
from align_algos.shaping import ngram_penalty, overlong_penalty, shaped_rewards
from align_core.config import CorrectionConfig, GrpoLoss, KlConfig
from align_core.types import Batch

_WHITEN_EPS = 1e-8  # added to the variance, as in the tutorial


def with_group_advantages(loss: GrpoLoss, batch: Batch) -> Batch:
    """`advantages` from the columns `reward` and `group`, as the variant wants them.

    With `kl_in_reward` the k1 KL of `old_logprobs` to `reference_logprobs` is a cost inside the reward.
    """
    reward_B = _tensor(batch.sequence_column("reward"), np.float32)
    group_B = _tensor(batch.sequence_column("group"), np.int64)
    mask_N, offsets = _mask(batch), _offsets(batch)
    if loss.kl_in_reward and loss.variant != "reinforce_pp":
        kl_N = torch.from_numpy(kl_of_tokens(batch, estimator="k1"))
        reward_B = reward_B - loss.kl_in_reward * segment_sum(kl_N, offsets)
    if loss.variant == "reinforce_pp":
        advantages_N = returns_to_go(_token_rewards(loss, batch, reward_B), mask_N, offsets, gamma=1.0)
    elif loss.variant == "rloo":
        advantages_N = per_token(leave_one_out(reward_B, group_B), offsets)
    else:
        std = loss.normalise_std and loss.variant not in ("dr_grpo", "reinforce_pp_baseline")
        advantages_N = per_token(group_normalised(reward_B, group_B, std=std), offsets)
    if loss.variant in ("reinforce_pp", "reinforce_pp_baseline"):
        advantages_N = whiten(advantages_N, mask_N, moments(advantages_N, mask_N), eps=_WHITEN_EPS)
    return batch.with_columns(tokens={"advantages": advantages_N.numpy()})


def _token_rewards(loss: GrpoLoss, batch: Batch, reward_B: Tensor) -> Tensor:
    """[N], the reward on the last token, the KL to the reference, where it counts, on each."""
    zeros_N = torch.zeros(len(batch.tokens))
    old_N, reference_N = (
        (_column(batch, "old_logprobs"), _column(batch, "reference_logprobs"))
        if loss.kl_in_reward
        else (zeros_N, zeros_N)
    )
    return shaped_rewards(reward_B, old_N, reference_N, _mask(batch), _offsets(batch), kl_coef=loss.kl_in_reward)


def overlong_of(batch: Batch, *, max_tokens: int, buffer: int) -> NDArray[np.float32]:
    """float32 [B], DAPO's soft penalty of lengths: 0 up to max_tokens - buffer, -1 at `max_tokens`."""
    lengths_B = torch.from_numpy(np.add.reduceat(batch.mask.astype(np.int64), batch.offsets[:-1]))
    found: NDArray[np.float32] = overlong_penalty(lengths_B, max_tokens=max_tokens, buffer=buffer).numpy()
    return found


def repetition_of(batch: Batch) -> NDArray[np.float32]:
    """float32 [B], the tutorial's penalty of repeated 2- and 3-grams; 0 or less."""
    tokens_N = _tensor(batch.tokens, np.int64)
    found: NDArray[np.float32] = ngram_penalty(tokens_N, _mask(batch), _offsets(batch)).numpy()
    return found


def mixed_rows(batch: Batch) -> NDArray[np.int64]:
    """The sequences of groups whose rewards differ."""
    reward_B = _tensor(batch.sequence_column("reward"), np.float32)
    return np.flatnonzero(mixed_groups(reward_B, _tensor(batch.sequence_column("group"), np.int64)).numpy())


def kl_of_tokens(batch: Batch, *, estimator: Estimator) -> NDArray[np.float32]:
    """float32 [N], estimate of KL(policy || reference) at each sampled token, nats; 0 elsewhere."""
    estimate = kl_estimate(_column(batch, "old_logprobs"), _column(batch, "reference_logprobs"), estimator=estimator)
    return np.where(batch.mask, estimate.numpy(), np.float32(0)).astype(np.float32)


def with_correction(batch: Batch, config: CorrectionConfig) -> tuple[Batch, dict[str, float]]:
    """`weights` for the policy's loss where a method is chosen, and how far engine and trainer are apart, always."""
    old_N, engine_N, mask_N = _column(batch, "old_logprobs"), _column(batch, "engine_logprobs"), _mask(batch)
    count = int(mask_N.sum())
    if config.method == "none":
        apart_N = torch.where(mask_N, old_N - engine_N, 0.0)
        ones_N = torch.ones_like(apart_N).where(mask_N, torch.zeros_like(apart_N))
        found = mismatch_metrics(apart_N, ones_N, torch.zeros_like(mask_N), mask_N, count)
        return batch, {name: float(found[name]) for name in ("mismatch_abs", "mismatch_kl")}
    correction = _correct(batch, config, num_tokens=count)
    figures = {name: float(value) for name, value in correction.metrics.items()}
    figures["effective_share"] = figures["weight"] ** 2 / max(figures.pop("weight_square"), 1e-12)
    return batch.with_columns(tokens={"weights": correction.weights_N.numpy()}), figures


def _correct(batch: Batch, config: CorrectionConfig, *, num_tokens: int) -> Correction:
    old_N, engine_N = _column(batch, "old_logprobs"), _column(batch, "engine_logprobs")
    mask_N, offsets = _mask(batch), _offsets(batch)
    if config.method == "truncated":
        return truncated_importance(
            old_N, engine_N, mask_N, offsets, num_tokens=num_tokens, level=config.level, cap=config.cap
        )
    if config.method == "masked":
        return masked_importance(
            *(old_N, engine_N, mask_N, offsets),
            num_tokens=num_tokens,
            level=config.level,
            low=config.low,
            high=config.high,
        )
    return negative_sequence_mask(
        *(old_N, engine_N, _column(batch, "advantages"), mask_N, offsets),
        num_tokens=num_tokens,
        threshold=config.threshold,
    )


def with_value_advantages(
    batch: Batch, kl_N: NDArray[np.float32], *, kl_coef: float, gamma: float, lam: float, normalise: bool
) -> Batch:
    """`advantages` and `returns` from `reward`, `old_values` and the KL of each token (Ouyang et al. 2022, eq. 2).

    Every sampled token's reward is -kl_coef * KL; the sequence's reward falls on its last sampled token.
    """
    rewards_N = np.where(batch.mask, -np.float32(kl_coef) * kl_N, np.float32(0)).astype(np.float32)
    rewards_N[batch.offsets[1:] - 1] += batch.sequence_column("reward").astype(np.float32)
    mask_N = _mask(batch)
    found = gae(
        torch.from_numpy(rewards_N), _column(batch, "old_values"), mask_N, _offsets(batch), gamma=gamma, lam=lam
    )
    advantages_N = found.advantages_N
    if normalise:
        advantages_N = whiten(advantages_N, mask_N, moments(advantages_N, mask_N), eps=_WHITEN_EPS)
    return batch.with_columns(tokens={"advantages": advantages_N.numpy(), "returns": found.returns_N.numpy()})


def make_kl_controller(config: KlConfig) -> KlController:
    """What steers the KL coefficient of a run."""
    if config.adaptive:
        return AdaptiveKl(initial_coef=config.coef, target=config.target, horizon=config.horizon)
    return FixedKl(coef=config.coef)


def _column(batch: Batch, name: str) -> Tensor:
    return _tensor(batch.token_column(name), np.float32)


def _mask(batch: Batch) -> Tensor:
    return _tensor(batch.mask, np.bool_)


def _offsets(batch: Batch) -> Tensor:
    return _tensor(batch.offsets, np.int64)


def _tensor(column: NDArray[np.generic], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(column, dtype=dtype))
