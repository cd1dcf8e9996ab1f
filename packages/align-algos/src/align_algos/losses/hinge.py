"""Hinge preference loss (SLiC's, on the implicit rewards of DPO). See PAPERS.md#hinge. Legend: as in `dpo`."""

from torch import Tensor

from align_algos.checks import check_number
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import pair_log_ratios, pair_output


def hinge_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    beta: float,
    num_pairs: int,
    length_normalised: bool = False,
) -> LossOutput:
    """How far the reward margin falls short of 1, divided by `num_pairs`: max(0, 1 - x), with x as in `dpo_loss`.

    Args, Returns and Raises: as in `dpo_loss`.
    Source: Zhao et al. 2023, arXiv:2305.10425, section 2 (SLiC-HF, calibration loss); on log-ratios to a reference:
        Liu et al. 2023, arXiv:2309.06657 (RSO, "hinge-norm").
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
    loss_P = (1.0 - beta * (pairs.chosen_P - pairs.rejected_P)).clamp_min(0.0)
    return pair_output(loss_P, pairs, beta=beta)
