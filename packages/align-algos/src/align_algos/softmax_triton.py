"""The two functions of `softmax_blocks` as Triton kernels: one pass over a block of logits each. Needs Triton.

Legend: N rows, C columns of the block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from align_algos.softmax_blocks import LOWEST_SHIFT, RowGradient, Statistics

# Columns a program takes at a time: 4096 float32 are 16 registers of each of 256 threads.
_TILE = 4096
_WARPS = 8


def take_block(logits_NC: Tensor, columns_N: Tensor, statistics: Statistics, *, temperature: float) -> None:
    """As `softmax_blocks.take_block`."""
    entropy = statistics.moment_N is not None
    _launch(
        _statistics_kernel,
        logits_NC,
        columns_N,
        statistics,
        temperature=temperature,
        entropy=entropy,
        LOWEST=LOWEST_SHIFT,
    )


def to_gradient(logits_NC: Tensor, columns_N: Tensor, rows: RowGradient, *, temperature: float) -> None:
    """As `softmax_blocks.to_gradient`."""
    entropy = rows.entropy_weight_N is not None
    _launch(_gradient_kernel, logits_NC, columns_N, rows, temperature=temperature, entropy=entropy)


def _launch(
    kernel: Any,
    logits_NC: Tensor,
    columns_N: Tensor,
    per_row: Statistics | RowGradient,
    *,
    temperature: float,
    entropy: bool,
    **constants: float,
) -> None:
    """One program a row."""
    rows, columns = logits_NC.shape
    # A column that is None becomes one that the kernel will not read.
    filled = tuple(per_row[0] if column is None else column for column in per_row)
    with torch.cuda.device(logits_NC.device):
        kernel[(rows,)](
            logits_NC,
            logits_NC.stride(0),
            columns,
            columns_N,
            *filled,
            1.0 / temperature,
            ENTROPY=entropy,
            TILE=_TILE,
            **constants,
            num_warps=_WARPS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # noqa: PLR0917 (Triton takes them by position)
    logits: Any,
    stride: Any,
    columns: Any,
    target: Any,
    top: Any,
    mass: Any,
    moment: Any,
    at_target: Any,
    inverse_temperature: Any,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
    LOWEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    own = tl.load(target + row)
    m = tl.load(top + row)
    s = tl.load(mass + row)
    q = 0.0
    if ENTROPY:
        q = tl.load(moment + row)
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32) * inverse_temperature
        new = tl.maximum(m, tl.max(x, 0))
        e = tl.exp(x - new)
        scale = tl.exp(m - new)
        if ENTROPY:
            q = scale * (q + tl.maximum(m - new, LOWEST) * s) + tl.sum(tl.where(e > 0, e * (x - new), 0.0), 0)
        s = s * scale + tl.sum(e, 0)
        m = new
    tl.store(top + row, m)
    tl.store(mass + row, s)
    if ENTROPY:
        tl.store(moment + row, q)
    if (own >= 0) & (own < columns):
        tl.store(at_target + row, tl.load(logits + own).to(tl.float32) * inverse_temperature)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # noqa: PLR0917
    logits: Any,
    stride: Any,
    columns: Any,
    target: Any,
    top: Any,
    log_mass: Any,
    weight: Any,
    entropy: Any,
    entropy_weight: Any,
    inverse_temperature: Any,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    own = tl.load(target + row)
    m = tl.load(top + row)
    lse = m + tl.load(log_mass + row)
    w = tl.load(weight + row)
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < columns
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        logp = x - lse
        p = tl.exp(logp)
        g = tl.where(column == own, w, 0.0) - w * p
        if ENTROPY:
            g -= tl.load(entropy_weight + row) * tl.where(p > 0, p * (logp + tl.load(entropy + row)), 0.0)
        tl.store(logits + column, (g * inverse_temperature).to(logits.dtype.element_ty), mask=inside)
