"""Group relative policy optimisation: the clipped surrogate plus a KL penalty in the loss. See PAPERS.md#grpo.

Knows nothing about groups: they are in the advantages (`align_algos.advantages.group_normalised`).

Legend: B sequences, N flat tokens.
"""

from torch import Tensor

from align_algos.checks import check_choice, check_number
from align_algos.errors import InputError
from align_algos.kl import LOSS_ESTIMATORS, LossEstimator, estimate_of
from align_algos.losses.output import LossOutput
from align_algos.losses.policy_terms import clipped_policy, policy_terms
from align_algos.reductions import Reduction, reducer


def grpo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: LossEstimator = "k3",
    weights_N: Tensor | None = None,
    reduction: Reduction = "token_mean",
    offsets: Tensor | None = None,
    num_sequences: int | None = None,
    length: float = 1.0,
) -> LossOutput:
    """Clipped surrogate plus `kl_coef` times an estimate of KL(pi || reference), by default over `num_tokens`.

    Args:
        advantages_N: floating [N], the sequence's advantage on each of its tokens; a constant.
        reference_logprobs_N: floating [N], log ref(token) of the frozen reference; a constant. None: no KL term.
        kl_coef: weight of the KL term, per nat.
        kl_estimator: "k3" as in the paper, or "k2", whose gradient is that of the KL itself on policy.
        reduction, offsets, num_sequences, length: as in `reductions.reduce_tokens`, for both terms. "sequence_mean" is
            the paper's.
        Others: as in `ppo_policy_loss`.
    Returns:
        the metrics of `ppo_policy_loss`, and `kl` (the estimate, reduced as the loss) where a reference is given.
    Raises:
        InputError: a value that is not finite, a wrong shape, a count smaller than this micro-batch's own, or a
            `kl_coef` without a reference.
    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4; averaged over tokens of the whole batch as in DAPO,
        Yu et al. 2025, arXiv:2503.14476, eq. 8.
    """
    check_number("kl_coef", kl_coef, low=0.0)
    check_choice("kl_estimator", kl_estimator, LOSS_ESTIMATORS)
    if reference_logprobs_N is None and kl_coef > 0:
        raise InputError(f"kl_coef is {kl_coef} but reference_logprobs_N is None; give the reference or kl_coef=0")
    terms = policy_terms(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        mask_N,
        num_tokens=num_tokens,
        weights_N=weights_N,
        reference_logprobs_N=reference_logprobs_N,
    )
    reduce = reducer(mask_N, terms.divisor, reduction, offsets=offsets, num_sequences=num_sequences, length=length)
    loss, metrics = clipped_policy(terms, reduce, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    if terms.reference_log_ratio_N is None:
        return LossOutput(loss, metrics)
    kl = reduce(estimate_of(terms.reference_log_ratio_N, kl_estimator))
    return LossOutput(loss + kl_coef * kl, {**metrics, "kl": kl.detach()})
