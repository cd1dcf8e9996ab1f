"""The two functions of `softmax_blocks` as Triton kernels: one pass over a block of logits each. Needs Triton.

One program a row. The parameters of the kernels have no annotations, because Triton reads those and knows only its own.

Legend: N rows, C columns of the block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from align_algos.softmax_blocks import LOWEST_SHIFT, RowGradient, Statistics

# Columns a program takes at a time: 4096 float32 are 32 registers of each of 128 threads. The fastest of eight sizes on
# an H200 (benchmarks/results/logprobs.md).
_TILE = 4096
_WARPS = 4


def take_block(logits_NC: Tensor, columns_N: Tensor, statistics: Statistics, *, temperature: float) -> None:
    """As `softmax_blocks.take_block`."""
    top_N, mass_N, moment_N, at_target_N = statistics
    with _device(logits_NC):
        _statistics_kernel[(len(logits_NC),)](
            logits_NC,
            logits_NC.stride(0),
            logits_NC.shape[1],
            columns_N,
            top_N,
            mass_N,
            top_N if moment_N is None else moment_N,  # not read where there is none
            at_target_N,
            1.0 / temperature,
            LOWEST_SHIFT,
            ENTROPY=moment_N is not None,
            TILE=_TILE,
            num_warps=_WARPS,
        )


def to_gradient(logits_NC: Tensor, columns_N: Tensor, rows: RowGradient, *, temperature: float, out_NC: Tensor) -> None:
    """As `softmax_blocks.to_gradient`."""
    entropy_N, entropy_weight_N = rows.entropy_N, rows.entropy_weight_N
    if entropy_N is None or entropy_weight_N is None:
        entropy_N = entropy_weight_N = rows.top_N  # not read
    with _device(logits_NC):
        _gradient_kernel[(len(logits_NC),)](
            logits_NC,
            out_NC,
            logits_NC.stride(0),
            out_NC.stride(0),
            logits_NC.shape[1],
            columns_N,
            rows.top_N,
            rows.log_mass_N,
            rows.weight_N.contiguous(),  # the gradient of a sum is one number, expanded
            entropy_N,
            entropy_weight_N.contiguous(),
            1.0 / temperature,
            ENTROPY=rows.entropy_weight_N is not None,
            TILE=_TILE,
            num_warps=_WARPS,
        )


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917 (Triton takes them by position)
    logits,
    stride,
    columns,
    target,
    top,
    mass,
    moment,
    at_target,
    inverse_temperature,
    lowest,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    own = tl.load(target + row)
    m = tl.load(top + row)
    s = tl.load(mass + row)
    q = tl.load(moment + row) if ENTROPY else 0.0
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32) * inverse_temperature
        new = tl.maximum(m, tl.max(x, 0))
        e = tl.exp(x - new)
        scale = tl.exp(m - new)
        if ENTROPY:
            q = scale * (q + tl.maximum(m - new, lowest) * s) + tl.sum(tl.where(e > 0, e * (x - new), 0.0), 0)
        s = s * scale + tl.sum(e, 0)
        m = new
    tl.store(top + row, m)
    tl.store(mass + row, s)
    if ENTROPY:
        tl.store(moment + row, q)
    if (own >= 0) & (own < columns):
        tl.store(at_target + row, tl.load(logits + own).to(tl.float32) * inverse_temperature)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917
    logits,
    out,
    stride,
    out_stride,
    columns,
    target,
    top,
    log_mass,
    weight,
    entropy,
    entropy_weight,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    own = tl.load(target + row)
    m = tl.load(top + row)
    l = tl.load(log_mass + row)  # noqa: E741
    w = tl.load(weight + row)
    h = tl.load(entropy + row) if ENTROPY else 0.0
    v = tl.load(entropy_weight + row) if ENTROPY else 0.0
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < columns
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        logp = x - m - l
        p = tl.exp(logp)
        g = tl.where(column == own, w, 0.0) - w * p
        if ENTROPY:
            g -= v * tl.where(p > 0, p * (logp + h), 0.0)
        tl.store(out + column, (g * inverse_temperature).to(out.dtype.element_ty), mask=inside)
