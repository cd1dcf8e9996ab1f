"""Robust DPO: unbiased under preferences of which a known share is the wrong way round. See PAPERS.md#robust-dpo.

Legend: as in `dpo`.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_algos.checks import check_number
from align_algos.errors import InputError
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import pair_log_ratios, pair_output


def robust_dpo_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    beta: float,
    num_pairs: int,
    label_smoothing: float,
    length_normalised: bool = False,
) -> LossOutput:
    """DPO loss whose mean over noisy labels is the DPO loss of clean ones, divided by `num_pairs`.

    loss = - ((1 - e) logsigmoid(x) - e logsigmoid(-x)) / (1 - 2 e) / num_pairs, with x as in `dpo_loss`

    Args:
        label_smoothing: e, the share of preferences that are the wrong way round, in [0, 0.5).
        Others, Returns and Raises: as in `dpo_loss`.
    Source: Chowdhury et al. 2024, arXiv:2403.00409, section 3 (rDPO).
    """
    check_number("beta", beta, low=0.0)
    check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    if label_smoothing == 0.5:
        raise InputError("label_smoothing is 0.5: such preferences carry nothing to learn; expected less than 0.5")
    pairs = pair_log_ratios(
        logprobs_N,
        reference_logprobs_N,
        mask_N,
        offsets,
        num_pairs=num_pairs,
        length_normalised=length_normalised,
    )
    x_P = beta * (pairs.chosen_P - pairs.rejected_P)
    noisy_P = -(1.0 - label_smoothing) * logsigmoid(x_P) + label_smoothing * logsigmoid(-x_P)
    return pair_output(noisy_P / (1.0 - 2.0 * label_smoothing), pairs, beta=beta)
