"""The parts of the transformer that are ours: norm, gated activation, and the two heads.

On CUDA the activation is one kernel. The language-model head passes the hidden states on: log-probs are computed from
them and the head's weight, so that the logits of all tokens never exist at once. Knows nothing about weights' origin.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from align_core.megatron import cpu


class Norm(nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor; sequence parallelism sums its gradient over ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=model_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of the last dimension: [..., 2F] to [..., F]."""
    if gate_up.is_cuda and gate_up.numel():  # an expert that no token chose has no rows, and a kernel needs some
        from align_core.megatron.kernels.swiglu import SwiGluFunction  # noqa: PLC0415  (triton; needed on CUDA only)

        apply: Callable[[Tensor], Tensor] = SwiGluFunction.apply
        return apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class LanguageHead(ColumnParallelLinear):  # type: ignore[misc]
    """Holds this rank's rows of the head's weight; its output are the hidden states, ready to be multiplied by them."""

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """[tokens of this rank, 1, hidden] to [all tokens, 1, hidden], and the bias that there is not.

        Their gradient comes back whole: whoever multiplies them by the ranks' rows sums over the ranks.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False), None
        return hidden, None


class ScoreHead(MegatronModule):  # type: ignore[misc]
    """One number a token, in the place of the language-model head; every tensor-parallel rank computes all of it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        # Zeros, not noise: the first reward-model loss is then exactly ln 2, and no seed enters the result.
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=model_device(), dtype=config.params_dtype))

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """[tokens, 1, hidden] to [tokens, 1, 1], and the bias that there is not."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        # In float32: bfloat16 would round a score of 1 to steps of 1/128, and tie responses that differ.
        return nn.functional.linear(hidden.float(), self.weight.float()), None


def model_device() -> torch.device:
    """Where megatron-core puts its own weights."""
    return torch.device("cpu") if cpu.installed() else torch.device("cuda", torch.cuda.current_device())
