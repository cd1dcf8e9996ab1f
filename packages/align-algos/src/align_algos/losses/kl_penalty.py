"""KL to a reference as a loss of its own: estimated from sampled tokens, or exact. See PAPERS.md#kl.

Legend: N flat tokens.
"""

from torch import Tensor

from align_algos.checks import check_choice, check_number, check_tokens
from align_algos.kl import LOSS_ESTIMATORS, LossEstimator, estimate_of
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked


def kl_loss(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    coef: float,
    estimator: LossEstimator = "k3",
) -> LossOutput:
    """`coef` times the estimate of KL(pi || reference), summed over the mask and divided by `num_tokens`.

    Args:
        logprobs_N: floating [N], log pi(token) under the trained policy, nats.
        reference_logprobs_N: floating [N], the same under the frozen reference; a constant.
        mask_N: bool [N], True where the policy sampled the token.
        num_tokens: tokens inside the mask in the global batch.
        coef: weight, per nat.
        estimator: "k3" or "k2". Not "k1": its gradient is that of log pi, of which the mean over samples is 0.
    Returns:
        metrics `kl`: mean of the estimate, nats.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Shao et al. 2024, arXiv:2402.03300, eq. 4 (k3 as a loss); the estimators: J. Schulman, "Approximating KL
        Divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """
    check_choice("estimator", estimator, LOSS_ESTIMATORS)
    check_number("coef", coef, low=0.0)
    divisor = check_tokens(mask_N, num_tokens, logprobs_N=logprobs_N, reference_logprobs_N=reference_logprobs_N)
    log_ratio_N = masked(logprobs_N, mask_N) - masked(reference_logprobs_N, mask_N).detach()
    kl = estimate_of(log_ratio_N, estimator).sum() / divisor
    return LossOutput(coef * kl, {"kl": kl.detach()})


def vocab_kl_loss(kl_N: Tensor, mask_N: Tensor, *, num_tokens: int, coef: float) -> LossOutput:
    """`coef` times KL(pi || reference) over the whole vocabulary, summed over the mask and divided by `num_tokens`.

    Args:
        kl_N: floating [N], exact KL of each next-token distribution, nats (`vocab_kl.token_kl`).
        Others and Raises: as in `kl_loss`.
    Returns:
        metrics `kl`: mean, nats.
    Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4 (KL to the supervised model), there estimated.
    """
    check_number("coef", coef, low=0.0)
    kl = masked(kl_N, mask_N).sum() / check_tokens(mask_N, num_tokens, kl_N=kl_N)
    return LossOutput(coef * kl, {"kl": kl.detach()})
