"""Softmax over a vocabulary that is seen a block of columns at a time: statistics that merge, and gradients of logits.

Plain torch here; on CUDA, for bf16, fp16 and float32, one kernel each in `softmax_triton`, where torch would pass over
the block several times in float32.

Source: merging of partial sums: Milakov and Gimelshein 2018, arXiv:1805.02867; over ranks as in Shoeybi et al. 2019,
arXiv:1909.08053, section 3.

Legend: N rows, C columns of the block. Logits here are not yet divided by the temperature.
"""

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_algos.vocabulary import check_rows, summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# exp() of it is 0 also in float64. A lower one could make shift * mass infinite, and 0 times that is NaN.
LOWEST_SHIFT = -1e4
# 64 MB a float32 temporary of the torch implementation, which works on rows of the block at a time.
CHUNK_ELEMENTS = 1 << 24
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Statistics(NamedTuple):
    """Per row, of the columns seen so far: float32 (float64 for float64 logits), updated in place."""

    top_N: Tensor
    """Highest scaled logit."""
    mass_N: Tensor
    """Sum of exp(scaled logit - top)."""
    moment_N: Tensor | None
    """Sum of exp(scaled logit - top) (scaled logit - top), for the entropy; None where none is wanted."""
    at_target_N: Tensor
    """Scaled logit of the target, 0 where it was not among the columns."""


class Softmax(NamedTuple):
    """Per row, over the whole vocabulary. Top and log mass are kept apart because their sum would round away the small
    differences between log-probabilities of large logits."""

    top_N: Tensor
    log_mass_N: Tensor
    logprobs_N: Tensor
    """Of the target."""
    entropy_N: Tensor | None


class RowGradient(NamedTuple):
    """Per row, what the gradient of a logit needs: float32 (float64 for float64 logits)."""

    top_N: Tensor
    log_mass_N: Tensor
    weight_N: Tensor
    """Gradient of the loss by the log-probability."""
    entropy_N: Tensor | None = None
    entropy_weight_N: Tensor | None = None
    """Entropy, and gradient of the loss by it; the latter is None where none was wanted."""


