"""RLOO: REINFORCE on whole sequences with a leave-one-out baseline. See PAPERS.md#rloo.

The baseline is in the advantages (`align_algos.advantages.leave_one_out`). Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos.losses.output import LossOutput
from align_algos.losses.sequence_surrogate import sequence_surrogate


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
        mean_ratio=False,
    )
