"""What GSPO and RLOO share: the clipped surrogate on one ratio per *sequence*.

Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos import segments
from align_algos.checks import check_count, check_offsets
from align_algos.losses.output import LossOutput
from align_algos.losses.policy_terms import clipped_surrogate, policy_metrics, policy_terms


def sequence_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    clip_low: float,
    clip_high: float,
    weights_N: Tensor | None,
    mean_ratio: bool,
) -> LossOutput:
    """s = exp(mean or sum over the sequence of the log-ratio);  loss = sum max(-A s, -A clip(s)) / num_sequences.

    Args and Returns: as in `gspo.gspo_loss`; `mean_ratio` says whether the log-ratio is the mean or the sum.
    """
    terms = policy_terms(logprobs_N, old_logprobs_N, advantages_N, mask_N, num_tokens=num_tokens, weights_N=weights_N)
    divisor = check_count("num_sequences", num_sequences, local=check_offsets(offsets, mask_N.shape[0]))
    length_B = segments.lengths(mask_N, offsets).clamp_min(1)
    log_ratio_B = segments.sums(terms.log_ratio_N, offsets)
    advantages_B = segments.sums(terms.advantages_N, offsets) / length_B
    loss_B, removed_B = clipped_surrogate(
        log_ratio_B / length_B if mean_ratio else log_ratio_B,
        advantages_B,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    if terms.weights_N is not None:
        loss_B = loss_B * (segments.sums(terms.weights_N, offsets) / length_B)
    loss = loss_B.sum() / divisor
    removed_N = segments.spread(removed_B, offsets, mask_N.shape[0]) & mask_N
    return LossOutput(loss, policy_metrics(loss, terms, removed_N))
