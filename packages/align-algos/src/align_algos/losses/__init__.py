"""Losses, one file each, as pure functions of flat ragged tensors; see `registry` to choose one by name."""

from align_algos.losses.dpo import dpo_loss
from align_algos.losses.grpo import grpo_loss
from align_algos.losses.output import LossOutput
from align_algos.losses.ppo_policy import ppo_policy_loss
from align_algos.losses.registry import Loss, get_loss, loss_names, register_loss
from align_algos.losses.reward import count_pairs, reward_loss
from align_algos.losses.sft import sft_loss
from align_algos.losses.value import value_loss

__all__ = [
    "Loss",
    "LossOutput",
    "count_pairs",
    "dpo_loss",
    "get_loss",
    "grpo_loss",
    "loss_names",
    "ppo_policy_loss",
    "register_loss",
    "reward_loss",
    "sft_loss",
    "value_loss",
]
