"""ORPO: supervised loss on the chosen response plus an odds-ratio preference term, no reference. See PAPERS.md#orpo.

Legend: as in `dpo`; P pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_algos.checks import check_number
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import pair_log_ratios, pair_output

# log(1 - p) is -inf at p = 1, which a mean log-probability reaches by rounding; float32 tells 1 - 1e-6 from 1.
_HIGHEST_LOGPROB = -1e-6


def orpo_loss(logprobs_N: Tensor, mask_N: Tensor, offsets: Tensor, *, beta: float, num_pairs: int) -> LossOutput:
    """Negative mean log-probability of the chosen response, less beta times the log-sigmoid of the log odds ratio.

    p(y) = exp(mean log pi);  odds = p / (1 - p);  x = log odds(chosen) - log odds(rejected)
    loss = (- mean log pi(chosen) - beta logsigmoid(x)) / num_pairs

    Args:
        beta: the paper's lambda, weight of the odds-ratio term.
        Others and Raises: as in `dpo_loss`. A pair with a response without a token inside the mask adds 0.
    Returns:
        the metrics of `dpo_loss`, with beta * mean log pi as the reward; `nll`; `log_odds`: mean x.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    check_number("beta", beta, low=0.0)
    pairs = pair_log_ratios(logprobs_N, None, mask_N, offsets, num_pairs=num_pairs, length_normalised=True)
    log_odds_P = (pairs.chosen_P - _log_complement(pairs.chosen_P)) - (
        pairs.rejected_P - _log_complement(pairs.rejected_P)
    )
    loss, metrics = pair_output(-pairs.chosen_P - beta * logsigmoid(log_odds_P), pairs, beta=beta)
    nll = -pairs.chosen_P.detach().sum() / pairs.divisor
    return LossOutput(loss, {**metrics, "nll": nll, "log_odds": log_odds_P.detach().sum() / pairs.divisor})


def _log_complement(logprob_P: Tensor) -> Tensor:
    """log(1 - exp(logprob))."""
    return torch.log(-torch.expm1(logprob_P.clamp(max=_HIGHEST_LOGPROB)))
