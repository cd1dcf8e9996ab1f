"""Llama's rules by hand-worked numbers: which row of which HF tensor is where on which rank."""

from collections.abc import Callable

import torch

from align_convert import Layout, ModelConfig, Rank, Shard, fill_shard, rank_plan

Make = Callable[..., ModelConfig]


def _numbered(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Row r of q is all 100+r, of k 200+r, of v 300+r, of gate 400+r, of up 500+r; column c of o and down 700+c."""
    base = {"q_proj": 100, "k_proj": 200, "v_proj": 300, "gate_proj": 400, "up_proj": 500, "embed": 0, "lm_head": 600}
    tensors = {}
    for name, shape in config.tensors().items():
        start = next((number for key, number in base.items() if key in name), 700)
        axis = 1 if "o_proj" in name or "down_proj" in name else 0
        line = torch.arange(start, start + shape[axis], dtype=torch.float32)
        tensors[name] = (line if axis else line.reshape(-1, *[1] * (len(shape) - 1))).expand(shape)
    return tensors


def _rows(config: ModelConfig, layout: Layout, rank: Rank, name: str, *, axis: int = 0) -> list[int]:
    """The numbers of a rank's tensor along one axis."""
    tensors = _numbered(config)
    shard = _find(config, layout, rank, name)
    filled = fill_shard(shard, lambda hf, index: tensors[hf][tuple(slice(*pair) for pair in index)], torch.float32)
    return [int(value) for value in (filled[:, 0] if axis == 0 else filled[0])]


def _find(config: ModelConfig, layout: Layout, rank: Rank, name: str) -> Shard:
    return next(shard for shard in rank_plan(config, layout, rank) if shard.name.endswith(name))


def test_qkv_of_grouped_queries_is_q_k_v_by_group(make_config: Make) -> None:
    """4 heads of 2, 2 groups: group 0 = q rows 0-3, k 0-1, v 0-1; group 1 = q 4-7, k 2-3, v 2-3."""
    config = make_config(head_dim=2)
    group_0 = [100, 101, 102, 103, 200, 201, 300, 301]
    group_1 = [104, 105, 106, 107, 202, 203, 302, 303]
    assert _rows(config, Layout(), Rank(), "linear_qkv.weight") == group_0 + group_1
    assert _rows(config, Layout(tp=2), Rank(tp=0), "linear_qkv.weight") == group_0
    assert _rows(config, Layout(tp=2), Rank(tp=1), "linear_qkv.weight") == group_1


def test_qkv_of_fewer_groups_than_ranks_is_a_plain_chunk(make_config: Make) -> None:
    """TP 4 over the same 16 rows: 4 rows each, cutting inside the groups."""
    config = make_config(head_dim=2)
    chunks = [_rows(config, Layout(tp=4), Rank(tp=tp), "linear_qkv.weight") for tp in range(4)]
    assert chunks == [[100, 101, 102, 103], [200, 201, 300, 301], [104, 105, 106, 107], [202, 203, 302, 303]]


def test_qkv_of_multi_head_attention_alternates_heads(make_config: Make) -> None:
    """4 heads of 1: q0 k0 v0 q1 k1 v1 ..."""
    config = make_config(head_dim=1, num_key_value_heads=4)
    full = [100, 200, 300, 101, 201, 301, 102, 202, 302, 103, 203, 303]
    assert _rows(config, Layout(), Rank(), "linear_qkv.weight") == full
    assert _rows(config, Layout(tp=4), Rank(tp=2), "linear_qkv.weight") == [102, 202, 302]


def test_qkv_of_multi_query_attention_is_all_queries_first(make_config: Make) -> None:
    """4 heads of 2, 1 group: 8 query rows, 2 key rows, 2 value rows; TP 2 takes 6 rows each."""
    config = make_config(head_dim=2, num_key_value_heads=1)
    full = [100, 101, 102, 103, 104, 105, 106, 107, 200, 201, 300, 301]
    assert _rows(config, Layout(), Rank(), "linear_qkv.weight") == full
    assert _rows(config, Layout(tp=2), Rank(tp=1), "linear_qkv.weight") == full[6:]


def test_each_rank_holds_its_part_of_gate_then_of_up(make_config: Make) -> None:
    """Width 8: TP 1 is gate 0-7 then up 0-7; TP 4 rank 1 is gate 2-3 then up 2-3, not rows 4-7 of the whole."""
    config = make_config(intermediate_size=8)
    assert _rows(config, Layout(), Rank(), "linear_fc1.weight") == [*range(400, 408), *range(500, 508)]
    assert _rows(config, Layout(tp=4), Rank(tp=1), "linear_fc1.weight") == [402, 403, 502, 503]


def test_output_projections_are_cut_by_column(make_config: Make) -> None:
    config = make_config(intermediate_size=8, head_dim=2)
    assert _rows(config, Layout(tp=2), Rank(tp=1), "linear_fc2.weight", axis=1) == [704, 705, 706, 707]
    assert _rows(config, Layout(tp=4), Rank(tp=3), "linear_proj.weight", axis=1) == [706, 707]


def test_vocabulary_padding_repeats_the_last_real_row(make_config: Make) -> None:
    """10 rows, divisor 4, TP 2: 16 rows; rank 0 has rows 0-7, rank 1 rows 8-9 and six copies of row 9."""
    config, layout = make_config(vocab_size=10), Layout(tp=2, vocab_divisor=4)
    assert _rows(config, layout, Rank(), "word_embeddings.weight") == list(range(8))
    assert _rows(config, layout, Rank(tp=1), "word_embeddings.weight") == [8, 9, 9, 9, 9, 9, 9, 9]
    assert _rows(config, layout, Rank(tp=1), "output_layer.weight") == [608, 609, 609, 609, 609, 609, 609, 609]
    padding = _find(config, layout, Rank(tp=1), "output_layer.weight").padding
    assert padding is not None
    assert (padding.rows, padding.hf_name, padding.hf_row) == ((2, 8), "lm_head.weight", 9)


def test_rank_of_padding_only_is_filled_too(make_config: Make) -> None:
    """3 rows, divisor 4, TP 2: rank 1 holds no real row at all."""
    config, layout = make_config(vocab_size=3), Layout(tp=2, vocab_divisor=4)
    shard = _find(config, layout, Rank(tp=1), "word_embeddings.weight")
    assert shard.pieces == ()
    assert _rows(config, layout, Rank(tp=1), "word_embeddings.weight") == [2, 2, 2, 2]


def test_embedding_and_head_live_on_the_first_and_last_chunk(make_config: Make) -> None:
    config, layout = make_config(), Layout(pp=2, vp=2)
    ends = {
        (rank.pp, rank.vp): [s.name for s in rank_plan(config, layout, rank) if "layers" not in s.name]
        for rank in layout.ranks()
    }
    assert ends == {
        (0, 0): ["embedding.word_embeddings.weight"],
        (0, 1): [],
        (1, 0): [],
        (1, 1): ["decoder.final_layernorm.weight", "output_layer.weight"],
    }


def test_layer_names_count_from_zero_in_every_chunk(make_config: Make) -> None:
    config, layout = make_config(), Layout(pp=2, vp=2)
    plan = rank_plan(config, layout, Rank(pp=1, vp=1))
    norms = [(shard.name, shard.pieces[0].hf_name) for shard in plan if "input_layernorm" in shard.name]
    assert norms == [
        ("decoder.layers.0.input_layernorm.weight", "model.layers.6.input_layernorm.weight"),
        ("decoder.layers.1.input_layernorm.weight", "model.layers.7.input_layernorm.weight"),
    ]


def test_tied_embedding_has_a_secondary_copy_only_across_stages(make_config: Make) -> None:
    config = make_config(tie_word_embeddings=True)
    assert not [s for s in rank_plan(config, Layout(tp=2), Rank()) if s.name == "output_layer.weight"]
    copy = _find(config, Layout(pp=2), Rank(pp=1), "output_layer.weight")
    assert [(piece.hf_name, piece.primary) for piece in copy.pieces] == [("model.embed_tokens.weight", False)]


def test_score_head_is_whole_on_every_tensor_rank_of_the_last_stage(make_config: Make) -> None:
    config, layout = make_config().with_head("score"), Layout(tp=2, pp=2)
    shards = [_find(config, layout, Rank(tp=tp, pp=1), "output_layer.weight") for tp in range(2)]
    assert [(s.shape, s.pieces[0].hf_name, s.pieces[0].primary) for s in shards] == [
        ((1, 32), "score.weight", True),
        ((1, 32), "score.weight", False),
    ]
