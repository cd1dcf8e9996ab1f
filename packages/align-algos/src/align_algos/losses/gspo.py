"""GSPO: the clipped surrogate on one ratio per sequence, the geometric mean of its tokens'. See PAPERS.md#gspo.

Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos.losses.output import LossOutput
from align_algos.losses.sequence_surrogate import sequence_surrogate


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
    return sequence_surrogate(
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
