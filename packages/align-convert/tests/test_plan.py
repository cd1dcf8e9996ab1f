"""What must hold of every plan: nothing is left out, nothing is there twice."""

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_convert import Layout, ModelConfig, Piece, Shard, rank_plan
from align_convert.fill import slices


@st.composite
def _models_and_layouts(draw: st.DrawFn) -> tuple[ModelConfig, Layout]:
    """Any model that any layout of these sizes can cut."""
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    vp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    heads = tp * draw(st.integers(1, 3))
    groups = draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0 and (g % tp == 0 or tp % g == 0)]))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"]))
    chunks = draw(st.none() | st.lists(st.integers(0, 3), min_size=pp * vp, max_size=pp * vp).filter(any).map(tuple))
    experts = draw(st.sampled_from([2, 4]))
    raw = {
        "model_type": family,
        "num_local_experts": experts,
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": tp * draw(st.integers(1, 3)),
        "num_hidden_layers": sum(chunks) if chunks else pp * vp * draw(st.integers(1, 2)),
        "hidden_size": draw(st.integers(1, 9)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 2)),
        "intermediate_size": tp * draw(st.integers(1, 4)),
        "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    config = ModelConfig.from_hf(raw).with_head(draw(st.sampled_from(["lm", "score", "pooler"])))
    ep = draw(st.sampled_from([1, 2])) if config.num_experts else 1
    return config, Layout(tp=tp, pp=pp, vp=vp, ep=ep, chunk_layers=chunks, vocab_divisor=draw(st.integers(1, 8)))


def _count(counts: torch.Tensor, index: tuple[tuple[int, int], ...]) -> None:
    counts[slices(index)] += 1


def _check_piece(piece: Piece, shard: Shard) -> None:
    sizes = [[stop - start for start, stop in index] for index in (piece.hf_index, piece.shard_index)]
    assert sizes[0] == sizes[1]
    assert prod(sizes[0]) > 0
    assert all(stop <= size for (_, stop), size in zip(piece.shard_index, shard.shape, strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_models_and_layouts())
def test_every_hf_element_is_primary_once_and_every_shard_is_covered_once(case: tuple[ModelConfig, Layout]) -> None:
    config, layout = case
    primary = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in config.tensors().items()}
    for rank in layout.ranks():
        for shard in rank_plan(config, layout, rank):
            covered = torch.zeros(shard.shape, dtype=torch.int32)
            for piece in shard.pieces:
                _check_piece(piece, shard)
                _count(covered, piece.shard_index)
                if piece.primary:
                    _count(primary[piece.hf_name], piece.hf_index)
            if shard.padding is not None:
                covered[slice(*shard.padding.rows)] += 1
            assert bool((covered == 1).all()), (shard.name, rank)
    for name, counts in primary.items():
        assert bool((counts == 1).all()), name


def test_plan_needs_no_torch() -> None:
    """In a fresh interpreter, importing the package and planning a rank does not import torch."""
    import subprocess
    import sys

    code = "import align_convert, sys; align_convert.rank_plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
