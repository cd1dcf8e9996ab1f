"""Log-probability of given tokens, and entropy, straight from hidden states and the output matrix.

The logits [N, V] never exist as a whole: they are made a block of vocabulary columns at a time (one matrix product),
read once for the statistics of the softmax, and made again in the backward pass, where the block turns into its own
gradient in place and goes into two more products. That is 4 products where the unfused way has 3, for a memory of one
block; `keep_bytes` buys back the fourth for the columns whose logits stay. Blocks of columns rather than of rows: each
writes its own rows of the weight's gradient once, and only the gradient of the hidden states, the smaller, is summed.

A loss that can be computed a piece of the batch at a time needs neither the fourth product nor the memory: see
`fused_loss`.

Legend: N flat tokens, H hidden, V rows of the output matrix on this rank, C columns of a block.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_algos.errors import InputError
from align_algos.softmax_blocks import RowGradient, empty_statistics, merge, take_block, to_gradient
from align_algos.vocabulary import VocabularySlice, check_matrix, check_targets, summed, vocabulary_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A block of this size fills a large GPU with its matrix products and is little beside a model.
BLOCK_BYTES = 512 << 20
# Share of the logits that stays by default: as fast as the unfused way then, at a tenth of its memory or less.
KEPT_SHARE = 0.4
# Odd numbers of columns make matrix products slow.
_ALIGNMENT = 256


class FusedOutput(NamedTuple):
    """Per token, in nats, float32 (float64 for float64 hidden states)."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    """None where it was not asked for."""


class _Setting(NamedTuple):
    part: VocabularySlice
    entropy: bool
    again: list[slice]
    """Columns of each block whose logits are made again in the backward pass."""
    kept: list[slice]
    """Columns of each block whose logits may stay in memory until then."""
    hold: bool
    """Whether there will be a backward pass."""
    check_finite: bool


def fused_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
    entropy: bool = False,
    block_bytes: int = BLOCK_BYTES,
    keep_bytes: int | None = None,
    check_finite: bool = True,
) -> FusedOutput:
    """log softmax(hidden @ weight^T / temperature) at the target, per row, without ever holding the logits.

    Logits have the dtype of the inputs, also under autocast; sums over them are in float32. Under a group every
    rank gives the same hidden states and gets the same result and the same (summed) gradient of them; its gradient of
    `weight_VH` is that of its own rows.

    Args:
        hidden_NH: floating [N, H]; row i predicts targets_N[i].
        weight_VH: [V, H], same dtype; with `tp_group` this rank's slice, equal slices in rank order.
        targets_N: integer [N], token ids of the whole vocabulary.
        vocab_size: ids from here on are padding of the vocabulary and take no part in the softmax; None: no padding.
        tp_group: process group over which the vocabulary is split; None: `weight_VH` is whole.
        temperature: divides the logits, as in sampling.
        entropy: also give the entropy of each row, differentiable.
        block_bytes: size of a block of logits, at most; memory for speed.
        keep_bytes: logits to keep for the backward pass instead of making them again, at most; 0: none. None: 2/5.
        check_finite: False: a row without a finite maximum gets NaN instead of ending in an error, and nothing waits
            for the device to look for one.
    Raises:
        InputError: a wrong shape or dtype, or a target outside the vocabulary.
        NonFiniteError: a row without a finite maximum.
    Source: vocabulary-parallel cross-entropy: Shoeybi et al. 2019, arXiv:1909.08053, section 3; a block of columns at a
        time: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    part = check_linear(hidden_NH, weight_VH, targets_N, vocab_size=vocab_size, group=tp_group, temperature=temperature)
    column_bytes = max(1, hidden_NH.shape[0] * hidden_NH.element_size())
    wanted = int(KEPT_SHARE * part.columns) if keep_bytes is None else keep_bytes // column_bytes
    kept = part.columns if wanted >= part.columns else wanted // _ALIGNMENT * _ALIGNMENT
    again, columns = part.columns - kept, block_bytes // column_bytes
    # The same blocks with and without gradient, so that both give the same log-probs to the bit.
    setting = _Setting(
        part,
        entropy,
        _cut(0, again, columns),
        _cut(again, part.columns, columns),
        hold=torch.is_grad_enabled(),
        check_finite=check_finite,
    )
    apply: Callable[..., tuple[Tensor, Tensor | None]] = _FusedLogprobs.apply  # torch leaves it untyped
    return FusedOutput(*apply(hidden_NH, weight_VH, targets_N, setting))


