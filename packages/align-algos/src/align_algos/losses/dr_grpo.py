"""Dr. GRPO: GRPO without its two biases, towards long answers and towards easy or hard prompts. See PAPERS.md#dr-grpo.

Its other half is in the advantages: `group_normalised(..., std=False)`. Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos.losses.grpo import grpo_loss
from align_algos.losses.output import LossOutput


def dr_grpo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    length: float,
    clip_low: float,
    clip_high: float,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    weights_N: Tensor | None = None,
) -> LossOutput:
    """`grpo_loss` summed over tokens and divided by a constant `length` per sequence, whatever its own length.

    Args:
        advantages_N: floating [N], reward less the mean of the group, not divided by its spread; a constant.
        num_tokens: tokens inside the mask in the global batch; divides the metrics only.
        num_sequences: sequences in the global batch.
        length: tokens; a constant of the run, such as the longest completion allowed.
        Others, Returns and Raises: as in `grpo_loss`.
    Source: Liu et al. 2025, arXiv:2503.20783, section 3.2 and figure 1.
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
        weights_N=weights_N,
        reduction="sequence_sum",
        offsets=offsets,
        num_sequences=num_sequences,
        length=length,
    )
