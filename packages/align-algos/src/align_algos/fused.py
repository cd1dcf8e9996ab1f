"""Log-probability of given tokens, and entropy, straight from hidden states and the output matrix.

The logits [N, V] never exist as a whole: they are made a block of vocabulary columns at a time (one matrix product),
read once for the statistics of the softmax, and made again in the backward pass, where the block turns into its own
gradient in place and goes into two more products. That is 4 products where the unfused way has 3, for a memory of one
block; `keep_bytes` buys back the fourth for as many blocks as fit. Blocks of columns rather than of rows: each writes
its own rows of the weight's gradient once, and only the gradient of the hidden states, which is smaller, is summed.

If the gradient that the loss will send back is known beforehand (supervised training), `fused_cross_entropy` needs
neither the fourth product nor the logits.

Legend: N flat tokens, H hidden, V rows of the output matrix on this rank, C columns of a block.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_algos.checks import check_columns
from align_algos.errors import InputError
from align_algos.softmax_blocks import RowGradient, Statistics, empty_statistics, rebase_moment, take_block, to_gradient
from align_algos.vocabulary import VocabularySlice, check_matrix, check_rows, check_targets, summed, vocabulary_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A block of this size fills a large GPU with its matrix products and is little beside a model.
BLOCK_BYTES = 512 << 20


class FusedOutput(NamedTuple):
    """Per token, in nats, float32 (float64 for float64 hidden states)."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    """None where it was not asked for."""


class _Setting(NamedTuple):
    part: VocabularySlice
    entropy: bool
    columns: int
    """C, of a block."""
    kept: int
    """Blocks whose logits stay in memory until the backward pass."""


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
    keep_bytes: int = 0,
) -> FusedOutput:
    """log softmax(hidden @ weight^T / temperature) at the target, per row, without ever holding the logits.

    Logits have the dtype of the inputs, as those of a linear layer; sums over them are in float32. Under a group every
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
        block_bytes: size of a block of logits; memory for speed.
        keep_bytes: logits to keep for the backward pass instead of making them again, in whole blocks.
    Raises:
        InputError: a wrong shape or dtype, a target outside the vocabulary, or a row without a finite maximum.
    """
    part = _check(hidden_NH, weight_VH, targets_N, vocab_size=vocab_size, group=tp_group, temperature=temperature)
    column_bytes = max(1, hidden_NH.shape[0] * hidden_NH.element_size())
    # Whole multiples of 256 columns: odd sizes make matrix products slow.
    columns = min(max(256, block_bytes // column_bytes // 256 * 256), max(part.columns, 1))
    kept = keep_bytes // (columns * column_bytes) if torch.is_grad_enabled() else 0
    apply: Callable[..., tuple[Tensor, Tensor]] = _FusedLogprobs.apply  # torch leaves it untyped
    logprobs_N, entropy_N = apply(hidden_NH, weight_VH, targets_N, _Setting(part, entropy, columns, kept))
    return FusedOutput(logprobs_N, entropy_N if entropy else None)


def fused_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    temperature: float = 1.0,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """- sum of weights_N times the log-probabilities of `fused_logprobs`, with 3 matrix products instead of 4.

    The gradient is made in the forward pass, a block of *rows* at a time, and only scaled in the backward pass; so the
    weight of each token must be known beforehand: mask / num_tokens for supervised training.

    Args:
        weights_N: floating [N], a constant; rows of weight 0 still cost their share.
        Others and Raises: as in `fused_logprobs`.
    Returns: the scalar with gradient, and the log-probabilities [N] without.
    """
    part = _check(hidden_NH, weight_VH, targets_N, vocab_size=vocab_size, group=tp_group, temperature=temperature)
    check_columns("token", hidden_NH.shape[0], weights_N=weights_N)
    rows = max(1, block_bytes // max(1, part.columns * hidden_NH.element_size()))
    rows = rows // 256 * 256 if rows >= 256 else rows
    apply: Callable[..., tuple[Tensor, Tensor]] = _FusedCrossEntropy.apply
    return apply(hidden_NH, weight_VH, targets_N, weights_N, part, rows)


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        column_N = targets_N.long() - setting.part.first
        statistics = empty_statistics(len(column_N), like=hidden_NH, entropy=setting.entropy)
        kept: list[Tensor] = []
        for first, block_CH in _blocks(weight_VH, setting):
            logits_NC = hidden_NH @ block_CH.T
            take_block(logits_NC, column_N - first, statistics, temperature=setting.part.temperature)
            if len(kept) < setting.kept:
                kept.append(logits_NC)
            del logits_NC
        at_target_N, log_mass_N, entropy_N = _merged(statistics, setting.part.group)
        ctx.save_for_backward(hidden_NH, weight_VH, column_N, statistics.top_N, log_mass_N, entropy_N)
        ctx.setting, ctx.kept = setting, kept
        return at_target_N - statistics.top_N - log_mass_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, column_N, top_N, log_mass_N, entropy_N = ctx.saved_tensors
        setting: _Setting = ctx.setting
        weight_N = torch.zeros_like(top_N) if grad_N is None else grad_N
        rows = RowGradient(top_N, log_mass_N, weight_N, entropy_N, entropy_grad_N if setting.entropy else None)
        hidden_grad = _Sum(hidden_NH) if ctx.needs_input_grad[0] else None
        weight_grad_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        kept: list[Tensor] = ctx.kept
        for first, block_CH in _blocks(weight_VH, setting):
            logits_NC = kept.pop(0) if kept else hidden_NH @ block_CH.T
            to_gradient(logits_NC, column_N - first, rows, temperature=setting.part.temperature)
            if weight_grad_VH is not None:
                torch.mm(logits_NC.T, hidden_NH, out=weight_grad_VH[first : first + len(block_CH)])
            if hidden_grad is not None:
                hidden_grad.add(logits_NC, block_CH)
            del logits_NC
        hidden_grad_NH = None if hidden_grad is None else hidden_grad.result(setting.part.group)
        return hidden_grad_NH, weight_grad_VH, None, None


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch passes them by position)
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        part: VocabularySlice,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        real_CH = weight_VH[: part.columns]
        column_N = targets_N.long() - part.first
        weights_N = weights_N.detach().to(torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32)
        logprobs_N = torch.zeros_like(weights_N)
        hidden_grad_NH = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        weight_grad = _Sum(real_CH) if ctx.needs_input_grad[1] else None
        for start in range(0, len(column_N), rows):
            piece = slice(start, start + rows)
            logits_RC = hidden_NH[piece] @ real_CH.T
            statistics = empty_statistics(len(logits_RC), like=hidden_NH, entropy=False)
            take_block(logits_RC, column_N[piece], statistics, temperature=part.temperature)
            at_target_R, log_mass_R, _ = _merged(statistics, part.group)
            logprobs_N[piece] = at_target_R - statistics.top_N - log_mass_R
            if hidden_grad_NH is not None or weight_grad is not None:
                gradient = RowGradient(statistics.top_N, log_mass_R, -weights_N[piece], None, None)
                to_gradient(logits_RC, column_N[piece], gradient, temperature=part.temperature)
            if hidden_grad_NH is not None:
                torch.mm(logits_RC, real_CH, out=hidden_grad_NH[piece])
            if weight_grad is not None:
                weight_grad.add(logits_RC.T, hidden_NH[piece])
            del logits_RC
        if hidden_grad_NH is not None and part.group is not None:
            dist.all_reduce(hidden_grad_NH, group=part.group)
        weight_grad_VH = None
        if weight_grad is not None:
            weight_grad_VH = torch.zeros_like(weight_VH)
            weight_grad_VH[: part.columns] = weight_grad.result(None)
        ctx.save_for_backward(hidden_grad_NH, weight_grad_VH)
        ctx.mark_non_differentiable(logprobs_N)
        return -(weights_N * logprobs_N).sum(), logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NH, weight_grad_VH = ctx.saved_tensors
        scaled = [None if x is None else x * grad.to(x.dtype) for x in (hidden_grad_NH, weight_grad_VH)]
        return (*scaled, None, None, None, None)


class _Sum:
    """Sum of matrix products in at least float32, of the shape and (at the end) dtype of `like`."""

    def __init__(self, like: Tensor) -> None:
        self._dtype = like.dtype
        self._total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))

    def add(self, left: Tensor, right: Tensor) -> None:
        """total += left @ right."""
        if left.is_cuda and self._total.dtype != self._dtype:
            # cuBLAS multiplies 16-bit numbers and adds to a float32 matrix in one pass.
            torch.ops.aten.addmm.dtype_out(self._total, left, right, self._total.dtype, out=self._total)
        elif self._total.dtype != self._dtype:
            self._total += left @ right
        else:
            self._total.addmm_(left, right)

    def result(self, group: "ProcessGroup | None") -> Tensor:
        """The sum over the group, in the dtype of the input."""
        return summed(self._total, group).to(self._dtype)


def _blocks(weight_VH: Tensor, setting: _Setting) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each block of the output matrix that are real tokens."""
    for first in range(0, setting.part.columns, setting.columns):
        yield first, weight_VH[first : min(first + setting.columns, setting.part.columns)]


def _merged(statistics: Statistics, group: "ProcessGroup | None") -> tuple[Tensor, Tensor, Tensor]:
    """Merge over the group, `top_N` in place: scaled logit of the target, log of the mass, entropy (0: not wanted)."""
    top_N, mass_N, moment_N, at_target_N = statistics
    own_top_N = top_N.clone()
    if group is not None:
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
    scale_N = (own_top_N - top_N).exp()
    total_N = summed(mass_N * scale_N, group)
    log_mass_N = total_N.log()
    check_rows(log_mass_N, "hidden_NH @ weight_VH^T")
    entropy_N = torch.zeros_like(log_mass_N)
    if moment_N is not None:
        rebase_moment(moment_N, mass_N, own_top_N, top_N)
        entropy_N = log_mass_N - summed(moment_N, group) / total_N
    return summed(at_target_N, group), log_mass_N, entropy_N


def _check(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int | None,
    group: "ProcessGroup | None",
    temperature: float,
) -> VocabularySlice:
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
