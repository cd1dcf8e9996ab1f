"""Value loss of PPO: squared error, optionally clipped around the old values. See PAPERS.md#ppo-value.

Legend: N flat tokens.
"""

import torch
from torch import Tensor

from align_algos.checks import check_number, check_tokens
from align_algos.losses.output import LossOutput
from align_algos.reductions import masked


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    mask_N: Tensor,
    *,
    num_tokens: int,
    clip: float | None,
) -> LossOutput:
    """Half the squared error to the returns over the mask, divided by `num_tokens`.

    With `clip`: max of the plain error and the error of the value held within +-clip of the old one, so that a value
    beyond the clip still gets a gradient when that makes the error worse.

    Args:
        values_N: floating [N], the value head's output.
        old_values_N: floating [N], the values at sampling time; a constant.
        returns_N: floating [N], the targets; a constant.
        mask_N: bool [N], True where the policy sampled the token.
        num_tokens: tokens inside the mask in the global batch.
        clip: largest move that counts, in units of the value; None for the plain squared error.
    Returns:
        metrics `value_loss`; `clip_fraction`: share of tokens where clipping raised the error; means `value`, `return`,
        `squared_error`, `squared_return`, from which explained variance follows once summed:
        1 - (squared_error - (return - value)^2) / (squared_return - return^2).
    Raises:
        InputError: a value that is not finite, a wrong shape, or a count smaller than this micro-batch's own.
    Source: Schulman et al. 2017, arXiv:1707.06347, section 5 (squared error); clipping: Schulman et al.'s released
        code (openai/baselines, ppo2), described in Engstrom et al. 2020, arXiv:2005.12729, section 3.
    """
    if clip is not None:
        check_number("clip", clip, low=0.0)
    divisor = check_tokens(mask_N, num_tokens, values_N=values_N, old_values_N=old_values_N, returns_N=returns_N)
    values_N = masked(values_N, mask_N)
    old_values_N = masked(old_values_N, mask_N).detach()
    returns_N = masked(returns_N, mask_N).detach()
    plain_N = (values_N - returns_N).square()
    worst_N = plain_N
    if clip is not None:
        held_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        worst_N = torch.maximum(plain_N, (held_N - returns_N).square())
    loss = 0.5 * worst_N.sum() / divisor
    metrics = {
        "value_loss": loss.detach(),
        "clip_fraction": (worst_N > plain_N).sum() / divisor,
        "value": values_N.detach().sum() / divisor,
        "return": returns_N.sum() / divisor,
        "squared_error": plain_N.detach().sum() / divisor,
        "squared_return": returns_N.square().sum() / divisor,
    }
    return LossOutput(loss, metrics)
