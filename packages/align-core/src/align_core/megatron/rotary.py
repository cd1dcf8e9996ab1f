"""Rotary positions: the frequencies of every supported scaling, the angles of packed tokens, and the rotation.

Two halves of a head rotate together, as in Hugging Face's Llama and megatron-core's `rotary_interleaved=False`. The
rotation is computed in float32 and rounded once. Knows nothing about models and ranks.

Legend: P tokens, A heads, D features a head.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align_core.errors import ConfigError


def rotate(x_PAD: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> Tensor:
    """Each head's features turned by the angles of its token, in the type of `x_PAD`.

    Args:
        x_PAD: [P, A, D].
        cos_PE: float32 [P, D/2] from `cos_and_sin`, and so is `sin_PE`.
    """
    apply: Callable[..., Tensor] = _Rotate.apply  # torch leaves it untyped
    return apply(x_PAD, cos_PE, sin_PE)


def cos_and_sin(positions_P: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Of position times frequency, float32 [P, D/2] each."""
    angles = torch.outer(positions_P.float(), frequencies)
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PAD: Tensor, cos_PE: Tensor, sin_PE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_PE, sin_PE)
        return _turn(x_PAD, cos_PE, sin_PE, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PAD: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad_PAD, *ctx.saved_tensors, backwards=True), None, None


def _turn(x_PAD: Tensor, cos_PE: Tensor, sin_PE: Tensor, *, backwards: bool) -> Tensor:
    if x_PAD.is_cuda:
        from align_core.megatron.kernels import rotary  # noqa: PLC0415  (triton; needed on CUDA only)

        return rotary.rotate(x_PAD, cos_PE, sin_PE, backwards=backwards)
    first, second = x_PAD.float().chunk(2, dim=-1)
    cos, sin = cos_PE[:, None], -sin_PE[:, None] if backwards else sin_PE[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_PAD.dtype)


def rotary_frequencies(*, head_dim: int, theta: float, scaling: Mapping[str, object] | None) -> Tensor:
    """Radians a position turns each pair of features by, float32 [head_dim / 2].

    Args:
        scaling: Hugging Face's mapping with the key `rope_type`; None for plain rotary positions.
    Raises:
        ConfigError: another scaling than `linear` or `llama3`.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; `llama3`: Llama 3.1's reference code and Hugging Face's
        modeling_rope_utils.py: long waves are stretched by `factor`, short ones kept, with a ramp between.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return plain
    kind = scaling.get("rope_type")
    if kind == "linear":
        return plain / _number(scaling, "factor")
    if kind != "llama3":
        raise ConfigError(f"rope_scaling of type {kind!r} is not supported; choose 'default', 'linear' or 'llama3'")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    turns = _number(scaling, "original_max_position_embeddings") * plain / (2 * torch.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - keep) * plain / _number(scaling, "factor") + keep * plain


def _number(scaling: Mapping[str, object], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling of type {scaling.get('rope_type')!r} needs a number {key!r}, got {value!r}")
    return float(value)
