"""Reward model: Bradley-Terry over all ordered pairs of responses to one prompt. See PAPERS.md#reward-model.

Legend: B sequences.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align_algos.checks import check_columns, check_count, check_groups, check_number
from align_algos.losses.output import LossOutput
from align_algos.reductions import working_precision


def reward_loss(
    scores_B: Tensor,
    labels_B: Tensor,
    group_B: Tensor,
    *,
    num_pairs: int,
    margin_scale: float = 0.0,
    centre_coef: float = 0.0,
) -> LossOutput:
    """Negative log-likelihood of the preferences among the responses of each group, divided by `num_pairs`.

    x = scores_i - scores_j - margin_scale (labels_i - labels_j), over (i, j) of one group with labels_i > labels_j
    loss = sum (- logsigmoid(x) + centre_coef (scores_i + scores_j)^2) / num_pairs

    Every pair counts the same, so a prompt with more responses weighs more. Equal labels make no pair.

    Args:
        scores_B: floating [B], the model's score of each response.
        labels_B: floating, integer or bool [B], the annotated quality. Without a margin only their order in a group
            matters.
        group_B: integer [B], the prompt of each response. All responses of a prompt belong in one micro-batch.
        num_pairs: ordered pairs in the global batch, from `count_pairs`.
        margin_scale: how much score a difference of one label should make at least; 0 for none.
        centre_coef: pulls the scores of a pair to sum 0, which the likelihood leaves open.
    Returns:
        metrics `accuracy`: share of pairs ranked correctly (an equal score is wrong); `margin`: mean score difference.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4; Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
        Margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2; centring: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    check_number("margin_scale", margin_scale, low=0.0)
    check_number("centre_coef", centre_coef, low=0.0)
    check_columns("sequence", scores_B.numel(), scores_B=scores_B)
    labels_B = _checked_labels(labels_B, group_B, scores_B.numel())
    same_BB = group_B[:, None] == group_B[None, :]
    better, worse = torch.nonzero(same_BB & (labels_B[:, None] > labels_B[None, :]), as_tuple=True)
    divisor = check_count("num_pairs", num_pairs, local=better.shape[0])
    scores_B = working_precision(scores_B)
    margins = scores_B[better] - scores_B[worse]
    metrics = {"accuracy": (margins > 0).sum() / divisor, "margin": margins.detach().sum() / divisor}
    wanted = margin_scale * (labels_B[better] - labels_B[worse]).to(scores_B.dtype)
    centre = centre_coef * (scores_B[better] + scores_B[worse]).square()
    return LossOutput((centre - logsigmoid(margins - wanted)).sum() / divisor, metrics)


def count_pairs(labels_B: Tensor, group_B: Tensor) -> int:
    """Ordered pairs with different labels within a group: the `num_pairs` of `reward_loss`, for the whole batch.

    Pairs of a group of n are n(n-1)/2, less m(m-1)/2 for every m responses that share a label.

    Args and Raises: as in `reward_loss`.
    """
    labels_B = _checked_labels(labels_B, group_B, labels_B.numel())
    _, group_sizes = torch.unique(group_B, return_counts=True)
    _, labels_B = torch.unique(labels_B, return_inverse=True)
    _, tie_sizes = torch.unique(torch.stack([group_B.long(), labels_B], dim=1), dim=0, return_counts=True)
    return int((group_sizes * (group_sizes - 1)).sum() - (tie_sizes * (tie_sizes - 1)).sum()) // 2


def _checked_labels(labels_B: Tensor, group_B: Tensor, length: int) -> Tensor:
    """The labels as floating point numbers, which can be subtracted, unlike bool."""
    labels_B = labels_B if labels_B.is_floating_point() else labels_B.double()
    check_columns("sequence", length, labels_B=labels_B)
    check_groups(group_B, length)
    return labels_B
