"""Generalised advantage estimation on ragged sequences. See PAPERS.md#gae.

Legend: B sequences, N flat tokens, M tokens inside the mask, L longest number of them in a sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from align_algos.checks import check_columns, check_mask, check_number, check_offsets
from align_algos.errors import InputError
from align_algos.reductions import segment_lengths, working_precision


class GaeOutput(NamedTuple):
    """Advantages and value targets, 0 outside the mask, without gradient."""

    advantages_N: Tensor
    returns_N: Tensor


def gae(rewards_N: Tensor, values_N: Tensor, mask_N: Tensor, offsets: Tensor, *, gamma: float, lam: float) -> GaeOutput:
    """Exponentially weighted sum of temporal-difference errors, per sequence, over the tokens inside the mask.

    delta_t = reward_t + gamma value_{t+1} - value_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + value_t

    t + 1 is the next token *inside the mask*, so prompt and observation tokens are stepped over; after the last one
    value and advantage are 0.

    Args:
        rewards_N: floating [N]; must be 0 outside the mask.
        values_N: floating [N], the value before the token is chosen.
        mask_N: bool [N], True where the policy sampled the token.
        offsets: int64 [B+1].
        gamma: discount per token, in [0, 1].
        lam: weight of longer estimates, in [0, 1].
    Raises:
        InputError: a value that is not finite, a wrong shape, or a reward outside the mask, which would be lost.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    check_columns("token", check_mask(mask_N), rewards_N=rewards_N, values_N=values_N)
    check_number("gamma", gamma, low=0.0, high=1.0)
    check_number("lam", lam, low=0.0, high=1.0)
    check_offsets(offsets, mask_N.shape[0])
    lost_N = (rewards_N != 0) & ~mask_N
    if bool(lost_N.any()):
        raise InputError(f"rewards_N is not 0 outside mask_N at position {int(lost_N.nonzero()[0])}; it would be lost")
    steps_B = segment_lengths(mask_N, offsets)
    # Right-padded only inside this function: the recursion runs over time once, for all sequences together.
    inside_BL = torch.arange(int(steps_B.max()) if len(steps_B) else 0, device=mask_N.device) < steps_B[:, None]
    rewards_BL = _padded(rewards_N[mask_N], inside_BL)
    values_BL = _padded(values_N[mask_N], inside_BL)
    advantages_BL = _recursion(rewards_BL, values_BL, gamma=gamma, decay=gamma * lam)
    advantages_N = advantages_BL.new_zeros(mask_N.shape)
    advantages_N[mask_N] = advantages_BL[inside_BL]
    returns_N = torch.where(mask_N, advantages_N + values_N.detach(), 0.0)
    return GaeOutput(advantages_N, returns_N)


def _padded(x_M: Tensor, inside_BL: Tensor) -> Tensor:
    x_M = working_precision(x_M.detach())
    return x_M.new_zeros(inside_BL.shape).masked_scatter(inside_BL, x_M)


def _recursion(rewards_BL: Tensor, values_BL: Tensor, *, gamma: float, decay: float) -> Tensor:
    """Padding holds reward 0 and value 0, so the advantage stays 0 until the last real token is reached."""
    advantages_BL = torch.zeros_like(values_BL)
    next_value_B = next_advantage_B = values_BL.new_zeros(values_BL.shape[0])
    for t in range(values_BL.shape[1] - 1, -1, -1):
        delta_B = rewards_BL[:, t] + gamma * next_value_B - values_BL[:, t]
        next_advantage_B = delta_B + decay * next_advantage_B
        next_value_B = values_BL[:, t]
        advantages_BL[:, t] = next_advantage_B
    return advantages_BL
