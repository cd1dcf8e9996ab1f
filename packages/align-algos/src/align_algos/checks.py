"""Refuse what a formula cannot mean, by the argument's name, before any arithmetic. Knows nothing about the formulas.

A loss that meets a NaN, a shifted column or a wrong count still returns a number; these checks make it stop instead.
Reading a number waits for the device, so a loss reads once for all its columns per token and their count
(`check_tokens`), and once more for offsets that are there.

Legend: B sequences, N flat tokens.
"""

import itertools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from align_algos.errors import InputError, NonFiniteError


def check_columns(length_of: str, length: int, /, **columns: Tensor) -> None:
    """Every column is [length], floating point and finite; it holds one value per `length_of`, named in the error."""
    _check_shapes(length_of, length, columns)
    _read(columns)


def check_tokens(mask_N: Tensor, num_tokens: int, /, **columns: Tensor) -> int:
    """The columns are right for this mask, and `num_tokens` for its number of tokens; returns a safe divisor."""
    _check_shapes("token", check_mask(mask_N), columns)
    (inside,) = _read(columns, mask_N.sum())
    return check_count("num_tokens", num_tokens, local=inside)


def _check_shapes(length_of: str, length: int, columns: dict[str, Tensor]) -> None:
    for name, column in columns.items():
        if column.dim() != 1 or column.shape[0] != length:
            raise InputError(f"{name} has shape {list(column.shape)}; expected [{length}], one value per {length_of}")
        if not column.is_floating_point():
            raise InputError(f"{name} has dtype {column.dtype}; expected a floating point dtype")


def check_mask(mask_N: Tensor) -> int:
    """The mask is bool and one-dimensional; returns its length N."""
    if mask_N.dim() != 1:
        raise InputError(f"mask_N has shape {list(mask_N.shape)}; expected [N], flat over the tokens of all sequences")
    if mask_N.dtype != torch.bool:
        raise InputError(f"mask_N has dtype {mask_N.dtype}; expected torch.bool (use mask != 0)")
    return mask_N.shape[0]


def check_offsets(offsets: Tensor, num_tokens: int | None) -> int:
    """The offsets are [B+1], integer, start at 0, never fall and end at `num_tokens` (None: anywhere); returns B."""
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise InputError(f"offsets has shape {list(offsets.shape)}; expected [B+1]")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise InputError(f"offsets has dtype {offsets.dtype}; expected int64 or int32")
    bounds = offsets.tolist()
    num_tokens = bounds[-1] if num_tokens is None else num_tokens
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise InputError(
            f"offsets go from {bounds[0]} to {bounds[-1]}; expected 0 to {num_tokens}, the number of tokens"
        )
    if any(stop < start for start, stop in itertools.pairwise(bounds)):
        raise InputError(f"offsets must not fall, but hold {bounds}")
    return len(bounds) - 1


def check_groups(group_B: Tensor, length: int) -> None:
    """The group ids are [B] and integer."""
    if group_B.dim() != 1 or group_B.shape[0] != length:
        raise InputError(f"group_B has shape {list(group_B.shape)}; expected [{length}], one id per sequence")
    if group_B.is_floating_point() or group_B.is_complex() or group_B.dtype == torch.bool:
        raise InputError(f"group_B has dtype {group_B.dtype}; expected an integer dtype")


def check_count(name: str, count: int, *, local: int) -> int:
    """A global count is an integer of at least `local`, the count in this micro-batch; returns a safe divisor.

    A count of 0 is accepted only where there is nothing to divide: an empty batch has loss 0, not 0/0.
    """
    try:
        count = operator.index(count)
    except TypeError:
        raise InputError(f"{name} is {count!r}; expected an integer") from None
    if count < local:
        raise InputError(
            f"{name} is {count}, but this micro-batch alone has {local}; pass the count of the whole batch, "
            "over all micro-batches and data-parallel ranks"
        )
    return max(count, 1)


def check_number(name: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """A number is finite and within [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        error = InputError if math.isfinite(value) else NonFiniteError
        raise error(f"{name} is {value}; expected a finite number in [{low:g}, {high:g}]")


def check_positive(name: str, value: float, *, hint: str = "") -> None:
    """A number is finite and above 0."""
    check_number(name, value, low=0.0)
    if value == 0:
        raise InputError(f"{name} is 0; expected a positive number{hint}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """A word is one of the choices."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}; choose one of {sorted(choices)}")


def check_flags(name: str, flags_B: Tensor, length: int) -> None:
    """The flags are [B] and bool."""
    if flags_B.dim() != 1 or flags_B.shape[0] != length:
        raise InputError(f"{name} has shape {list(flags_B.shape)}; expected [{length}], one per sequence")
    if flags_B.dtype != torch.bool:
        raise InputError(f"{name} has dtype {flags_B.dtype}; expected torch.bool")


def check_integers(name: str, x: Tensor, length: int) -> None:
    """The column is [length] and integer."""
    if x.dim() != 1 or x.shape[0] != length:
        raise InputError(f"{name} has shape {list(x.shape)}; expected [{length}]")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"{name} has dtype {x.dtype}; expected an integer dtype")


def _read(columns: dict[str, Tensor], *counts: Tensor) -> list[int]:
    """The columns are finite; returns the counts."""
    if not columns and not counts:
        return []
    finite = [torch.isfinite(column).all() for column in columns.values()]
    values: list[int] = torch.stack([x.long() for x in (*finite, *counts)]).tolist()
    for (name, column), good in zip(columns.items(), values):
        if not good:
            where = int((~torch.isfinite(column)).nonzero()[0])
            total = int((~torch.isfinite(column)).sum())
            raise NonFiniteError(
                f"{name} holds {column[where].item()} at position {where} ({total} of {len(column)} values are not "
                "finite); positions outside the mask must be finite too: fill them with 0"
            )
    return values[len(columns) :]
