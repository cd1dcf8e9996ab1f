"""Policy loss of PPO: the clipped surrogate, optionally dual-clipped. See PAPERS.md#ppo-policy.

Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos.losses.output import LossOutput
from align_algos.losses.policy_terms import clipped_policy, policy_terms
from align_algos.reductions import Reduction, reducer


def ppo_policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights_N: Tensor | None = None,
    reduction: Reduction = "token_mean",
    offsets: Tensor | None = None,
    num_sequences: int | None = None,
    length: float = 1.0,
) -> LossOutput:
    """Clipped surrogate objective of PPO, by default summed over the mask and divided by `num_tokens`.

    r = exp(logprobs - old_logprobs);  loss = sum max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) / num_tokens

    Args:
        logprobs_N: floating [N], log pi(token) under the trained policy, nats.
        old_logprobs_N: floating [N], the same under the policy that sampled, recomputed by the trainer; a constant.
        advantages_N: floating [N]; a constant.
        mask_N: bool [N], True where the policy sampled the token.
        num_tokens: tokens inside the mask in the *global* batch.
        clip_low: how far below 1 the ratio counts, in [0, 1].
        clip_high: how far above 1 the ratio counts.
        dual_clip: for A < 0 the loss is at most -A dual_clip; above 1 + clip_high (3 in the paper). None: no bound.
        weights_N: floating [N], from `correction`: multiplies each token's loss; a constant. None: all 1.
        reduction, offsets, num_sequences, length: as in `reductions.reduce_tokens`.
    Returns:
        metrics `policy_loss`; `clip_fraction`: share of tokens without gradient, because of the clip or because their
        ratio is beyond e^30 (`ratios.MAX_LOG_RATIO`); `entropy`: -log pi of the sampled tokens, an estimate;
        `approx_kl`: k3 estimate of KL(old || pi).
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2019, arXiv:1912.09729.
    """
    terms = policy_terms(logprobs_N, old_logprobs_N, advantages_N, mask_N, num_tokens=num_tokens, weights_N=weights_N)
    reduce = reducer(mask_N, terms.divisor, reduction, offsets=offsets, num_sequences=num_sequences, length=length)
    return clipped_policy(terms, reduce, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
