"""Adds a weight's gradient to its float32 sum inside the matrix product, as Apex's extension does; with torch alone.

Megatron-core has the switch (`gradient_accumulation_fusion`) and calls an extension by name; this gives it one. Saves
writing and reading each gradient in bfloat16, and its rounding.
"""

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


class _Extension:
    """What megatron-core looks for under the name of Apex's module."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """`main_grad` += `grad_output`^T `inputs`; [P, O] and [P, I] in half precision, float32 [O, I]."""
        if not len(inputs):  # an expert that no token chose
            return
        torch.ops.aten.addmm.dtype_out(main_grad, grad_output.t(), inputs, torch.float32, out=main_grad)


def can_accumulate(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether gradients are accumulated that way here; gives megatron-core the means unless Apex has."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return False
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _Extension
        layers._grad_accum_fusion_available = True
    return True
