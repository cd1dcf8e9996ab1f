"""Online DPO: preferences among the sampled responses of a prompt, by their rewards. See PAPERS.md#online-dpo.

Legend: B sequences, N flat tokens, P ordered pairs.
"""

from typing import Literal

import torch
from torch import Tensor

from align_algos import segments
from align_algos.checks import (
    check_choice,
    check_columns,
    check_count,
    check_groups,
    check_mask,
    check_number,
    check_offsets,
)
from align_algos.losses.output import LossOutput
from align_algos.losses.pairs import Pairs, pair_output, smoothed_sigmoid
from align_algos.reductions import masked

PairChoice = Literal["all", "best_vs_rest", "best_vs_worst"]
PAIR_CHOICES: tuple[PairChoice, ...] = ("all", "best_vs_rest", "best_vs_worst")


def online_dpo_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    rewards_B: Tensor,
    group_B: Tensor,
    beta: float,
    num_pairs: int,
    pairs: PairChoice = "all",
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
) -> LossOutput:
    """The loss of `dpo_loss` over the preferences that rewards make within each group, divided by `num_pairs`.

    Every pair counts the same. Equal rewards make no pair, so an all-tied group trains nothing and moves no other.

    Args:
        rewards_B: floating [B]; only their order within a group matters.
        group_B: integer [B], the prompt of each response. All responses of a prompt belong in one micro-batch.
        num_pairs: pairs in the global batch, from `count_preferences`.
        pairs: "all" ordered pairs; "best_vs_rest": the highest against every lower reward; "best_vs_worst": the highest
            against the lowest. Responses that share the highest (lowest) reward all take part.
        Others, Returns and Raises: as in `dpo_loss`.
    Source: Guo et al. 2024, arXiv:2402.04792, section 3 (two responses); all pairs of k: the tutorial.
    """
    check_number("beta", beta, low=0.0)
    check_columns("token", check_mask(mask_N), logprobs_N=logprobs_N, reference_logprobs_N=reference_logprobs_N)
    check_offsets(offsets, mask_N.shape[0])
    ratio_B = segments.sums(masked(logprobs_N, mask_N) - masked(reference_logprobs_N, mask_N).detach(), offsets)
    if length_normalised:
        ratio_B = ratio_B / segments.lengths(mask_N, offsets).clamp_min(1)
    check_columns("sequence", ratio_B.shape[0], rewards_B=rewards_B)
    chosen, rejected = torch.nonzero(_preferences(rewards_B, group_B, pairs), as_tuple=True)
    divisor = check_count("num_pairs", num_pairs, local=chosen.shape[0])
    terms = Pairs(ratio_B[chosen], ratio_B[rejected], divisor)
    x_P = beta * (terms.chosen_P - terms.rejected_P)
    return pair_output(smoothed_sigmoid(x_P, label_smoothing=label_smoothing), terms, beta=beta)


def count_preferences(rewards_B: Tensor, group_B: Tensor, *, pairs: PairChoice = "all") -> int:
    """The `num_pairs` of `online_dpo_loss`, for the whole batch.

    Args and Raises: as in `online_dpo_loss`.
    """
    check_columns("sequence", rewards_B.numel(), rewards_B=rewards_B)
    return int(_preferences(rewards_B, group_B, pairs).sum())


def _preferences(rewards_B: Tensor, group_B: Tensor, pairs: PairChoice) -> Tensor:
    """bool [B, B], True where the row is preferred to the column."""
    check_groups(group_B, rewards_B.shape[0])
    check_choice("pairs", pairs, PAIR_CHOICES)
    same_BB = group_B[:, None] == group_B[None, :]
    better_BB = same_BB & (rewards_B[:, None] > rewards_B[None, :])
    if pairs == "all":
        return better_BB
    better_BB = better_BB & ~better_BB.any(0)[:, None]  # nobody of its group is better than the row
    if pairs == "best_vs_rest":
        return better_BB
    worse_BB = same_BB & (rewards_B[:, None] < rewards_B[None, :])
    return better_BB & ~worse_BB.any(0)[None, :]
