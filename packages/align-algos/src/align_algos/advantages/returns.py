"""Discounted sum of the rewards still to come, without a value model. See PAPERS.md#reinforce.

Legend: N flat tokens.
"""

import torch
from torch import Tensor

from align_algos.advantages.gae import gae


def returns_to_go(rewards_N: Tensor, mask_N: Tensor, offsets: Tensor, *, gamma: float) -> Tensor:
    """reward_t + gamma reward_{t+1} + gamma^2 reward_{t+2} ... over the sequence's tokens inside the mask.

    Args:
        rewards_N: floating [N]; must be 0 outside the mask.
        mask_N: bool [N], True where the policy sampled the token.
        offsets: int64 [B+1].
        gamma: discount per token, in [0, 1].
    Returns: [N], 0 outside the mask, without gradient.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a reward outside the mask, which would be lost.
    Source: Williams 1992, "Simple statistical gradient-following algorithms"; as in Hu et al. 2025, arXiv:2501.03262.
    """
    return gae(rewards_N, torch.zeros_like(rewards_N), mask_N, offsets, gamma=gamma, lam=1.0).advantages_N
