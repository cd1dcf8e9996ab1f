"""Supervised fine-tuning: negative log-likelihood of the response tokens. See PAPERS.md#sft. Legend: N flat tokens."""

from torch import Tensor

from align_algos.checks import check_columns, check_count, check_mask
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
    check_columns("token", check_mask(mask_N), logprobs_N=logprobs_N)
    divisor = check_count("num_tokens", num_tokens, local=int(mask_N.sum()))
    loss = -masked(logprobs_N, mask_N).sum() / divisor
    return LossOutput(loss, {"nll": loss.detach()})
