"""Identity preference optimisation: regress the difference of log-ratios to a constant. See PAPERS.md#ipo.

Legend: as in `dpo`.
"""

from torch import Tensor

from align_algos.checks import check_positive
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import pair_log_ratios, pair_output


def ipo_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    beta: float,
    num_pairs: int,
    length_normalised: bool = True,
) -> LossOutput:
    """Squared distance of the log-ratio difference h to 1 / (2 beta), divided by `num_pairs`.

    h = mean (chosen: log pi - log ref) - mean (rejected: log pi - log ref);  loss = (h - 1 / (2 beta))^2 / num_pairs

    Args:
        beta: the paper's tau, positive.
        length_normalised: False sums over the response, as the paper writes it for one action.
        Others, Returns and Raises: as in `dpo_loss`.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    check_positive("beta", beta, hint=", the target is 1 / (2 beta)")
    pairs = pair_log_ratios(
        logprobs_N,
        reference_logprobs_N,
        mask_N,
        offsets,
        num_pairs=num_pairs,
        length_normalised=length_normalised,
    )
    loss_P = (pairs.chosen_P - pairs.rejected_P - 1.0 / (2.0 * beta)).square()
    return pair_output(loss_P, pairs, beta=beta)
