"""Policy loss of PPO: the clipped surrogate. See PAPERS.md#ppo-policy. Legend: N flat tokens."""

from torch import Tensor

from align_algos.checks import check_columns, check_count, check_mask, check_number
from align_algos.losses.output import LossOutput
from align_algos.ratios import exp_ratio
from align_algos.reductions import masked


def ppo_policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """Clipped surrogate objective of PPO, summed over the mask and divided by `num_tokens`.

    r = exp(logprobs - old_logprobs);  loss = sum max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) / num_tokens

    Args:
        logprobs_N: floating [N], log pi(token) under the trained policy, nats.
        old_logprobs_N: floating [N], the same under the policy that sampled, recomputed by the trainer; a constant.
        advantages_N: floating [N]; a constant.
        mask_N: bool [N], True where the policy sampled the token.
        num_tokens: tokens inside the mask in the *global* batch.
        clip_low: how far below 1 the ratio counts, in [0, 1].
        clip_high: how far above 1 the ratio counts.
    Returns:
        metrics `policy_loss`; `clip_fraction`: share of tokens where clipping removed the gradient; `entropy`: -log pi
        of the sampled tokens, an estimate; `approx_kl`: k3 estimate of KL(old || pi).
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    check_columns(
        "token",
        check_mask(mask_N),
        logprobs_N=logprobs_N,
        old_logprobs_N=old_logprobs_N,
        advantages_N=advantages_N,
    )
    check_number("clip_low", clip_low, low=0.0, high=1.0)
    check_number("clip_high", clip_high, low=0.0)
    divisor = check_count("num_tokens", num_tokens, local=int(mask_N.sum()))
    logprobs_N = masked(logprobs_N, mask_N)
    log_ratio_N = logprobs_N - masked(old_logprobs_N, mask_N).detach()
    advantages_N = masked(advantages_N, mask_N).detach()
    ratio_N = exp_ratio(log_ratio_N)
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = plain_N.maximum(clipped_N).sum() / divisor
    metrics = {
        "policy_loss": loss.detach(),
        "clip_fraction": (clipped_N > plain_N).sum() / divisor,
        "entropy": -logprobs_N.detach().sum() / divisor,
        "approx_kl": (ratio_N - 1.0 - log_ratio_N).detach().sum() / divisor,
    }
    return LossOutput(loss, metrics)
