"""Packed attention, rotary positions included, against each sequence alone in complex numbers."""

import numpy as np
import pytest
import torch
from megatron.core.transformer import TransformerConfig

from align_core.megatron.attention import PackedAttention
from align_core.megatron.microbatch import pack
from align_core.types import Batch

FREQUENCIES = torch.tensor([1.0, 0.3, 0.01])


@pytest.mark.filterwarnings("ignore:full scope is deprecated")  # a default of megatron-core's own
@pytest.mark.parametrize("lengths", [(3, 21, 1, 8, 7), (10, 10, 10, 10)], ids=["ragged", "uniform"])
def test_packed_attention_equals_each_sequence_alone(lengths: tuple[int, ...]) -> None:
    """Values and gradients, with 4 query heads over 2 key heads."""
    whole = Batch.of([np.zeros(n, np.int32) for n in lengths])
    packed = pack(whole, np.arange(len(lengths)), multiple=1, device=torch.device("cpu")).packed
    generator = torch.Generator().manual_seed(0)
    query, upstream = (torch.randn(40, 1, 4, 6, generator=generator) for _ in range(2))
    key, value = (torch.randn(40, 1, 2, 6, generator=generator) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    attention = PackedAttention(
        TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=4), frequencies=FREQUENCIES
    )
    found = attention(*inputs, None, packed_seq_params=packed).view(40, 1, 4, 6)
    found_grads = torch.autograd.grad((found * upstream).sum(), inputs)

    parts = []
    for q, k, v in zip(*(tensor[:, 0].split(lengths) for tensor in inputs)):
        weights = torch.einsum("qhd,khd->hqk", _turned(q), _turned(k).repeat_interleave(2, dim=1)) / 6**0.5
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        shares = weights.masked_fill(future, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(2, dim=1)))
    expected = torch.cat(parts)[:, None]
    expected_grads = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for found_grad, expected_grad in zip(found_grads, expected_grads):
        torch.testing.assert_close(found_grad, expected_grad, atol=1e-5, rtol=0)


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Feature j and j + 3 are the real and imaginary part of a number that turns by position times frequency."""
    numbers = torch.complex(x[..., :3], x[..., 3:])
    angles = torch.arange(len(x))[:, None, None] * FREQUENCIES
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
