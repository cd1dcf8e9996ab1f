"""Direct preference optimisation, sigmoid form with label smoothing. See PAPERS.md#dpo.

Legend: B sequences, N flat tokens; sequences alternate chosen (2i), rejected (2i + 1).
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_algos.checks import check_columns, check_count, check_mask, check_number, check_offsets
from align_algos.errors import InputError
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked, segment_sum


def dpo_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    beta: float,
    num_pairs: int,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Sigmoid preference loss on the implicit rewards of chosen and rejected, divided by `num_pairs`.

    reward(y) = beta * sum over the response of (log pi - log ref);  x = reward(chosen) - reward(rejected)
    loss = - ((1 - label_smoothing) logsigmoid(x) + label_smoothing logsigmoid(-x)) / num_pairs

    Args:
        logprobs_N: floating [N], log pi(token i | tokens before it) under the trained policy, nats.
        reference_logprobs_N: floating [N], the same under the frozen reference; treated as a constant.
        mask_N: bool [N], True on response tokens.
        offsets: int64 [B+1], B even: chosen and rejected of a pair follow each other.
        beta: strength of the pull to the reference, per nat.
        num_pairs: pairs in the global batch.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5].
    Returns:
        metrics `accuracy`: share of pairs with x > 0; `margin`: mean x; `chosen_reward` and `rejected_reward`: means.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing (cDPO): Mitchell 2023, eq. 3 of
        https://ericmitchell.ai/cdpo.pdf.
    """
    check_columns("token", check_mask(mask_N), logprobs_N=logprobs_N, reference_logprobs_N=reference_logprobs_N)
    check_number("beta", beta, low=0.0)
    check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    num_sequences = check_offsets(offsets, mask_N.shape[0])
    if num_sequences % 2:
        raise InputError(f"offsets hold {num_sequences} sequences; expected an even number, chosen then rejected")
    divisor = check_count("num_pairs", num_pairs, local=num_sequences // 2)
    log_ratio_N = masked(logprobs_N, mask_N) - masked(reference_logprobs_N, mask_N).detach()
    rewards_B = beta * segment_sum(log_ratio_N, offsets)
    chosen, rejected = rewards_B[0::2], rewards_B[1::2]
    margin = chosen - rejected
    loss = -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    metrics = {
        "accuracy": (margin > 0).sum() / divisor,
        "margin": margin.detach().sum() / divisor,
        "chosen_reward": chosen.detach().sum() / divisor,
        "rejected_reward": rejected.detach().sum() / divisor,
    }
    return LossOutput(loss.sum() / divisor, metrics)
