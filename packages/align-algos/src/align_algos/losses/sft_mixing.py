"""Supervised term mixed into reinforcement learning or preference losses. See PAPERS.md#sft-mixing.

Legend: N flat tokens.
"""

from torch import Tensor

from align_algos.checks import check_number
from align_algos.losses.output import LossOutput
from align_algos.losses.sft import sft_loss


def sft_mixing_loss(logprobs_N: Tensor, mask_N: Tensor, *, num_tokens: int, coef: float) -> LossOutput:
    """`coef` times `sft_loss`; add it to the loss it accompanies, with the count of its own tokens.

    Args:
        logprobs_N: floating [N], of demonstrations, pretraining text or chosen responses, nats.
        mask_N: bool [N], True on tokens to learn.
        num_tokens: tokens inside *this* mask in the global batch.
        coef: weight relative to the loss it accompanies.
    Returns:
        metrics `nll`: mean, without `coef`.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2 (gamma, PPO-ptx).
    """
    check_number("coef", coef, low=0.0)
    loss, metrics = sft_loss(logprobs_N, mask_N, num_tokens=num_tokens)
    return LossOutput(coef * loss, metrics)
