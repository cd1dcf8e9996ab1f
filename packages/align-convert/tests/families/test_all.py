"""Every family through every layout: Hugging Face tensors to ranks and back, bit for bit, and nothing left out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align_convert import Layout, ModelConfig, Rank, fill_shard, rank_plan, shard_slices
from align_convert.families import FAMILIES
from align_convert.fill import slices

Make = Callable[..., ModelConfig]
Weights = Callable[..., dict[str, torch.Tensor]]

GRID = [(tp, pp, vp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) for vp in (1, 2) if pp > 1 or vp == 1]
RATIOS = {
    "7B": {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 128, "intermediate_size": 344},
    "13B": {"num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 160, "intermediate_size": 432},
    "70B": {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 128, "intermediate_size": 448},
}
"""Llama-2's heads and KV groups exactly, widths divided by 32 (70B: 64)."""


def _round_trip(config: ModelConfig, layout: Layout, weights: dict[str, torch.Tensor]) -> None:
    """Through the ranks of `layout`, each filled alone, and back."""
    back = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    for rank in layout.ranks():
        for shard in rank_plan(config, layout, rank):
            filled = fill_shard(shard, lambda name, index: weights[name][slices(index)], torch.float32)
            for piece, values in shard_slices(shard, filled):
                if piece.primary:
                    back[piece.hf_name][slices(piece.hf_index)] = values
                else:
                    assert torch.equal(weights[piece.hf_name][slices(piece.hf_index)], values)
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_round_trip_of_every_layout_is_bit_equal(make_family: Make, make_weights: Weights, family: str) -> None:
    config = make_family(family, num_attention_heads=8, hidden_size=64)
    weights = make_weights(config)
    for tp, pp, vp in GRID:
        for ep in (1, 2, 4) if config.num_experts else (1,):
            _round_trip(config, Layout(tp=tp, pp=pp, vp=vp, ep=ep, vocab_divisor=4), weights)
    _round_trip(config, Layout(tp=2, pp=3, chunk_layers=(1, 5, 2), vocab_divisor=4), weights)


@pytest.mark.parametrize("ratio", sorted(RATIOS))
def test_round_trip_of_llama_2_ratios_is_bit_equal(make_config: Make, make_weights: Weights, ratio: str) -> None:
    config = make_config(**RATIOS[ratio], vocab_size=500)
    weights = make_weights(config)
    for tp, pp, vp in GRID:
        _round_trip(config, Layout(tp=tp, pp=pp, vp=vp), weights)


def test_experts_are_spread_evenly_and_counted_from_zero_on_each_rank(make_family: Make) -> None:
    """4 experts over 2 ranks: expert-parallel rank 1 holds experts 2 and 3 as its 0 and 1; the router is everywhere."""
    config = make_family("mixtral", num_hidden_layers=1)
    shards = {shard.name: shard for shard in rank_plan(config, Layout(ep=2), Rank(ep=1))}
    prefix = "decoder.layers.0.mlp."
    sources = [piece.hf_name for piece in shards[prefix + "experts.local_experts.1.linear_fc1.weight"].pieces]
    assert sources == [f"model.layers.0.block_sparse_moe.experts.3.{name}.weight" for name in ("w1", "w3")]
    assert prefix + "experts.local_experts.2.linear_fc1.weight" not in shards
    assert [piece.primary for piece in shards[prefix + "router.weight"].pieces] == [False]


def test_qkv_bias_is_cut_like_its_weight(make_family: Make) -> None:
    """4 heads of 8 in 2 groups at TP 2: rank 1 has q 16-31, k 8-15, v 8-15."""
    config = make_family("qwen2", num_hidden_layers=1)
    shard = next(s for s in rank_plan(config, Layout(tp=2), Rank(tp=1)) if s.name.endswith("linear_qkv.bias"))
    assert shard.shape == (32,)
    rows = [(piece.hf_name.split(".")[-2], piece.hf_index[0]) for piece in shard.pieces]
    assert rows == [("q_proj", (16, 32)), ("k_proj", (8, 16)), ("v_proj", (8, 16))]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_a_short_table(family: str) -> None:
    import importlib

    module = importlib.import_module(f"align_convert.families.{family}")
    assert module.__file__ is not None
    assert len(Path(module.__file__).read_text(encoding="utf-8").splitlines()) < 40
