"""Rotary frequencies against transformers', and the rotation worked by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from align_core.errors import ConfigError
from align_core.megatron.rotary import cos_and_sin, rotary_frequencies, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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


def test_rotation_turns_the_two_halves_and_its_gradient_turns_back() -> None:
    """Frequency pi / 2 at position 1 is a quarter turn: (1, 0) becomes (0, 1)."""
    cos, sin = cos_and_sin(torch.tensor([0, 1]), torch.tensor([math.pi / 2]))
    x = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]], requires_grad=True)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned, torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(turned[1, 0, 0], x)
    torch.testing.assert_close(grad[1, 0], torch.tensor([0.0, -1.0]), atol=1e-6, rtol=0)


def test_an_unknown_rope_scaling_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="'yarn' is not supported; choose 'default', 'linear' or 'llama3'"):
        rotary_frequencies(head_dim=8, theta=1e4, scaling={"rope_type": "yarn", "factor": 2.0})


def test_a_rope_scaling_without_its_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linear' needs a number 'factor', got None"):
        rotary_frequencies(head_dim=8, theta=1e4, scaling={"rope_type": "linear"})
