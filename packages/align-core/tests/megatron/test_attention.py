"""Packed attention against each sequence alone, and rotary frequencies against transformers'."""

import numpy as np
import pytest
import torch
from megatron.core.transformer import TransformerConfig
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from align_core.errors import ConfigError
from align_core.megatron.attention import PackedAttention, Rotary, rotary_frequencies
from align_core.megatron.microbatch import pack
from align_core.types import Batch

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.filterwarnings("ignore:full scope is deprecated")  # a default of megatron-core's own
def test_packed_attention_equals_each_sequence_alone() -> None:
    """Values and gradients, with 4 query heads over 2 key heads and sequences of 1 to 21 tokens."""
    lengths = (3, 21, 1, 8, 7)
    whole = Batch.of([np.zeros(n, np.int32) for n in lengths])
    packed = pack(whole, np.arange(len(lengths)), multiple=1, device=torch.device("cpu")).packed
    generator = torch.Generator().manual_seed(0)
    query, upstream = (torch.randn(40, 1, 4, 6, generator=generator) for _ in range(2))
    key, value = (torch.randn(40, 1, 2, 6, generator=generator) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    attention = PackedAttention(TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=4))
    found = attention(*inputs, None, packed_seq_params=packed).view(40, 1, 4, 6)
    found_grads = torch.autograd.grad((found * upstream).sum(), inputs)

    parts = []
    for q, k, v in zip(*(tensor[:, 0].split(lengths) for tensor in inputs)):
        weights = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) / 6**0.5
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        shares = weights.masked_fill(future, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(2, dim=1)))
    expected = torch.cat(parts)[:, None]
    expected_grads = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for found_grad, expected_grad in zip(found_grads, expected_grads):
        torch.testing.assert_close(found_grad, expected_grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=["plain", "llama3", "linear"]
)
def test_rotary_frequencies_equal_transformers(scaling: dict[str, object] | None) -> None:
    parameters = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters)
    if scaling is None:
        expected = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, torch.device("cpu"))
    found = rotary_frequencies(head_dim=128, theta=500000.0, scaling=scaling)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)


def test_rotary_angles_are_position_times_frequency() -> None:
    """Frequencies 1 and 0.5 at position 3: the angles 3 and 1.5, once for each half."""
    angles = Rotary(torch.tensor([1.0, 0.5]))(torch.tensor([0, 3]))
    assert angles.shape == (2, 1, 1, 4)
    assert angles[1, 0, 0].tolist() == [3.0, 1.5, 3.0, 1.5]


def test_an_unknown_rope_scaling_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="'yarn' is not supported; choose 'default', 'linear' or 'llama3'"):
        rotary_frequencies(head_dim=8, theta=1e4, scaling={"rope_type": "yarn", "factor": 2.0})


def test_a_rope_scaling_without_its_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linear' needs a number 'factor', got None"):
        rotary_frequencies(head_dim=8, theta=1e4, scaling={"rope_type": "linear"})
