"""Losses by name, with what a trainer must know to cut a batch for them.

A third party adds one with `register_loss`, or for every process of an installation in its own pyproject:
`[project.entry-points."align.losses"]  mine = "my_package:MINE"`, where MINE is a `Loss`.

The invariance tests run over this table, so a loss that is in it is tested, and a loss file that is not in it fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from align_algos.errors import InputError
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
from align_algos.losses.kto import kto_loss
from align_algos.losses.online_dpo import online_dpo_loss
from align_algos.losses.orpo import orpo_loss
from align_algos.losses.output import LossOutput
from align_algos.losses.ppo_policy import ppo_policy_loss
from align_algos.losses.reinforce_pp import reinforce_pp_loss
from align_algos.losses.reward import reward_loss
from align_algos.losses.rloo import rloo_loss
from align_algos.losses.robust_dpo import robust_dpo_loss
from align_algos.losses.sft import sft_loss
from align_algos.losses.sft_mixing import sft_mixing_loss
from align_algos.losses.simpo import simpo_loss
from align_algos.losses.value import value_loss

Count = Literal["num_tokens", "num_pairs", "num_sequences"]
Unit = Literal["token", "sequence", "pair", "group"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss function and how a batch may be cut for it."""

    function: Callable[..., LossOutput]
    """Tensors first, then keyword-only numbers."""
    counts: tuple[Count, ...]
    """The keywords that take global counts, computed before the batch is cut."""
    unit: Unit
    """The smallest piece that must stay whole in a micro-batch: a token, a sequence, two sequences that follow each
    other, or all sequences of a group. With its default reduction; one over sequences needs whole sequences."""


_TOKENS: tuple[Count, ...] = ("num_tokens",)
_PAIRS: tuple[Count, ...] = ("num_pairs",)
_BOTH: tuple[Count, ...] = ("num_tokens", "num_sequences")

_LOSSES: dict[str, Loss] = {
    "cispo": Loss(function=cispo_loss, counts=_TOKENS, unit="token"),
    "dapo": Loss(function=dapo_loss, counts=_TOKENS, unit="token"),
    "dpo": Loss(function=dpo_loss, counts=_PAIRS, unit="pair"),
    "dr_grpo": Loss(function=dr_grpo_loss, counts=_BOTH, unit="sequence"),
    "entropy": Loss(function=entropy_loss, counts=_TOKENS, unit="token"),
    "grpo": Loss(function=grpo_loss, counts=_TOKENS, unit="token"),
    "gspo": Loss(function=gspo_loss, counts=_BOTH, unit="sequence"),
    "hinge": Loss(function=hinge_loss, counts=_PAIRS, unit="pair"),
    "ipo": Loss(function=ipo_loss, counts=_PAIRS, unit="pair"),
    "kl": Loss(function=kl_loss, counts=_TOKENS, unit="token"),
    "kto": Loss(function=kto_loss, counts=("num_sequences",), unit="sequence"),
    "online_dpo": Loss(function=online_dpo_loss, counts=_PAIRS, unit="group"),
    "orpo": Loss(function=orpo_loss, counts=_PAIRS, unit="pair"),
    "ppo_policy": Loss(function=ppo_policy_loss, counts=_TOKENS, unit="token"),
    "reinforce_pp": Loss(function=reinforce_pp_loss, counts=_TOKENS, unit="token"),
    "reward": Loss(function=reward_loss, counts=_PAIRS, unit="group"),
    "rloo": Loss(function=rloo_loss, counts=_BOTH, unit="sequence"),
    "robust_dpo": Loss(function=robust_dpo_loss, counts=_PAIRS, unit="pair"),
    "sft": Loss(function=sft_loss, counts=_TOKENS, unit="token"),
    "sft_mixing": Loss(function=sft_mixing_loss, counts=_TOKENS, unit="token"),
    "simpo": Loss(function=simpo_loss, counts=_PAIRS, unit="pair"),
    "value": Loss(function=value_loss, counts=_TOKENS, unit="token"),
    "vocab_kl": Loss(function=vocab_kl_loss, counts=_TOKENS, unit="token"),
}

ENTRY_POINTS = "align.losses"


def loss_names() -> list[str]:
    """The registered names and those that installed packages offer, sorted."""
    return sorted(_LOSSES.keys() | {point.name for point in entry_points(group=ENTRY_POINTS)})


def get_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        InputError: a name that nobody offers (the error lists those there are) or that several packages offer (it says
            which), this one included; an entry point that is not a `Loss`.
    """
    offers = {_distribution(point): point for point in entry_points(group=ENTRY_POINTS, name=name)}
    owners = sorted([*offers, *(["align-algos"] if name in _LOSSES else [])])
    if not owners:
        raise InputError(f"no loss is named {name!r}; choose one of {loss_names()}, or add it with register_loss")
    if len(owners) > 1:
        raise InputError(
            f"a loss {name!r} is offered by each of {owners}; uninstall all but one of them, or have it renamed in the "
            f"entry points of group {ENTRY_POINTS!r}"
        )
    return _LOSSES[name] if name in _LOSSES else _load(offers[owners[0]])


def register_loss(name: str, loss: Loss) -> None:
    """Add a loss under a new name; a name that is taken is an error, never a replacement."""
    if name in loss_names():
        raise InputError(f"a loss is already named {name!r}; choose another name than {loss_names()}")
    _LOSSES[name] = loss


def _load(point: EntryPoint) -> Loss:
    loss = point.load()
    if not isinstance(loss, Loss):
        raise InputError(
            f"the entry point {point.name!r} of group {ENTRY_POINTS!r} is {type(loss).__name__} {point.value}; "
            "expected an align_algos.Loss"
        )
    return loss


def _distribution(point: EntryPoint) -> str:
    """The package that offers it, as pip calls it; where it is where that is not known."""
    return point.value if point.dist is None else point.dist.name
