"""What the policy-gradient losses share: checked columns, the clipped surrogate, their metrics.

Knows nothing about how tokens are summed. Legend: N flat tokens; a log-ratio may be per token [N] or per sequence [B].
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from align_algos.checks import check_number, check_tokens
from align_algos.errors import InputError
from align_algos.losses.output import LossOutput
from align_algos.ratios import MAX_LOG_RATIO, exp_excess, exp_ratio
from align_algos.reductions import masked


class PolicyTerms(NamedTuple):
    """Columns in working precision, 0 outside the mask; what the policy is not part of is a constant."""

    logprobs_N: Tensor
    log_ratio_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor | None
    reference_log_ratio_N: Tensor | None
    """log pi - log ref, with gradient to log pi; None without a reference."""
    divisor: int


def policy_terms(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    weights_N: Tensor | None = None,
    reference_logprobs_N: Tensor | None = None,
) -> PolicyTerms:
    """Check the columns of a policy loss and take what is inside the mask.

    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    """
    optional = {"weights_N": weights_N, "reference_logprobs_N": reference_logprobs_N}
    divisor = check_tokens(
        mask_N,
        num_tokens,
        logprobs_N=logprobs_N,
        old_logprobs_N=old_logprobs_N,
        advantages_N=advantages_N,
        **{name: column for name, column in optional.items() if column is not None},
    )
    logprobs_N = masked(logprobs_N, mask_N)
    return PolicyTerms(
        logprobs_N,
        logprobs_N - masked(old_logprobs_N, mask_N).detach(),
        masked(advantages_N, mask_N).detach(),
        None if weights_N is None else masked(weights_N, mask_N).detach(),
        None if reference_logprobs_N is None else logprobs_N - masked(reference_logprobs_N, mask_N).detach(),
        divisor,
    )


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where clipping, or the cap of r, removed the gradient.

    With `dual_clip` c the result for A < 0 is at most -A c, so that one token of huge ratio cannot dominate.
    """
    check_number("clip_low", clip_low, low=0.0, high=1.0)
    check_number("clip_high", clip_high, low=0.0)
    ratio = exp_ratio(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    capped = (log_ratio > MAX_LOG_RATIO) & (advantages != 0)
    loss, removed = plain.maximum(clipped), (clipped > plain) | capped
    if dual_clip is not None:
        check_number("dual_clip", dual_clip)
        if dual_clip <= 1.0 + clip_high:
            raise InputError(f"dual_clip is {dual_clip}; expected more than 1 + clip_high = {1.0 + clip_high:g}")
        highest = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > highest)
        loss, removed = highest.where(beyond, loss), removed | beyond
    return loss, removed


def clipped_policy(
    terms: PolicyTerms,
    reduce: Callable[[Tensor], Tensor],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> LossOutput:
    """The clipped surrogate of each token, weighted and reduced, with its metrics."""
    loss_N, removed_N = clipped_surrogate(
        terms.log_ratio_N, terms.advantages_N, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    loss = reduce(weighted(loss_N, terms))
    return LossOutput(loss, policy_metrics(loss, terms, removed_N))


def weighted(loss_N: Tensor, terms: PolicyTerms) -> Tensor:
    """Each token's loss times its correction weight, where there are any."""
    return loss_N if terms.weights_N is None else loss_N * terms.weights_N


def policy_metrics(loss: Tensor, terms: PolicyTerms, removed_N: Tensor) -> dict[str, Tensor]:
    """`policy_loss`; token means of `clip_fraction`, `entropy` (-log pi, an estimate), `approx_kl` (k3, old || pi)."""
    return {
        "policy_loss": loss.detach(),
        "clip_fraction": removed_N.sum() / terms.divisor,
        "entropy": -terms.logprobs_N.detach().sum() / terms.divisor,
        "approx_kl": exp_excess(terms.log_ratio_N.detach()).sum() / terms.divisor,
    }
