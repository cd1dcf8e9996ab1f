"""Losses of other packages (entry-point group `align.losses`) in the place of GRPO's: what they may ask for, by name.

Knows nothing about ranks, models and advantages.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align_algos.losses import Loss, LossOutput, get_loss
from align_core.config import GrpoLoss
from align_core.errors import ConfigError, choices

OFFERED = (
    "logprobs_N",
    "old_logprobs_N",
    "advantages_N",
    "mask_N",
    "offsets",
    "reference_logprobs_N",
    "weights_N",
    "num_tokens",
    "num_sequences",
    "clip_low",
    "clip_high",
    "kl_coef",
    "length",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedLoss:
    """A loss by name, with what it takes of the things offered."""

    entry: Loss
    takes: frozenset[str]

    def __call__(self, offered: Mapping[str, Any]) -> LossOutput:
        """The loss of a micro-batch; what is offered goes in by keyword."""
        function: Callable[..., LossOutput] = self.entry.function
        return function(**{name: value for name, value in offered.items() if name in self.takes})

    @property
    def brings_kl(self) -> bool:
        """Whether the KL to the reference is the loss's own business."""
        return "kl_coef" in self.takes


def added_loss(loss: GrpoLoss) -> AddedLoss:
    """The loss that `variant` names. Of clip, KL and length it takes what its signature names; what the settings leave
    unset and the function has a default for stays the function's.

    Raises:
        ConfigError: it asks for something that is not offered, or needs more than whole sequences in a micro-batch.
    """
    entry = get_loss(loss.variant)
    parameters = inspect.signature(entry.function).parameters
    needed = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    if unknown := [name for name in needed if name not in OFFERED]:
        raise ConfigError(
            f"the loss {loss.variant!r} asks for {choices(unknown)}; "
            f"as a variant of grpo it may ask for {choices(OFFERED)}"
        )
    if entry.unit not in ("token", "sequence"):
        raise ConfigError(
            f"the loss {loss.variant!r} has unit {entry.unit!r}; a variant of grpo gets whole sequences only"
        )
    unset = {name for name in ("clip_low", "clip_high", "length") if getattr(loss, name) is None}
    return AddedLoss(entry=entry, takes=frozenset(parameters) & set(OFFERED) - (unset - set(needed)))
