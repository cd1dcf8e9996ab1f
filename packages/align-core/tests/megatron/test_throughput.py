"""Floating-point operations worked by hand."""

import numpy as np
import pytest

from align_convert import ModelConfig
from align_core.megatron.throughput import matrix_parameters, peak_flops, training_flops

TINY = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_counted_and_the_embedding_is_not(tied: bool) -> None:
    """A layer: q and o 4 x 4, k and v 2 x 4, three of 6 x 4, 120 in all; the head 10 x 4, tied or not."""
    config = ModelConfig.from_hf({**TINY, "tie_word_embeddings": tied})
    assert matrix_parameters(config) == 2 * 120 + 40


def test_flops_of_two_sequences() -> None:
    """280 parameters, 3 + 5 tokens, attention of 2 layers, 2 heads, 2 features over 9 + 25 causal pairs of squares."""
    config = ModelConfig.from_hf(TINY)
    assert training_flops(config, np.asarray([3, 5])) == 6 * (280 * 8 + 2 * 2 * 2 * 34)


def test_a_device_is_known_by_its_name() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a toaster") is None


def test_of_experts_those_count_that_a_token_meets() -> None:
    """A layer: attention 48, a router of 3 x 4, two of the three experts with three matrices of 6 x 4; the head."""
    raw = {**TINY, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    assert matrix_parameters(ModelConfig.from_hf(raw)) == 2 * (48 + 12 + 2 * 72) + 40
