"""Rewards as the algorithms want them: clipped, penalised, rescaled, with the KL on each token. See PAPERS.md#shaping.

Knows nothing about where scores come from and nothing about advantages.

Legend: B sequences, N flat tokens.
"""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from align_algos.checks import check_columns, check_integers, check_mask, check_number, check_offsets
from align_algos.errors import InputError
from align_algos.kl import Estimator, kl_estimate
from align_algos.reductions import masked, per_token, segment_lengths, working_precision
from align_algos.statistics import Moments, merge_moments, moments


def clip_scores(scores_B: Tensor, *, bias: float = 0.0, limit: float = 100.0) -> Tensor:
    """clip(score - bias, -limit, limit), without gradient.

    Args:
        scores_B: floating [B].
        bias: subtracted first, in units of score.
        limit: largest absolute value that stays.
    Returns: [B], float32 (float64 for float64 scores).
    Raises:
        InputError: a value that is not finite, or a wrong shape.
    Source: the tutorial (`reward_bias`, `cliprange_reward`, 100 there).
    """
    check_columns("sequence", scores_B.numel(), scores_B=scores_B)
    check_number("bias", bias)
    check_number("limit", limit, low=0.0)
    return (working_precision(scores_B.detach()) - bias).clamp(-limit, limit)


def shaped_rewards(
    scores_B: Tensor,
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    offsets: Tensor,
    *,
    kl_coef: float,
    kl_estimator: Estimator = "k1",
    length_normalised: bool = False,
) -> Tensor:
    """Reward per token: - kl_coef * KL estimate on each sampled token, plus the score on the last one.

    Args:
        scores_B: floating [B], the sequence's score with all penalties already in it.
        logprobs_N: floating [N], log pi(token) under the policy that sampled, nats.
        reference_logprobs_N: floating [N], the same under the frozen reference.
        mask_N: bool [N], True where the policy sampled the token; never on a token that nobody sampled.
        offsets: int64 [B+1].
        kl_coef: weight of the KL, per nat.
        kl_estimator: "k1" is unbiased and the usual one.
        length_normalised: divide each sequence's KL terms by its number of sampled tokens, as the tutorial does.
    Returns: [N], 0 outside the mask, without gradient.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a score of a sequence with an empty mask, which would
            be lost.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2; per token: Ziegler et al. 2019, arXiv:1909.08593, section 2.
    """
    check_mask(mask_N)
    kl_N = kl_estimate(logprobs_N.detach(), reference_logprobs_N.detach(), estimator=kl_estimator)
    return rewards_with_kl(scores_B, kl_N, mask_N, offsets, kl_coef=kl_coef, length_normalised=length_normalised)


def rewards_with_kl(
    scores_B: Tensor, kl_N: Tensor, mask_N: Tensor, offsets: Tensor, *, kl_coef: float, length_normalised: bool = False
) -> Tensor:
    """`shaped_rewards` for a KL that is known already, such as the one over the whole vocabulary (`token_kl`).

    Args:
        kl_N: floating [N], nats; outside the mask any finite value.
        Others, Returns and Raises: as in `shaped_rewards`.
    """
    check_number("kl_coef", kl_coef, low=0.0)
    check_columns("token", check_mask(mask_N), kl_N=kl_N)
    length_B = segment_lengths(mask_N, offsets)
    check_columns("sequence", length_B.shape[0], scores_B=scores_B)
    scores_B = working_precision(scores_B.detach())
    lost_B = (length_B == 0) & (scores_B != 0)
    if bool(lost_B.any()):
        raise InputError(f"sequence {int(lost_B.nonzero()[0])} has a score but no token inside mask_N to carry it")
    rewards_N = -kl_coef * masked(kl_N.detach(), mask_N)
    if length_normalised:
        rewards_N = rewards_N / per_token(length_B.clamp_min(1).to(rewards_N.dtype), offsets)
    return rewards_N + last_token(scores_B, mask_N, offsets).to(rewards_N.dtype)


def last_token(x_B: Tensor, mask_N: Tensor, offsets: Tensor) -> Tensor:
    """Each sequence's value on its last token inside the mask, 0 elsewhere; nothing where the mask is empty.

    Args:
        x_B: floating [B].
        mask_N: bool [N], True where the policy sampled the token.
        offsets: int64 [B+1].
    Returns: [N], the dtype of `x_B`, with gradient.
    Raises:
        InputError: a value that is not finite, a wrong shape, or offsets that do not fit.
    """
    length_B = segment_lengths(mask_N, offsets)
    check_columns("sequence", length_B.shape[0], x_B=x_B)
    last_M = length_B.cumsum(0)[length_B > 0] - 1  # positions among the tokens inside the mask
    position_M = mask_N.nonzero()[:, 0][last_M]
    return x_B.new_zeros(mask_N.shape).index_put((position_M,), x_B[length_B > 0])