def _cut(first: int, stop: int, columns: int) -> list[slice]:
    """Aligned blocks of about equal size: `columns` at most, or the alignment where that is more."""
    most = max(columns // _ALIGNMENT, 1)
    units = math.ceil((stop - first) / _ALIGNMENT)
    width = math.ceil(units / max(math.ceil(units / most), 1)) * _ALIGNMENT
    return [slice(start, min(start + width, stop)) for start in range(first, stop, max(width, 1))]


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        column_N = targets_N.long() - setting.part.first
        statistics = empty_statistics(len(column_N), like=hidden_NH, entropy=setting.entropy)
        kept: list[Tensor] = []
        with without_autocast(hidden_NH):
            # Those that stay come last: while others pass, nothing is held.
            for block in (*setting.again, *setting.kept):
                logits_NC = hidden_NH @ weight_VH[block].T
                take_block(logits_NC, column_N - block.start, statistics, temperature=setting.part.temperature)
                if block in setting.kept and setting.hold:
                    kept.append(logits_NC)
                del logits_NC
        softmax = merge(statistics, setting.part.group, name=LOGITS if setting.check_finite else None)
        ctx.save_for_backward(hidden_NH, weight_VH, column_N, softmax.top_N, softmax.log_mass_N, softmax.entropy_N)
        ctx.setting, ctx.kept = setting, kept
        return softmax.logprobs_N, softmax.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, column_N, top_N, log_mass_N, entropy_N = ctx.saved_tensors
        setting: _Setting = ctx.setting
        weight_N = torch.zeros_like(top_N) if grad_N is None else grad_N
        rows = RowGradient(top_N, log_mass_N, weight_N, entropy_N, entropy_grad_N)
        hidden_grad = ProductSum(hidden_NH) if ctx.needs_input_grad[0] else None
        weight_grad_VH = None
        if ctx.needs_input_grad[1]:
            weight_grad_VH = torch.empty_like(weight_VH)
            weight_grad_VH[setting.part.columns :] = 0.0  # padding of the vocabulary
        kept: list[Tensor] = ctx.kept
        with without_autocast(hidden_NH):
            for block in (*setting.kept, *setting.again):
                logits_NC = kept.pop(0) if kept else hidden_NH @ weight_VH[block].T
                to_gradient(logits_NC, column_N - block.start, rows, temperature=setting.part.temperature)
                if weight_grad_VH is not None:
                    torch.mm(logits_NC.T, hidden_NH, out=weight_grad_VH[block])
                if hidden_grad is not None:
                    hidden_grad.add(logits_NC, weight_VH[block])
                del logits_NC
        hidden_grad_NH = None if hidden_grad is None else hidden_grad.result(setting.part.group)
        return hidden_grad_NH, weight_grad_VH, None, None


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products have the dtype of their factors, as the buffers that take them have; autocast would narrow them."""
    return torch.autocast(x.device.type, enabled=False)


class ProductSum:
    """Sum of matrix products, of the shape and (at the end) dtype of `like`; added up in `dtype` or that, the wider."""

    def __init__(self, like: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._like = like
        self._precision = torch.promote_types(like.dtype, dtype)
        self._total: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """total += left @ right."""
        if left.is_cuda and left.dtype != self._precision:
            # cuBLAS multiplies 16-bit numbers and adds to a float32 matrix in one pass.
            if self._total is None:
                self._total = torch.ops.aten.mm.dtype(left, right, self._precision)
            else:
                torch.ops.aten.addmm.dtype_out(self._total, left, right, self._precision, out=self._total)
        elif self._total is None:
            self._total = (left @ right).to(self._precision)
        elif left.dtype == self._precision:
            self._total.addmm_(left, right)
        else:
            self._total += left @ right

    def result(self, group: "ProcessGroup | None") -> Tensor:
        """The sum over the group, in the dtype of the input."""
        total = torch.zeros_like(self._like, dtype=self._precision) if self._total is None else self._total
        return summed(total, group).to(self._like.dtype)


LOGITS = "hidden_NH @ weight_VH^T"
"""What logits are called in an error."""


def check_linear(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int | None,
    group: "ProcessGroup | None",
    temperature: float,
) -> VocabularySlice:
    """Check what the fused functions take, and say which part of the vocabulary this rank holds."""
    check_matrix("hidden_NH", hidden_NH)
    check_matrix("weight_VH", weight_VH)
    if hidden_NH.shape[1] != weight_VH.shape[1] or hidden_NH.dtype != weight_VH.dtype:
        raise InputError(
            f"hidden_NH has shape {list(hidden_NH.shape)} and dtype {hidden_NH.dtype}, weight_VH "
            f"{list(weight_VH.shape)} and {weight_VH.dtype}; expected the same H and dtype"
        )
    part = vocabulary_slice(weight_VH.shape[0], vocab_size=vocab_size, group=group, temperature=temperature)
    check_targets(targets_N, hidden_NH.shape[0], part.vocab_size)
    return part
