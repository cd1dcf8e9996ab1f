"""REINFORCE++: the clipped surrogate on globally normalised advantages, without a critic. See PAPERS.md#reinforce.

What makes it REINFORCE++ is in the advantages: `advantages.returns_to_go` of rewards with the KL inside, then `whiten`
over the global batch; with a baseline, `group_normalised(std=False)` before `whiten`. Legend: N flat tokens.
"""

from torch import Tensor

from align_algos.losses.grpo import grpo_loss
from align_algos.losses.output import LossOutput


def reinforce_pp_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    weights_N: Tensor | None = None,
) -> LossOutput:
    """`ppo_policy_loss`, plus for the variant with a baseline the k2 estimate of KL(pi || reference) in the loss.

    Args:
        advantages_N: floating [N], whitened over the global batch; a constant.
        reference_logprobs_N, kl_coef: only of the variant with a baseline; the plain one has its KL in the reward.
        Others, Returns and Raises: as in `grpo_loss`.
    Source: Hu et al. 2025, arXiv:2501.03262, section 3.
    """
    return grpo_loss(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        mask_N,
        num_tokens=num_tokens,
        clip_low=clip_low,
        clip_high=clip_high,
        reference_logprobs_N=reference_logprobs_N,
        kl_coef=kl_coef,
        kl_estimator="k2",
        weights_N=weights_N,
    )
