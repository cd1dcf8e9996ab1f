"""Selective recompute: outputs within a layer that are forgotten after the forward pass and made again in the backward.

Each is read by one product only, which keeps its input for its own gradient: when the gradient of that product's output
arrives, the input is made again in the very storage that was emptied. megatron-core has the mechanism; its own options
for norms, attention and MLP either need Transformer Engine or keep what is forgotten here.

Knows nothing about settings: `spec.py` chooses the modules.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from align_core.megatron.attention import PackedAttention
from align_core.megatron.layers import Norm
from align_core.megatron.microbatch import Packed


class _Forgettable:
    """A module whose output can be forgotten once its reader has been computed."""

    _checkpoint: CheckpointWithoutOutput | None = None

    def remembered(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`compute(*inputs)`, which `forget` may drop; the inputs are kept."""
        if not torch.is_grad_enabled():
            return compute(*inputs)
        self._checkpoint = CheckpointWithoutOutput(fp8=None)
        output: Tensor = self._checkpoint.checkpoint(compute, *inputs)
        return output

    def forget(self, read: Tensor) -> None:
        """Empty the output, until the gradient of `read`, which was computed from it, arrives."""
        if self._checkpoint is not None:
            self._checkpoint.discard_output_and_register_recompute(read)
            self._checkpoint = None


class ForgettableNorm(Norm, _Forgettable):
    """RMSNorm; its input stays, because its own gradient needs it anyway."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return self.remembered(super().forward, hidden)


class ForgettableAttention(PackedAttention, _Forgettable):
    """Core attention: its output, and queries and keys after their rotation; those before it stay."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packed,
        **_: object,
    ) -> Tensor:
        """As `PackedAttention`."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return super(ForgettableAttention, self).forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )

        return self.remembered(attend, query, key, value)


class ForgettableMLP(MLP, _Forgettable):  # type: ignore[misc]
    """Gated MLP without biases: the activation's output, or (`whole`) gate and up too, which costs their product."""

    def __init__(self, *arguments: Any, whole: bool, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._whole = whole

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """[P, 1, hidden] to the same, and the bias that there is not."""
        activated = self.remembered(self._activated, hidden) if self._whole else self._of_gate_up(hidden)
        output, _none = self.linear_fc2(activated)
        return output, None

    def _activated(self, hidden: Tensor) -> Tensor:
        gate_up, _none = self.linear_fc1(hidden)
        result: Tensor = self.activation_func(gate_up)
        return result

    def _of_gate_up(self, hidden: Tensor) -> Tensor:
        gate_up, _none = self.linear_fc1(hidden)
        return self.remembered(self.activation_func, gate_up)


class ForgetfulLayer(TransformerLayer):  # type: ignore[misc]
    """A transformer layer that lets norms, attention and MLP forget, where they are modules that can."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        attention = self.self_attention
        for module, reader in (
            (self.input_layernorm, attention),
            (attention.core_attention, attention.linear_proj),
            (self.pre_mlp_layernorm, self.mlp),
            (self.mlp, self.mlp),  # after the norm: it is made again in the same order, and needs what the norm gave
        ):
            if isinstance(module, _Forgettable):
                reader.register_forward_hook(_forgetting(module))


def _forgetting(module: _Forgettable) -> Callable[[nn.Module, object, tuple[Tensor, object]], None]:
    def hook(reader: nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
        del reader, inputs
        module.forget(output[0])

    return hook
