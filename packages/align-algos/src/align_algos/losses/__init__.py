"""Losses, one file each, as pure functions of flat ragged tensors; see `registry` to choose one by name."""

from align_algos.losses.cispo import cispo_loss
from align_algos.losses.dapo import dapo_loss
from align_algos.losses.dpo import dpo_loss
from align_algos.losses.dr_grpo import dr_grpo_loss
from align_algos.losses.entropy import entropy_loss
from align_algos.losses.grpo import grpo_loss
from align_algos.losses.gspo import gspo_loss
from align_algos.losses.hinge import hinge_loss
from align_algos.losses.ipo import ipo_loss
from align_algos.losses.kl_penalty import kl_loss, vocab_kl_loss
from align_algos.losses.kto import kto_kl, kto_loss
from align_algos.losses.online_dpo import PairChoice, count_preferences, online_dpo_loss
from align_algos.losses.orpo import orpo_loss
from align_algos.losses.output import LossOutput
from align_algos.losses.ppo_policy import ppo_policy_loss
from align_algos.losses.registry import Loss, get_loss, loss_names, register_loss
from align_algos.losses.reinforce_pp import reinforce_pp_loss
from align_algos.losses.reward import count_pairs, reward_loss
from align_algos.losses.rloo import rloo_loss
from align_algos.losses.robust_dpo import robust_dpo_loss
from align_algos.losses.sft import sft_loss
from align_algos.losses.sft_mixing import sft_mixing_loss
from align_algos.losses.simpo import simpo_loss
from align_algos.losses.value import value_loss

__all__ = [
    "Loss",
    "LossOutput",
    "PairChoice",
    "cispo_loss",
    "count_pairs",
    "count_preferences",
    "dapo_loss",
    "dpo_loss",
    "dr_grpo_loss",
    "entropy_loss",
    "get_loss",
    "grpo_loss",
    "gspo_loss",
    "hinge_loss",
    "ipo_loss",
    "kl_loss",
    "kto_kl",
    "kto_loss",
    "loss_names",
    "online_dpo_loss",
    "orpo_loss",
    "ppo_policy_loss",
    "register_loss",
    "reinforce_pp_loss",
    "reward_loss",
    "rloo_loss",
    "robust_dpo_loss",
    "sft_loss",
    "sft_mixing_loss",
    "simpo_loss",
    "value_loss",
    "vocab_kl_loss",
]
