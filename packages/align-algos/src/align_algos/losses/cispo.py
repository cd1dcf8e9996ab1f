"""CISPO: REINFORCE whose importance weight, not whose gradient, is clipped. See PAPERS.md#cispo.

Legend: N flat tokens.
"""

from torch import Tensor

from align_algos.checks import check_number
from align_algos.losses.output import LossOutput
from align_algos.losses.policy_terms import policy_metrics, policy_terms, weighted
from align_algos.ratios import exp_ratio


def cispo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_high: float,
    clip_low: float = 1.0,
    weights_N: Tensor | None = None,
) -> LossOutput:
    """- stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log pi, summed over the mask, divided by `num_tokens`.

    Every token keeps a gradient, also those beyond the clip.

    Args:
        clip_high: the weight is at most 1 + clip_high.
        clip_low: the weight is at least 1 - clip_low; 1 sets no lower bound, as the paper does.
        Others and Raises: as in `ppo_policy_loss`.
    Returns:
        the metrics of `ppo_policy_loss`; `clip_fraction`: share of tokens whose weight was clipped.
    Source: MiniMax 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    check_number("clip_low", clip_low, low=0.0, high=1.0)
    check_number("clip_high", clip_high, low=0.0)
    terms = policy_terms(logprobs_N, old_logprobs_N, advantages_N, mask_N, num_tokens=num_tokens, weights_N=weights_N)
    ratio_N = exp_ratio(terms.log_ratio_N.detach())
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_N = -clipped_N * terms.advantages_N * terms.logprobs_N
    loss = weighted(loss_N, terms).sum() / terms.divisor
    return LossOutput(loss, policy_metrics(loss, terms, clipped_N != ratio_N))
