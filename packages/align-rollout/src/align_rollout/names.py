"""Names and shapes of a transformers model's weights as its checkpoints spell them.

transformers keeps a layer's experts in one tensor, and checkpoints each expert's three matrices by themselves; it knows
both spellings and translates when it saves and loads.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align_core.types import ParamMeta

if TYPE_CHECKING:
    import torch


def checkpoint_metas(model: Any) -> list[ParamMeta]:
    """Of every weight once, a tied embedding's as the embedding; `model` may be on torch's meta device."""
    return [
        ParamMeta(name=name, shape=tuple(weight.shape), dtype="float32")
        for name, weight in _as_checkpointed(model).items()
    ]


def as_parameters(model: Any, weights: "Mapping[str, torch.Tensor]") -> "Mapping[str, torch.Tensor]":
    """Weights under a checkpoint's names as the parameters of `model`; they are its own where the names agree."""
    parameters = dict(model.named_parameters())
    if parameters.keys() == weights.keys():
        return weights
    filled = type(model).from_pretrained(None, config=model.config, state_dict=dict(weights), dtype=model.dtype)
    return dict(filled.named_parameters())


def has_experts(metas: Sequence[ParamMeta]) -> bool:
    """Whether a model with these weights is a mixture of experts, which engines keep in tensors of their own form."""
    return any(".experts." in meta.name for meta in metas)


def _as_checkpointed(model: Any) -> "dict[str, torch.Tensor]":
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415  (an engine brings it)

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(model.named_parameters()))
    return found
