"""Supervised fine-tuning: negative log-likelihood of the response tokens. See PAPERS.md#sft. Legend: N flat tokens."""

from torch import Tensor

from align_algos.checks import check_tokens
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked


def sft_loss(logprobs_N: Tensor, mask_N: Tensor, *, num_tokens: int) -> LossOutput:
    """Negative log-likelihood over the mask, divided by `num_tokens`.

    loss = - sum_i mask_i logprobs_i / num_tokens

    Args:
        logprobs_N: floating [N], log p(token i | tokens before it), nats. The caller has shifted: entry i belongs to
            the token that mask_N[i] speaks of.
        mask_N: bool [N], True on the tokens to learn.
        num_tokens: tokens inside the mask in the global batch.
    Returns:
        metrics `nll`: the loss without gradient.
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.
    """
    divisor = check_tokens(mask_N, num_tokens, logprobs_N=logprobs_N)
    loss = -masked(logprobs_N, mask_N).sum() / divisor
    return LossOutput(loss, {"nll": loss.detach()})
