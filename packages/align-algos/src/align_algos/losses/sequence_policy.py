"""Clipped surrogate on one ratio per *sequence*: GSPO (mean log-ratio) and RLOO (summed log-ratio).

See PAPERS.md#gspo and PAPERS.md#rloo. Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos.checks import check_count, check_offsets
from align_algos.losses.output import LossOutput
from align_algos.losses.policy_terms import clipped_surrogate, policy_metrics, policy_terms
from align_algos.ratios import exp_ratio
from align_algos.reductions import masked, per_token, segment_lengths, segment_sum


def gspo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights_N: Tensor | None = None,
) -> LossOutput:
    """Group sequence policy optimisation: the ratio is the geometric mean of the sequence's token ratios.

    s = exp(mean over the sequence of (log pi - log old));  loss = sum max(-A s, -A clip(s)) / num_sequences

    Args:
        advantages_N: floating [N], the sequence's advantage on each of its tokens (their mean is used); a constant.
        num_tokens: tokens inside the mask in the global batch; divides the metrics only.
        num_sequences: sequences in the global batch; those without a token inside the mask count and add 0.
        clip_low, clip_high: how far below and above 1 the sequence ratio counts (defaults: the paper's).
        weights_N: floating [N], from `correction`, the mean over the sequence multiplies its loss; a constant.
        Others: as in `ppo_policy_loss`.
    Returns:
        the metrics of `ppo_policy_loss`; `clip_fraction` counts the tokens of clipped sequences.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7; the clip range: section 5.1.
    """
    return _sequence_policy_loss(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        mask_N,
        offsets,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        clip_low=clip_low,
        clip_high=clip_high,
        weights_N=weights_N,
        mean_ratio=True,
    )


def rloo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights_N: Tensor | None = None,
) -> LossOutput:
    """REINFORCE on whole sequences, with the clipped ratio pi(y) / old(y) for steps after the first.

    s = exp(sum over the sequence of (log pi - log old));  loss = sum max(-A s, -A clip(s)) / num_sequences

    On policy s is 1 and the gradient is the paper's: - A grad log pi(y).

    Args:
        advantages_N: floating [N], from `advantages.leave_one_out`, the same on each token of a sequence; a constant.
        Others, Returns and Raises: as in `gspo_loss`.
    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 3; the ratio: as in TRL's RLOO trainer.
    """
    return _sequence_policy_loss(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        mask_N,
        offsets,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        clip_low=clip_low,
        clip_high=clip_high,
        weights_N=weights_N,
        mean_ratio=False,
    )


def _sequence_policy_loss(
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
    terms = policy_terms(logprobs_N, old_logprobs_N, advantages_N, mask_N, num_tokens=num_tokens, weights_N=weights_N)
    divisor = check_count("num_sequences", num_sequences, local=check_offsets(offsets, mask_N.shape[0]))
    length_B = segment_lengths(mask_N, offsets).clamp_min(1)
    log_ratio_B = segment_sum(terms.log_ratio_N, offsets)
    advantages_B = segment_sum(terms.advantages_N, offsets) / length_B
    loss_B, removed_B = clipped_surrogate(
        exp_ratio(log_ratio_B / length_B if mean_ratio else log_ratio_B),
        advantages_B,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    if terms.weights_N is not None:
        loss_B = loss_B * (segment_sum(terms.weights_N, offsets) / length_B)
    loss = loss_B.sum() / divisor
    removed_N = masked(per_token(removed_B.to(loss.dtype), offsets), mask_N)
    return LossOutput(loss, policy_metrics(loss, terms, removed_N))
