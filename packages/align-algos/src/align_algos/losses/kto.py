"""KTO: learn from single responses marked desirable or not. See PAPERS.md#kto.

Legend: B sequences, N flat tokens.
"""

import torch
from torch import Tensor

from align_algos import segments
from align_algos.checks import check_columns, check_count, check_flags, check_mask, check_number, check_offsets
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked


def kto_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    desirable_B: Tensor,
    beta: float,
    kl: float,
    num_sequences: int,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Weighted 1 - value of each response against the baseline `kl`, divided by `num_sequences`.

    r = sum over the response of (log pi - log ref);  z = max(kl, 0)
    value = sigmoid(beta (r - z)) where desirable, sigmoid(beta (z - r)) where not;  loss = weight (1 - value)

    Args:
        logprobs_N: floating [N], log pi(token) under the trained policy, nats.
        reference_logprobs_N: floating [N], the same under the frozen reference; a constant.
        mask_N: bool [N], True on response tokens.
        offsets: int64 [B+1].
        desirable_B: bool [B], whether the response is a wanted one.
        beta: strength of the pull to the reference, per nat.
        kl: nats per sequence, `kto_kl` summed over the *global* batch; negative estimates count as 0.
        num_sequences: responses in the global batch.
        desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U.
    Returns:
        metrics `desirable`: share of the responses; `desirable_reward` and `undesirable_reward`: sums of beta r over
        `num_sequences`; divide by the share (or 1 - share), once summed, for the means.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1 (the KTO loss).
    """
    check_number("beta", beta, low=0.0)
    check_number("desirable_weight", desirable_weight, low=0.0)
    check_number("undesirable_weight", undesirable_weight, low=0.0)
    check_number("kl", kl)
    ratio_B, divisor = _log_ratios(logprobs_N, reference_logprobs_N, mask_N, offsets, num_sequences)
    check_flags("desirable_B", desirable_B, ratio_B.shape[0])
    sign_B = torch.where(desirable_B, 1.0, -1.0).to(ratio_B.dtype)
    weight_B = torch.where(desirable_B, desirable_weight, undesirable_weight).to(ratio_B.dtype)
    # 1 - sigmoid(x) is sigmoid(-x), without the cancellation.
    loss_B = weight_B * torch.sigmoid(-sign_B * beta * (ratio_B - max(kl, 0.0)))
    rewards_B = beta * ratio_B.detach()
    metrics = {
        "desirable": desirable_B.sum() / divisor,
        "desirable_reward": torch.where(desirable_B, rewards_B, 0.0).sum() / divisor,
        "undesirable_reward": torch.where(desirable_B, 0.0, rewards_B).sum() / divisor,
    }
    return LossOutput(loss_B.sum() / divisor, metrics)


def kto_kl(
    logprobs_N: Tensor, reference_logprobs_N: Tensor, mask_N: Tensor, offsets: Tensor, *, num_sequences: int
) -> Tensor:
    """This micro-batch's share of the baseline of `kto_loss`: mean log-ratio of *mismatched* prompts and responses.

    The sequences here are prompts of the batch, each with the response of another prompt. Add the results of all
    micro-batches and ranks, then pass the sum as `kl`. No gradient.

    Args and Raises: as in `kto_loss`; `num_sequences` counts the mismatched sequences of the global batch.
    Returns: scalar, nats per sequence.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1 (z_0).
    """
    ratio_B, divisor = _log_ratios(logprobs_N.detach(), reference_logprobs_N, mask_N, offsets, num_sequences)
    return ratio_B.sum() / divisor


def _log_ratios(
    logprobs_N: Tensor, reference_logprobs_N: Tensor, mask_N: Tensor, offsets: Tensor, num_sequences: int
) -> tuple[Tensor, int]:
    check_columns("token", check_mask(mask_N), logprobs_N=logprobs_N, reference_logprobs_N=reference_logprobs_N)
    divisor = check_count("num_sequences", num_sequences, local=check_offsets(offsets, mask_N.shape[0]))
    return segments.sums(masked(logprobs_N, mask_N) - masked(reference_logprobs_N, mask_N).detach(), offsets), divisor
