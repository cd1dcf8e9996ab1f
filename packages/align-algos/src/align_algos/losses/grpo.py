"""Group relative policy optimisation: the clipped surrogate plus a KL penalty in the loss. See PAPERS.md#grpo.

Knows nothing about groups: they are in the advantages (`align_algos.advantages.group_normalised`).

Legend: N flat tokens.
"""

from torch import Tensor

from align_algos.checks import check_number
from align_algos.errors import InputError
from align_algos.kl import k3
from align_algos.losses.output import LossOutput
from align_algos.losses.ppo_policy import ppo_policy_loss
from align_algos.reductions import token_mean


def grpo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip_low: float,
    clip_high: float,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
) -> LossOutput:
    """Clipped surrogate plus `kl_coef` times the k3 estimate of KL(pi || reference), over `num_tokens`.

    Args:
        logprobs_N: floating [N], log pi(token) under the trained policy, nats.
        old_logprobs_N: floating [N], the same under the policy that sampled, recomputed by the trainer; a constant.
        advantages_N: floating [N], the sequence's advantage on each of its tokens; a constant.
        mask_N: bool [N], True where the policy sampled the token.
        num_tokens: tokens inside the mask in the *global* batch.
        clip_low: how far below 1 the ratio counts, in [0, 1].
        clip_high: how far above 1 the ratio counts.
        reference_logprobs_N: floating [N], log ref(token) of the frozen reference; a constant. None: no KL term.
        kl_coef: weight of the KL term, per nat.
    Returns:
        the metrics of `ppo_policy_loss`, and `kl` (k3 to the reference) where a reference is given.
    Raises:
        InputError: a value that is not finite, a wrong shape, a count smaller than this micro-batch's own, or a
            `kl_coef` without a reference.
    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4; averaged over tokens of the whole batch as in DAPO,
        Yu et al. 2025, arXiv:2503.14476, eq. 8.
    """
    check_number("kl_coef", kl_coef, low=0.0)
    if reference_logprobs_N is None and kl_coef > 0:
        raise InputError(f"kl_coef is {kl_coef} but reference_logprobs_N is None; give the reference or kl_coef=0")
    loss, metrics = ppo_policy_loss(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        mask_N,
        num_tokens=num_tokens,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    if reference_logprobs_N is None:
        return LossOutput(loss, metrics)
    kl = token_mean(k3(logprobs_N, reference_logprobs_N.detach()), mask_N, num_tokens=num_tokens)
    return LossOutput(loss + kl_coef * kl, {**metrics, "kl": kl.detach()})
