"""Which part of the vocabulary a tensor-parallel rank holds, and the checks that all log-prob kernels share.

Legend: N flat tokens, V columns on this rank, C columns of those that are real tokens.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_algos.checks import check_positive
from align_algos.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VocabularySlice(NamedTuple):
    """The part of the vocabulary that this rank holds, and how to scale its logits."""

    first: int
    """Token id of column 0."""
    columns: int
    """C: columns that are real tokens; the rest is padding of the vocabulary."""
    vocab_size: int
    temperature: float
    group: "ProcessGroup | None"


def vocabulary_slice(
    columns: int, *, vocab_size: int | None, group: "ProcessGroup | None", temperature: float
) -> VocabularySlice:
    """The slice of this rank, where every rank of the group holds `columns` columns, in rank order.

    Raises:
        InputError: a temperature that is not positive, or a `vocab_size` that does not fit.
    """
    check_positive("temperature", temperature, hint=" (for greedy decoding use 1)")
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    vocab_size = columns * ranks if vocab_size is None else vocab_size
    if not 0 < vocab_size <= columns * ranks:
        raise InputError(f"vocab_size is {vocab_size}; expected 1 to {columns * ranks} = {ranks} x {columns} columns")
    first = rank * columns
    return VocabularySlice(first, min(max(vocab_size - first, 0), columns), vocab_size, temperature, group)


def own_columns(targets_N: Tensor, part: VocabularySlice) -> tuple[Tensor, Tensor]:
    """Whether this rank holds the target, and its column here (0 where it does not)."""
    column_N = targets_N.long() - part.first
    own_N = (column_N >= 0) & (column_N < part.columns)
    return own_N, torch.where(own_N, column_N, 0)


def summed(x_N: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Sum over the group, in place."""
    if group is not None:
        dist.all_reduce(x_N, op=dist.ReduceOp.SUM, group=group)
    return x_N


def check_matrix(name: str, x: Tensor) -> None:
    """The matrix is floating and has columns."""
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] == 0:
        raise InputError(
            f"{name} has shape {list(x.shape)} and dtype {x.dtype}; expected a floating point matrix with columns"
        )


def check_targets(targets_N: Tensor, length: int, vocab_size: int) -> None:
    """The targets are [length], integer and in the vocabulary."""
    if targets_N.dim() != 1 or targets_N.shape[0] != length:
        raise InputError(f"targets_N has shape {list(targets_N.shape)}; expected [{length}], one per row")
    if targets_N.is_floating_point() or targets_N.dtype == torch.bool:
        raise InputError(f"targets_N has dtype {targets_N.dtype}; expected an integer dtype")
    if length == 0:
        return
    low, high = targets_N.aminmax()
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"targets_N holds {int(low)} to {int(high)}; expected 0 to {vocab_size - 1} (where no loss is taken, "
            "put any valid id and mask the result)"
        )


def check_rows(log_mass_N: Tensor, name: str) -> None:
    """Every row had a finite maximum; `name` is what it was computed from."""
    finite_N = torch.isfinite(log_mass_N)
    if not bool(finite_N.all()):
        rows = (~finite_N).nonzero()[:, 0]
        raise NonFiniteError(f"{name} has NaN, +inf or nothing finite in {len(rows)} rows, the first is {int(rows[0])}")
