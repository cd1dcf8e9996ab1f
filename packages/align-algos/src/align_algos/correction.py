"""Off-policy correction: the engine that sampled and the trainer that scores are not the same policy.

Each function turns the two log-probabilities of the sampled tokens into `weights_N` for the policy losses, and tells
how far apart they are. Nothing here has a gradient. See PAPERS.md#off-policy-correction.

Legend: B sequences, N flat tokens.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from align_algos.checks import check_choice, check_columns, check_count, check_mask, check_number, check_positive
from align_algos.ratios import exp_excess, exp_ratio
from align_algos.reductions import masked, per_token, segment_lengths, segment_sum

Level = Literal["token", "sequence", "geometric"]
LEVELS: tuple[Level, ...] = ("token", "sequence", "geometric")


class Correction(NamedTuple):
    """Weights of the policy loss and what they say about the mismatch."""

    weights_N: Tensor
    """[N], 0 outside the mask."""
    metrics: dict[str, Tensor]
    """Token means as partial sums over `num_tokens`; see `mismatch_metrics`."""


def truncated_importance(
    old_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    level: Level = "token",
    cap: float = 2.0,
) -> Correction:
    """Truncated importance sampling: weight min(rho, cap).

    rho = trainer's probability / engine's: of the token, of the whole sequence (product over its tokens), or the
    geometric mean over the sequence's tokens.

    Args:
        old_logprobs_N: floating [N], log pi(token) recomputed by the trainer with the weights that sampled, nats.
        rollout_logprobs_N: floating [N], log-probability that the engine reported when it sampled the token.
        mask_N: bool [N], True where the policy sampled the token.
        offsets: int64 [B+1].
        num_tokens: tokens inside the mask in the *global* batch; divides the metrics.
        level: "token", "sequence" or "geometric".
        cap: largest weight, at least 1.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Ionides 2008, "Truncated importance sampling"; token level for engines: Yao et al. 2025, "Your
        efficient RL framework secretly brings you off-policy RL training"; sequence level: Liu et al. 2025, "When speed
        kills stability: demystifying RL collapse from the training-inference mismatch".
    """
    check_number("cap", cap, low=1.0)
    log_ratio_N, level_N = _log_ratios(old_logprobs_N, rollout_logprobs_N, mask_N, offsets, level)
    ratio_N = exp_ratio(level_N)
    weights_N = masked(ratio_N.clamp(max=cap), mask_N)
    return Correction(weights_N, mismatch_metrics(log_ratio_N, weights_N, mask_N & (ratio_N > cap), mask_N, num_tokens))


def masked_importance(
    old_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    level: Level = "token",
    low: float = 0.5,
    high: float = 5.0,
    keep_ratio: bool = True,
) -> Correction:
    """Weight rho where low <= rho <= high, 0 elsewhere: what is too far off teaches nothing.

    At level "token" it is IcePop. At level "sequence" whole sequences are dropped by their product of ratios, at level
    "geometric" by the geometric mean (there bounds like 0.99 and 1.01 are usual).

    Args:
        low, high: bounds of rho; low in [0, 1], high at least 1 (defaults: IcePop's).
        keep_ratio: False gives what is kept weight 1 instead of rho: a mask alone.
        Others and Raises: as in `truncated_importance`.
    Source: Ling team 2025, arXiv:2510.18855 (IcePop); sequence and geometric: Liu et al. 2025, as in
        `truncated_importance`.
    """
    check_number("low", low, low=0.0, high=1.0)
    check_number("high", high, low=1.0)
    log_ratio_N, level_N = _log_ratios(old_logprobs_N, rollout_logprobs_N, mask_N, offsets, level)
    ratio_N = exp_ratio(level_N)
    kept_N = mask_N & (ratio_N >= low) & (ratio_N <= high)
    weights_N = masked(ratio_N if keep_ratio else torch.ones_like(ratio_N), kept_N)
    return Correction(weights_N, mismatch_metrics(log_ratio_N, weights_N, mask_N & ~kept_N, mask_N, num_tokens))


def negative_sequence_mask(
    logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    threshold: float,
) -> Correction:
    """Drop sequences of negative advantage that the policy has moved far from: weight 0 there, 1 elsewhere.

    Far: mean over the sequence of (log engine - log pi) > threshold. Good sequences are kept however far they are.

    Args:
        logprobs_N: floating [N], log pi(token) under the policy being trained, or when it was last scored, nats.
        advantages_N: floating [N]; a sequence is negative when their sum over the mask is.
        threshold: nats per token, positive.
        Others and Raises: as in `truncated_importance`.
    Source: DeepSeek-AI 2025, arXiv:2512.02556, section 3 (off-policy sequence masking).
    """
    check_positive("threshold", threshold)
    log_ratio_N, level_N = _log_ratios(logprobs_N, rollout_logprobs_N, mask_N, offsets, "geometric", name="logprobs_N")
    check_columns("token", mask_N.shape[0], advantages_N=advantages_N)
    advantage_B = segment_sum(masked(advantages_N.detach(), mask_N), offsets)
    dropped_N = mask_N & (-level_N > threshold) & (per_token(advantage_B, offsets) < 0)
    weights_N = masked(torch.ones_like(level_N), mask_N & ~dropped_N)
    return Correction(weights_N, mismatch_metrics(log_ratio_N, weights_N, dropped_N, mask_N, num_tokens))


def mismatch_metrics(
    log_ratio_N: Tensor, weights_N: Tensor, corrected_N: Tensor, mask_N: Tensor, num_tokens: int
) -> dict[str, Tensor]:
    """How far trainer and engine are apart; partial sums over `num_tokens`, add them over micro-batches and ranks.

    Returns:
        `mismatch_abs`: mean |log trainer - log engine|, nats; `mismatch_kl`: k3 estimate of KL(engine || trainer);
        `corrected_fraction`: share of tokens whose weight was cut or set to 0; `weight` and `weight_square`: means,
        from which the effective share of the batch follows once summed: weight^2 / weight_square.
    """
    divisor = check_count("num_tokens", num_tokens, local=int(mask_N.sum()))
    return {
        "mismatch_abs": log_ratio_N.abs().sum() / divisor,
        "mismatch_kl": exp_excess(log_ratio_N).sum() / divisor,
        "corrected_fraction": corrected_N.sum() / divisor,
        "weight": weights_N.sum() / divisor,
        "weight_square": weights_N.square().sum() / divisor,
    }


def _log_ratios(
    old_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    level: Level,
    *,
    name: str = "old_logprobs_N",
) -> tuple[Tensor, Tensor]:
    """Log-ratio of each token (0 outside the mask), and that of the level, on each token of the sequence."""
    check_choice("level", level, LEVELS)
    check_columns("token", check_mask(mask_N), **{name: old_logprobs_N}, rollout_logprobs_N=rollout_logprobs_N)
    log_ratio_N = masked(old_logprobs_N.detach(), mask_N) - masked(rollout_logprobs_N.detach(), mask_N)
    if level == "token":
        return log_ratio_N, log_ratio_N
    level_B = segment_sum(log_ratio_N, offsets)
    if level == "geometric":
        level_B = level_B / segment_lengths(mask_N, offsets).clamp_min(1)
    return log_ratio_N, per_token(level_B, offsets)
