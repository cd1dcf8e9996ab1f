"""From padded tensors to the flat ones of this package, and back. Differentiable; the padding may sit on any side.

Legend: B sequences, L padded length, N flat tokens.
"""

import torch
from torch import Tensor

from align_algos.errors import InputError


def flatten(present_BL: Tensor, *columns_BL: Tensor) -> tuple[Tensor, ...]:
    """Each padded column as a flat one: row by row, what is present. Padding reaches neither value nor gradient.

    Args:
        present_BL: bool [B, L], True where there is a token (the attention mask, prompt included).
        columns_BL: [B, L] each, any dtype; NaN in the padding does no harm.
    Returns: one [N] for each column, in the same order. The loss mask is a column like any other.
    Raises:
        InputError: a wrong shape or dtype.
    """
    _check_present(present_BL)
    for number, column_BL in enumerate(columns_BL):
        if column_BL.shape != present_BL.shape:
            raise InputError(
                f"column {number} has shape {list(column_BL.shape)}; expected {list(present_BL.shape)} as present_BL"
            )
    return tuple(column_BL[present_BL] for column_BL in columns_BL)


def padded_offsets(present_BL: Tensor) -> Tensor:
    """Where each sequence begins in the flat columns.

    Args:
        present_BL: bool [B, L], True where there is a token.
    Returns: int64 [B+1].
    Raises:
        InputError: a wrong shape or dtype.
    """
    _check_present(present_BL)
    lengths_B = present_BL.sum(1)
    return torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])


def unflatten(x_N: Tensor, present_BL: Tensor, *, fill: float = 0.0) -> Tensor:
    """A flat column as [B, L], with `fill` in the padding; the inverse of `flatten`.

    Args:
        x_N: [N], any dtype and any values.
        present_BL: bool [B, L], True where there is a token.
        fill: in the dtype of `x_N`.
    Returns: [B, L], the dtype of `x_N`.
    Raises:
        InputError: a wrong shape, or a `present_BL` that is not bool.
    """
    _check_present(present_BL)
    length = int(present_BL.sum())
    if x_N.shape != (length,):
        raise InputError(f"x_N has shape {list(x_N.shape)}; expected [{length}], one value per token")
    return x_N.new_full(present_BL.shape, fill).masked_scatter(present_BL, x_N)


def _check_present(present_BL: Tensor) -> None:
    if present_BL.dim() != 2 or present_BL.dtype != torch.bool:
        raise InputError(
            f"present_BL has shape {list(present_BL.shape)} and dtype {present_BL.dtype}; expected torch.bool [B, L]"
        )
