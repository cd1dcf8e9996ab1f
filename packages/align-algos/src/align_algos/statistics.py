"""Number, mean, spread and extremes of values, taken in parts that merge: micro-batches, ranks, or batches over time.

Sums of squares would cancel: values near 1e5 that differ by 1e-4 have a variance of 1e-8 between squares of 1e10. So
the distances to the mean are kept.

Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

Legend: N flat tokens, P parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align_algos.checks import check_columns, check_mask
from align_algos.errors import InputError


class Moments(NamedTuple):
    """Of some values, float64 scalars, all 0 of none. Those of parts become those of the whole in `merge_moments`."""

    number: Tensor
    mean: Tensor
    square: Tensor
    """Sum of the squared distances to the mean; exactly 0 where all values are equal."""
    lowest: Tensor
    highest: Tensor

    @property
    def variance(self) -> Tensor:
        """Of the population."""
        return self.square / self.number.clamp_min(1.0)


def moments(x_N: Tensor, mask_N: Tensor) -> Moments:
    """Of the values inside the mask, without gradient.

    Args:
        x_N: floating [N].
        mask_N: bool [N].
    Raises:
        InputError: a value that is not finite, or a wrong shape.
    """
    check_columns("token", check_mask(mask_N), x_N=x_N)
    x_N = x_N.detach().double()
    return _whole(Moments(mask_N.double(), x_N, torch.zeros_like(x_N), x_N, x_N))


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Of all values of the parts together, whatever their order. Over ranks: gather the five numbers of each first.

    Args:
        parts: on one device; one at least, of no values or more.
    Raises:
        InputError: no part at all.
    """
    if not parts:
        raise InputError("parts is empty; expected the moments of at least one part")
    return _whole(Moments(*(torch.stack(column) for column in zip(*parts, strict=True))))


def _whole(parts_P: Moments) -> Moments:
    """One from columns [P]; those of number 0 take no part."""
    there_P = parts_P.number > 0
    number = parts_P.number.sum()
    if not len(there_P):
        return Moments(number, number, number, number, number)
    mean_P = torch.where(there_P, parts_P.mean, 0.0)
    lowest = torch.where(number > 0, torch.where(there_P, parts_P.lowest, math.inf).amin(), 0.0)
    highest = torch.where(number > 0, torch.where(there_P, parts_P.highest, -math.inf).amax(), 0.0)
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1: that all are equal is found by comparing, and then nothing is left to rounding.
    mean = torch.where(lowest == highest, lowest, (parts_P.number * mean_P).sum() / number.clamp_min(1.0))
    apart_P = torch.where(there_P, parts_P.square + parts_P.number * (mean_P - mean).square(), 0.0)
    return Moments(number, mean, apart_P.sum(), lowest, highest)
