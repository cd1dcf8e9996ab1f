"""Values through rectangles, both ways."""

from collections.abc import Callable

import pytest
import torch

from align_convert import Layout, ModelConfig, PlanError, Rank, fill_shard, rank_plan, shard_slices
from align_convert.plan import Index

Make = Callable[..., ModelConfig]


def test_slices_of_filled_shards_give_the_tensors_back(
    make_config: Make, make_weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    config, layout = make_config(tie_word_embeddings=True), Layout(tp=4, pp=2, vp=2, vocab_divisor=3)
    weights = make_weights(config)
    back = {name: torch.full(shape, torch.nan) for name, shape in config.tensors().items()}
    for rank in layout.ranks():
        for shard in rank_plan(config, layout, rank):
            tensor = fill_shard(shard, lambda hf, index: weights[hf][_slices(index)], torch.float32)
            for piece, values in shard_slices(shard, tensor):
                if piece.primary:
                    back[piece.hf_name][_slices(piece.hf_index)] = values
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_values_are_cast_to_the_asked_type(make_config: Make) -> None:
    (shard, *_) = rank_plan(make_config(), Layout(), Rank())
    filled = fill_shard(shard, lambda _, index: torch.ones(_sizes(index)), torch.bfloat16)
    assert filled.dtype == torch.bfloat16


def test_reader_that_gives_another_shape_is_refused(make_config: Make) -> None:
    (shard, *_) = rank_plan(make_config(), Layout(), Rank())
    with pytest.raises(PlanError, match=r"'model.embed_tokens.weight' gave shape \(1,\); asked for \(50, 32\)"):
        fill_shard(shard, lambda _, __: torch.ones(1), torch.float32)


def test_tensor_of_another_shape_has_no_slices(make_config: Make) -> None:
    (shard, *_) = rank_plan(make_config(), Layout(), Rank())
    with pytest.raises(PlanError, match="the plan says"):
        list(shard_slices(shard, torch.ones(3, 3)))


def _slices(index: Index) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in index)


def _sizes(index: Index) -> list[int]:
    return [stop - start for start, stop in index]
