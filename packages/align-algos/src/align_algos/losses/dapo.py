"""DAPO: clip-higher and the mean over all tokens, no KL term. See PAPERS.md#dapo.

Its other halves are elsewhere: the sampling filter is `advantages.mixed_groups`, the length penalty
`shaping.overlong_penalty`. Legend: N flat tokens.
"""

from torch import Tensor

from align_algos.losses.output import LossOutput
from align_algos.losses.ppo_policy import ppo_policy_loss


def dapo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    weights_N: Tensor | None = None,
) -> LossOutput:
    """`ppo_policy_loss` with the paper's clip range: tokens of low probability have room to rise.

    Args, Returns and Raises: as in `ppo_policy_loss`, with group-normalised advantages.
    Source: Yu et al. 2025, arXiv:2503.14476, eq. 8 to 10; the clip range: section 4.1.
    """
    return ppo_policy_loss(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        mask_N,
        num_tokens=num_tokens,
        clip_low=clip_low,
        clip_high=clip_high,
        weights_N=weights_N,
    )
