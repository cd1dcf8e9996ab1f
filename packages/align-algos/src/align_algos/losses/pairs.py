"""What the preference losses share: log-ratios and rewards of chosen and rejected. Knows no loss.

Legend: B sequences, N flat tokens, P = B / 2 pairs; sequences alternate chosen (2i), rejected (2i + 1).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_algos import segments
from align_algos.checks import check_columns, check_count, check_mask, check_number, check_offsets
from align_algos.errors import InputError
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked


class Pairs(NamedTuple):
    """One number per response, in working precision, and the global number of pairs to divide by."""

    chosen_P: Tensor
    rejected_P: Tensor
    divisor: int
    whole_P: Tensor | None = None
    """bool; where False the pair has loss 0. None: every pair counts."""


def pair_log_ratios(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor | None,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_pairs: int,
    length_normalised: bool = False,
) -> Pairs:
    """Sum (or mean, with `length_normalised`) over each response of log pi - log ref, or of log pi without a reference.

    An empty response has log-ratio 0: it is as likely as under the reference. Without a reference 0 would be the
    log-probability of certainty, the best there is, so there a pair with an empty response is not `whole_P`, and has 0
    on both sides. The reference is a constant.

    Raises:
        InputError: a value that is not finite, a wrong shape, an odd number of sequences, or a count that is too small.
    """
    columns = {} if reference_logprobs_N is None else {"reference_logprobs_N": reference_logprobs_N}
    check_columns("token", check_mask(mask_N), logprobs_N=logprobs_N, **columns)
    num_sequences = check_offsets(offsets, mask_N.shape[0])
    if num_sequences % 2:
        raise InputError(f"offsets hold {num_sequences} sequences; expected an even number, chosen then rejected")
    divisor = check_count("num_pairs", num_pairs, local=num_sequences // 2)
    value_N = masked(logprobs_N, mask_N)
    if reference_logprobs_N is not None:
        value_N = value_N - masked(reference_logprobs_N, mask_N).detach()
    value_B, length_B = segments.sums(value_N, offsets), segments.lengths(mask_N, offsets)
    if length_normalised:
        value_B = value_B / length_B.clamp_min(1)
    chosen_P, rejected_P = value_B[0::2], value_B[1::2]
    if reference_logprobs_N is not None:
        return Pairs(chosen_P, rejected_P, divisor)
    whole_P = (length_B[0::2] > 0) & (length_B[1::2] > 0)
    return Pairs(torch.where(whole_P, chosen_P, 0.0), torch.where(whole_P, rejected_P, 0.0), divisor, whole_P)


def smoothed_sigmoid(margin_P: Tensor, *, label_smoothing: float) -> Tensor:
    """-(1 - label_smoothing) logsigmoid(margin) - label_smoothing logsigmoid(-margin), of each pair."""
    check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    return -(1.0 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def pair_output(loss_P: Tensor, pairs: Pairs, *, beta: float) -> LossOutput:
    """Sum of the pairs' losses over the global count, with the metrics of implicit rewards: beta times the log-ratio.

    Metrics `accuracy`: share of pairs whose chosen reward is the higher one (equal is wrong); `margin`: mean difference
    of rewards; `chosen_reward` and `rejected_reward`: means.
    """
    if pairs.whole_P is not None:
        loss_P = torch.where(pairs.whole_P, loss_P, 0.0)
    chosen_P, rejected_P = beta * pairs.chosen_P.detach(), beta * pairs.rejected_P.detach()
    metrics = {
        "accuracy": (pairs.chosen_P > pairs.rejected_P).sum() / pairs.divisor,
        "margin": (chosen_P - rejected_P).sum() / pairs.divisor,
        "chosen_reward": chosen_P.sum() / pairs.divisor,
        "rejected_reward": rejected_P.sum() / pairs.divisor,
    }
    return LossOutput(loss_P.sum() / pairs.divisor, metrics)
