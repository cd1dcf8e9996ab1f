"""Advantages from rewards alone, by comparison within a group of completions of one prompt.

Knows nothing about tokens; `align_algos.reductions.per_token` gives each token its sequence's advantage.
See PAPERS.md#grpo, PAPERS.md#rloo and PAPERS.md#dapo.

Legend: B sequences, G groups.
"""

import torch
from torch import Tensor

from align_algos.checks import check_columns, check_groups, check_number
from align_algos.reductions import working_precision

# The tutorial's. Far below any spread of real rewards; it only keeps those of nearly equal rewards from exploding.
STD_EPS = 1e-5


def group_normalised(rewards_B: Tensor, group_B: Tensor, *, eps: float = STD_EPS, std: bool = True) -> Tensor:
    """(reward - mean of the group) / (population standard deviation of the group + eps).

    A group whose rewards are all equal, and so a group of one, gets exactly 0.

    Args:
        rewards_B: floating [B].
        group_B: integer [B]; sequences with the same id form a group, in any order. All of a group must be here.
        eps: added to the standard deviation, in units of reward.
        std: False leaves the division out (Dr. GRPO).
    Returns:
        [B], float32 (float64 for float64 rewards).
    Raises:
        InputError: a value that is not finite, or a wrong shape.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without std: Liu et al. 2025, arXiv:2503.20783,
        section 3.2.
    """
    check_number("eps", eps, low=0.0)
    centred_B, index_B, size_G = _centre(rewards_B, group_B)
    if not std:
        return _result(centred_B, rewards_B)
    variance_G = torch.zeros_like(size_G).index_add(0, index_B, centred_B.square()) / size_G
    # A tied group has 0 above the line; dividing by 1 there keeps it 0 for eps = 0 as well.
    scale_G = torch.where(variance_G > 0, variance_G.sqrt() + eps, 1.0)
    return _result(centred_B / scale_G[index_B], rewards_B)


def leave_one_out(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """reward - mean of the *other* rewards of the group.

    Equals n / (n - 1) times the distance to the mean of all n. A group of one has no others and gets exactly 0, as
    does a group whose rewards are all equal.

    Args:
        rewards_B: floating [B].
        group_B: integer [B]; sequences with the same id form a group, in any order. All of a group must be here.
    Returns:
        [B], float32 (float64 for float64 rewards).
    Raises:
        InputError: a value that is not finite, or a wrong shape.
    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", eq. 9; Ahmadian et al. 2024,
        arXiv:2402.14740, section 3.3.
    """
    centred_B, index_B, size_G = _centre(rewards_B, group_B)
    return _result(centred_B * (size_G / (size_G - 1).clamp_min(1))[index_B], rewards_B)


def mixed_groups(rewards_B: Tensor, group_B: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Which sequences belong to a group with differing rewards: those from which a group advantage can learn.

    The filter of dynamic sampling: keep sampling until enough groups are mixed. A group of one never is.

    Args:
        rewards_B: floating [B].
        group_B: integer [B]; sequences with the same id form a group, in any order. All of a group must be here.
        tolerance: rewards that differ by no more than this count as equal.
    Returns: bool [B].
    Raises:
        InputError: a value that is not finite, or a wrong shape.
    Source: Yu et al. 2025, arXiv:2503.14476, eq. 11.
    """
    check_number("tolerance", tolerance, low=0.0)
    _check(rewards_B, group_B)
    _, index_B, size_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    highest_G, lowest_G = _extremes(rewards_B.detach().double(), index_B, size_G)
    return (highest_G - lowest_G > tolerance)[index_B]


def _check(rewards_B: Tensor, group_B: Tensor) -> None:
    check_columns("sequence", rewards_B.numel(), rewards_B=rewards_B)
    check_groups(group_B, rewards_B.numel())


def _extremes(rewards_B: Tensor, index_B: Tensor, size_G: Tensor) -> tuple[Tensor, Tensor]:
    zeros_G = torch.zeros_like(size_G, dtype=rewards_B.dtype)
    highest_G = zeros_G.scatter_reduce(0, index_B, rewards_B, "amax", include_self=False)
    return highest_G, zeros_G.scatter_reduce(0, index_B, rewards_B, "amin", include_self=False)


def _centre(rewards_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less the mean of their group (exactly 0 in a tied group), index of the group of each, sizes; float64."""
    _check(rewards_B, group_B)
    _, index_B, size_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    rewards_B = rewards_B.detach().double()
    size_G = size_G.double()
    zeros_G = torch.zeros_like(size_G)
    mean_G = zeros_G.index_add(0, index_B, rewards_B) / size_G
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1: ties are found by comparing, not by subtracting.
    highest_G, lowest_G = _extremes(rewards_B, index_B, size_G)
    mean_G = torch.where(highest_G == lowest_G, highest_G, mean_G)
    return rewards_B - mean_G[index_B], index_B, size_G


def _result(advantages_B: Tensor, rewards_B: Tensor) -> Tensor:
    return advantages_B.to(working_precision(rewards_B).dtype)
