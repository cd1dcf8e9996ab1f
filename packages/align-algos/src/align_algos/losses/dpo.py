"""Direct preference optimisation, sigmoid form with label smoothing. See PAPERS.md#dpo.

Legend: B sequences, N flat tokens; sequences alternate chosen (2i), rejected (2i + 1).
"""

from torch import Tensor

from align_algos.checks import check_number
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import pair_log_ratios, pair_output, smoothed_sigmoid


def dpo_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    beta: float,
    num_pairs: int,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
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
        length_normalised: mean instead of sum over the response, so that beta is per token.
    Returns:
        the metrics of `pairs.pair_output`: accuracy, margin, chosen_reward, rejected_reward.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing (cDPO): Mitchell 2023, eq. 3 of
        https://ericmitchell.ai/cdpo.pdf; length-normalised: Lambert et al. 2024, arXiv:2411.15124.
    """
    check_number("beta", beta, low=0.0)
    pairs = pair_log_ratios(
        logprobs_N,
        reference_logprobs_N,
        mask_N,
        offsets,
        num_pairs=num_pairs,
        length_normalised=length_normalised,
    )
    x_P = beta * (pairs.chosen_P - pairs.rejected_P)
    return pair_output(smoothed_sigmoid(x_P, label_smoothing=label_smoothing), pairs, beta=beta)
