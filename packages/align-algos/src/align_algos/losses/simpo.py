"""SimPO: length-normalised preference loss without a reference, with a target margin. See PAPERS.md#simpo.

Legend: as in `dpo`.
"""

from torch import Tensor

from align_algos.checks import check_number
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import pair_log_ratios, pair_output, smoothed_sigmoid


def simpo_loss(
    logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    beta: float,
    margin: float,
    num_pairs: int,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Sigmoid loss on the difference of mean log-probabilities less a margin, divided by `num_pairs`.

    x = beta * (mean log pi(chosen) - mean log pi(rejected)) - margin;  loss as in `dpo_loss`

    Args:
        beta: scale of the mean log-probability, per nat.
        margin: the paper's gamma, in units of reward (TRL's `simpo_gamma`).
        Others and Raises: as in `dpo_loss`. A pair with a response without a token inside the mask adds 0.
    Returns:
        the metrics of `dpo_loss`, with beta * mean log pi as the reward.
    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    check_number("beta", beta, low=0.0)
    check_number("margin", margin)
    pairs = pair_log_ratios(logprobs_N, None, mask_N, offsets, num_pairs=num_pairs, length_normalised=True)
    x_P = beta * (pairs.chosen_P - pairs.rejected_P) - margin
    return pair_output(smoothed_sigmoid(x_P, label_smoothing=label_smoothing), pairs, beta=beta)
