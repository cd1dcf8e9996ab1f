"""Entropy bonus, to keep a policy exploring. See PAPERS.md#entropy-bonus. Legend: N flat tokens."""

from torch import Tensor

from align_algos.checks import check_number, check_tokens
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked


def entropy_loss(entropy_N: Tensor, mask_N: Tensor, *, num_tokens: int, coef: float) -> LossOutput:
    """- `coef` times the entropy, summed over the mask and divided by `num_tokens`; add it to a policy loss.

    Args:
        entropy_N: floating [N], entropy of the whole next-token distribution, nats (`logprobs.token_entropy`).
        mask_N: bool [N], True where the policy sampled the token.
        num_tokens: tokens inside the mask in the global batch.
        coef: weight, per nat.
    Returns:
        metrics `entropy`: mean, nats.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9 (S); Mnih et al. 2016, arXiv:1602.01783, section 4.
    """
    check_number("coef", coef, low=0.0)
    entropy = masked(entropy_N, mask_N).sum() / check_tokens(mask_N, num_tokens, entropy_N=entropy_N)
    return LossOutput(-coef * entropy, {"entropy": entropy.detach()})
