"""silu(gate) * up in one pass over memory, and its gradient; only the input is kept.

Legend: P rows, F width of the result; the input is [P, 2F], gate and up side by side.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024


class SwiGluFunction(torch.autograd.Function):
    """[P, 2F] to [P, F]; computed in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        result = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows = result.numel() // width
        _forward[(rows, triton.cdiv(width, _BLOCK))](gate_up, result, width, BLOCK=_BLOCK)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        result = torch.empty_like(gate_up)
        width = gate_up.shape[-1] // 2
        rows = result.numel() // (2 * width)
        _backward[(rows, triton.cdiv(width, _BLOCK))](gate_up, grad.contiguous(), result, width, BLOCK=_BLOCK)
        return result


@triton.jit  # type: ignore[untyped-decorator]
def _forward(gate_up, result, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(gate_up, grad, result, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(result + row * 2 * width + column, upstream * up * (share + silu * (1.0 - share)), mask=inside)
    tl.store(result + row * 2 * width + width + column, upstream * silu, mask=inside)
