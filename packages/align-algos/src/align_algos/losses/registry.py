"""Losses by name, with what a trainer must know to cut a batch for them. A third party adds one with `register_loss`.

The invariance tests run over this table, so a loss that is in it is tested, and a loss file that is not in it fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from align_algos.errors import InputError
from align_algos.losses.dpo import dpo_loss
from align_algos.losses.grpo import grpo_loss
from align_algos.losses.output import LossOutput
from align_algos.losses.ppo_policy import ppo_policy_loss
from align_algos.losses.reward import reward_loss
from align_algos.losses.sft import sft_loss
from align_algos.losses.value import value_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss function and how a batch may be cut for it."""

    function: Callable[..., LossOutput]
    """Tensors first, then keyword-only numbers."""
    count: Literal["num_tokens", "num_pairs", "num_sequences"]
    """The keyword that takes the global count, computed before the batch is cut."""
    unit: Literal["token", "sequence", "pair", "group"]
    """The smallest piece that must stay whole in a micro-batch: a token, a sequence, two sequences that follow each
    other, or all sequences of a group."""


_LOSSES: dict[str, Loss] = {
    "dpo": Loss(function=dpo_loss, count="num_pairs", unit="pair"),
    "grpo": Loss(function=grpo_loss, count="num_tokens", unit="token"),
    "ppo_policy": Loss(function=ppo_policy_loss, count="num_tokens", unit="token"),
    "reward": Loss(function=reward_loss, count="num_pairs", unit="group"),
    "sft": Loss(function=sft_loss, count="num_tokens", unit="token"),
    "value": Loss(function=value_loss, count="num_tokens", unit="token"),
}


def loss_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_LOSSES)


def get_loss(name: str) -> Loss:
    """The loss of that name; InputError lists the names there are."""
    if name not in _LOSSES:
        raise InputError(f"no loss is named {name!r}; choose one of {loss_names()}, or add it with register_loss")
    return _LOSSES[name]


def register_loss(name: str, loss: Loss) -> None:
    """Add a loss under a new name; a name that is taken is an error, never a replacement."""
    if name in _LOSSES:
        raise InputError(f"a loss is already named {name!r}; choose another name than {loss_names()}")
    _LOSSES[name] = loss
