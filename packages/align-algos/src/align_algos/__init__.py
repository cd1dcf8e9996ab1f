"""Losses, advantages, KL estimators and log-prob kernels of alignment, as pure torch functions.

Tensors are flat and ragged: `[N]` tokens of all sequences one after the other, `offsets` `[B+1]` where each begins.
"""

from align_algos.advantages import GaeOutput, Moments, gae, group_normalised, leave_one_out, moments, whiten
from align_algos.errors import InputError
from align_algos.kl import AdaptiveKl, FixedKl, KlController, k1, k2, k3
from align_algos.logprobs import token_entropy, token_logprobs
from align_algos.losses import (
    Loss,
    LossOutput,
    count_pairs,
    dpo_loss,
    get_loss,
    grpo_loss,
    loss_names,
    ppo_policy_loss,
    register_loss,
    reward_loss,
    sft_loss,
    value_loss,
)
from align_algos.ratios import exp_ratio
from align_algos.reductions import per_token, segment_lengths, segment_sum, sequence_mean, sequence_sum, token_mean

__all__ = [
    "AdaptiveKl",
    "FixedKl",
    "GaeOutput",
    "InputError",
    "KlController",
    "Loss",
    "LossOutput",
    "Moments",
    "count_pairs",
    "dpo_loss",
    "exp_ratio",
    "gae",
    "get_loss",
    "group_normalised",
    "grpo_loss",
    "k1",
    "k2",
    "k3",
    "leave_one_out",
    "loss_names",
    "moments",
    "per_token",
    "ppo_policy_loss",
    "register_loss",
    "reward_loss",
    "segment_lengths",
    "segment_sum",
    "sequence_mean",
    "sequence_sum",
    "sft_loss",
    "token_entropy",
    "token_logprobs",
    "token_mean",
    "value_loss",
    "whiten",
]