def empty_statistics(rows: int, *, like: Tensor, entropy: bool) -> Statistics:
    """Of no columns at all."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    zeros = like.new_zeros((3, rows), dtype=dtype)
    # Lowest finite number rather than -inf: -inf - -inf would be NaN in a row whose columns here are all -inf.
    top_N = torch.full_like(zeros[0], torch.finfo(dtype).min)
    return Statistics(top_N, zeros[0], zeros[1] if entropy else None, zeros[2])


def take_block(logits_NC: Tensor, columns_N: Tensor, statistics: Statistics, *, temperature: float) -> None:
    """Add a block of columns to the statistics.

    Args:
        logits_NC: floating [N, C].
        columns_N: int64 [N], column of the target in this block; outside 0 to C - 1 where it is elsewhere.
    """
    if logits_NC.numel() == 0:  # a rank that holds only padding of the vocabulary
        return
    if use_triton(logits_NC):
        from align_algos import softmax_triton  # noqa: PLC0415 (torch for CPU comes without Triton)

        softmax_triton.take_block(_rows_contiguous(logits_NC), columns_N, statistics, temperature=temperature)
        return
    for rows in row_chunks(logits_NC):
        part = Statistics(*(None if column is None else column[rows] for column in statistics))  # type: ignore[arg-type]
        _take_rows(logits_NC[rows], columns_N[rows], part, temperature=temperature)


def merge(statistics: Statistics, group: "ProcessGroup | None", *, name: str | None) -> Softmax:
    """The softmax of every row from the statistics of all ranks of the group, which each gets alike.

    Raises:
        NonFiniteError: a row without a finite maximum; `name` says what the logits were made from. None: not looked at,
            so that the device need not be waited for; the log-prob of such a row is NaN.
    """
    own_top_N, mass_N, moment_N, at_target_N = statistics
    top_N = own_top_N.clone()
    if group is not None:
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
    total_N = summed(mass_N * (own_top_N - top_N).exp(), group)
    log_mass_N = total_N.log()
    if name is not None:
        check_rows(log_mass_N, name)
    entropy_N = None
    if moment_N is not None:
        _rebase_moment(moment_N, mass_N, own_top_N, top_N)
        entropy_N = log_mass_N - summed(moment_N, group) / total_N
    return Softmax(top_N, log_mass_N, summed(at_target_N, group) - top_N - log_mass_N, entropy_N)


def to_gradient(
    logits_NC: Tensor, columns_N: Tensor, rows: RowGradient, *, temperature: float, out_NC: Tensor | None = None
) -> None:
    """Overwrite a block of logits (or `out_NC`) with the gradient of the loss by them.

    d/dlogit_j = (weight (1[j = target] - p_j) - entropy_weight p_j (log p_j + entropy)) / temperature
    """
    if logits_NC.numel() == 0:
        return
    out_NC = logits_NC if out_NC is None else out_NC
    if use_triton(logits_NC):
        from align_algos import softmax_triton  # noqa: PLC0415

        contiguous_NC = _rows_contiguous(logits_NC)
        softmax_triton.to_gradient(contiguous_NC, columns_N, rows, temperature=temperature, out_NC=out_NC)
        return
    for chunk in row_chunks(logits_NC):
        part = RowGradient(*(None if column is None else column[chunk] for column in rows))  # type: ignore[arg-type]
        out_NC[chunk] = _gradient_of_rows(logits_NC[chunk], columns_N[chunk], part, temperature=temperature)


def use_triton(logits_NC: Tensor) -> bool:
    """Whether the Triton kernels run for this block."""
    return _HAS_TRITON and logits_NC.is_cuda and logits_NC.dtype != torch.float64


def _take_rows(logits_NC: Tensor, columns_N: Tensor, statistics: Statistics, *, temperature: float) -> None:
    top_N, mass_N, moment_N, at_target_N = statistics
    x_NC = logits_NC.to(top_N.dtype, copy=True).div_(temperature)
    here_N, column_N = _inside(columns_N, logits_NC.shape[1])
    at_target_N += torch.where(here_N, x_NC.gather(1, column_N[:, None])[:, 0], 0.0)
    new_top_N = torch.maximum(top_N, x_NC.amax(1))
    x_NC -= new_top_N[:, None]
    if moment_N is None:
        exp_NC = x_NC.exp_()
    else:
        exp_NC = x_NC.exp()
        _rebase_moment(moment_N, mass_N, top_N, new_top_N)
        moment_N += x_NC.masked_fill_(exp_NC == 0, 0.0).mul_(exp_NC).sum(1)
    mass_N *= (top_N - new_top_N).exp()
    mass_N += exp_NC.sum(1)
    top_N.copy_(new_top_N)


def _gradient_of_rows(logits_NC: Tensor, columns_N: Tensor, rows: RowGradient, *, temperature: float) -> Tensor:
    logprobs_NC = logits_NC.to(rows.top_N.dtype, copy=True).div_(temperature)
    logprobs_NC.sub_(rows.top_N[:, None]).sub_(rows.log_mass_N[:, None])
    if rows.entropy_N is None or rows.entropy_weight_N is None:
        grad_NC = logprobs_NC.exp_().mul_(-rows.weight_N[:, None])
    else:
        p_NC = logprobs_NC.exp()
        # 0 where p is 0, so that a logit of -inf gives 0 and not NaN.
        logprobs_NC.masked_fill_(p_NC == 0, 0.0).add_(rows.entropy_N[:, None]).mul_(rows.entropy_weight_N[:, None])
        grad_NC = logprobs_NC.add_(rows.weight_N[:, None]).mul_(p_NC).neg_()
    here_N, column_N = _inside(columns_N, logits_NC.shape[1])
    # One target a row, so indexing adds without collisions, in a fixed order (scatter_add has none on CUDA).
    grad_NC[torch.arange(len(grad_NC), device=grad_NC.device), column_N] += torch.where(here_N, rows.weight_N, 0.0)
    return grad_NC.div_(temperature)


def _rebase_moment(moment_N: Tensor, mass_N: Tensor, top_N: Tensor, new_top_N: Tensor) -> None:
    """The moment about a higher top, in place; `mass_N` is still about the old one."""
    shift_N = (top_N - new_top_N).clamp_min(LOWEST_SHIFT)
    moment_N += shift_N * mass_N
    moment_N *= shift_N.exp()


def row_chunks(logits_NC: Tensor) -> list[slice]:
    """Rows whose float32 copy is CHUNK_ELEMENTS at most."""
    step = max(1, CHUNK_ELEMENTS // logits_NC.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits_NC), step)]


def _rows_contiguous(logits_NC: Tensor) -> Tensor:
    """Itself, or a copy if the elements of a row do not follow each other."""
    return logits_NC if logits_NC.stride(1) == 1 else logits_NC.contiguous()


def _inside(columns_N: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    here_N = (columns_N >= 0) & (columns_N < columns)
    return here_N, torch.where(here_N, columns_N, 0)