def ngram_penalty(tokens_N: Tensor, mask_N: Tensor, offsets: Tensor, *, sizes: tuple[int, ...] = (2, 3)) -> Tensor:
    """For each sequence the sum over n of - (most repeats of an n-gram) / (mean gap between its repeats); 0 or less.

    An n-gram that begins c >= 2 times, first at token a and last at token b (counted inside the mask), has the mean gap
    max(1, (b - a) / (c - 1) - n). The most frequent n-gram counts; among equals the one of the smallest gap.

    Args:
        tokens_N: integer [N], token ids.
        mask_N: bool [N], True where the policy sampled the token.
        offsets: int64 [B+1].
        sizes: the n.
    Returns: float32 [B].
    Source: the tutorial (`ngram_coef`, n = 2 and 3), which takes any one of equally frequent n-grams.
    """
    check_integers("tokens_N", tokens_N, check_mask(mask_N))
    check_offsets(offsets, mask_N.shape[0])
    bounds, tokens, inside = offsets.tolist(), tokens_N.tolist(), mask_N.tolist()
    penalties = []
    for start, stop in itertools.pairwise(bounds):
        sequence = [token for token, keep in zip(tokens[start:stop], inside[start:stop]) if keep]
        penalties.append(sum(_repetition(sequence, n) for n in sizes))
    return torch.tensor(penalties, dtype=torch.float32, device=tokens_N.device)


def overlong_penalty(lengths_B: Tensor, *, max_tokens: int, buffer: int) -> Tensor:
    """0 up to max_tokens - buffer, then falling linearly to -1 at `max_tokens`, -1 beyond.

    Args:
        lengths_B: integer [B], sampled tokens of each sequence.
        max_tokens: the paper's L_max.
        buffer: the paper's L_cache, tokens over which the penalty grows; 1 to max_tokens.
    Returns: float32 [B].
    Source: Yu et al. 2025, arXiv:2503.14476, eq. 13.
    """
    check_integers("lengths_B", lengths_B, lengths_B.numel())
    if not 1 <= buffer <= max_tokens:
        raise InputError(f"buffer is {buffer}; expected 1 to max_tokens = {max_tokens}")
    return ((max_tokens - buffer - lengths_B.float()) / buffer).clamp(-1.0, 0.0)


_STATE_KEYS = ("count", "mean", "square", "lowest", "highest")
"""Of a saved scale, in the order of the fields of `Moments`."""


class RunningScale:
    """Divides rewards by the standard deviation of all rewards seen so far; its state belongs in the checkpoint.

    `update` with a batch (global, after gathering), then `scale`. Until two different rewards were seen `scale` returns
    them as they are.

    Source: Engstrom et al. 2020, arXiv:2005.12729, section 3; of the rewards themselves, without shifting them.
    """

    def __init__(self) -> None:
        self._seen = _moments_of([0.0] * len(_STATE_KEYS))

    @property
    def std(self) -> float:
        """Population standard deviation of the rewards seen; 0 before the first, and while all are equal."""
        return float(self._seen.variance.sqrt())

    def update(self, rewards_B: Tensor) -> None:
        """Take a batch into account: floating [B]."""
        check_columns("sequence", rewards_B.numel(), rewards_B=rewards_B)
        batch = moments(rewards_B.cpu(), torch.ones(len(rewards_B), dtype=torch.bool))
        self._seen = merge_moments([self._seen, batch])

    def scale(self, rewards_B: Tensor) -> Tensor:
        """rewards / std, without shifting them, floating [B]."""
        check_columns("sequence", rewards_B.numel(), rewards_B=rewards_B)
        rewards_B = working_precision(rewards_B.detach())
        return rewards_B / self.std if self.std > 0 else rewards_B

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {key: float(value) for key, value in zip(_STATE_KEYS, self._seen, strict=True)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore from `state_dict`. One of an earlier version, without the extremes, is taken too."""
        if not {"count", "mean", "square"} <= set(state) <= set(_STATE_KEYS):
            raise InputError(f"the state of RunningScale has the keys {sorted(state)}; expected {sorted(_STATE_KEYS)}")
        for key, value in state.items():
            check_number(key, value, low=0.0 if key in ("count", "square") else -math.inf)
        # Unknown extremes: apart where the spread says so, as it did before.
        spread = (state["square"] / max(state["count"], 1)) ** 0.5
        numbers = {"lowest": state["mean"] - spread, "highest": state["mean"] + spread, **state}
        self._seen = _moments_of([numbers[key] for key in _STATE_KEYS])


def _moments_of(numbers: list[float]) -> Moments:
    return Moments(*torch.tensor(numbers, dtype=torch.float64))


def _repetition(tokens: list[int], n: int) -> float:
    """- (count / gap) of the most repeated n-gram of one sequence; 0 without a repeat."""
    seen: dict[tuple[int, ...], tuple[int, int, int]] = {}  # n-gram: count, first and last position
    for position in range(len(tokens) - n + 1):
        gram = tuple(tokens[position : position + n])
        count, first, _ = seen.get(gram, (0, position, position))
        seen[gram] = (count + 1, first, position)
    repeats = [(count, max(1.0, (last - first) / (count - 1) - n)) for count, first, last in seen.values() if count > 1]
    if not repeats:
        return 0.0
    count, gap = max(repeats, key=lambda repeat: (repeat[0], -repeat[1]))
    return -count / gap
