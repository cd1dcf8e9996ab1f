"""Megatron directories: what we write, what of others' we read, what is refused."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from align_convert import (
    ConfigError,
    ConvertError,
    FormatError,
    Layout,
    MegatronReader,
    ModelConfig,
    PlanError,
    Rank,
    Source,
    fill_shard,
    finish_megatron,
    load_any,
    rank_plan,
    write_megatron_rank,
)
from align_convert.copy import plan_to_hf, plan_to_megatron, to_hf, to_megatron

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
FILE = "model_optim_rng.pt"


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def _edit(root: Path, change: Callable[[dict[str, Any]], object], folder: str = "mp_rank_00") -> None:
    """Rewrite one rank's file."""
    path = root / "iter_0000001" / folder / FILE
    state = _load(path)
    change(state)
    torch.save(state, path)


@pytest.fixture
def converted(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> Path:
    """The tiny model on one rank."""
    to_megatron(load_any(make_hf(make_config())), tmp_path / "megatron", layout=Layout(vocab_divisor=4))
    return tmp_path / "megatron"


def test_names_of_files_follow_megatron(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = load_any(make_hf(make_config()))
    to_megatron(source, tmp_path / "flat", layout=Layout(tp=2))
    to_megatron(source, tmp_path / "deep", layout=Layout(tp=2, pp=2, vp=2))
    assert (tmp_path / "flat" / "latest_checkpointed_iteration.txt").read_bytes() == b"1"
    assert sorted(p.name for p in (tmp_path / "flat" / "iter_0000001").iterdir()) == ["mp_rank_00", "mp_rank_01"]
    deep = tmp_path / "deep" / "iter_0000001"
    assert sorted(p.name for p in deep.iterdir()) == [f"mp_rank_0{tp}_00{pp}" for tp in range(2) for pp in range(2)]
    assert sorted(key for key in _load(deep / "mp_rank_00_001" / FILE) if "model" in key) == ["model0", "model1"]


def test_file_holds_what_megatron_expects(converted: Path) -> None:
    state = _load(converted / "iter_0000001" / "mp_rank_00" / FILE)
    assert list(state) == ["args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "model"]
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 1)
    args = state["args"]
    assert (args.norm_epsilon, args.layernorm_epsilon, args.rotary_base) == (1e-5, 1e-5, 10000.0)
    assert (args.vocab_size, args.padded_vocab_size, args.make_vocab_size_divisible_by) == (50, 52, 4)
    assert (args.num_query_groups, args.group_query_attention, args.kv_channels) == (2, True, 8)
    assert (args.position_embedding_type, args.swiglu, args.normalization) == ("rope", True, "RMSNorm")
    assert state["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] is None
    assert state["model"]["output_layer._extra_state"] is None


def test_config_is_rebuilt_from_args_alone(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    models = {
        "plain": make_config(tie_word_embeddings=True, rope_theta=5e5, head_dim=12),
        "llama3": make_config(rope_scaling=scaling),
        "linear": make_config(rope_scaling={"type": "linear", "factor": 4.0}),
        "yarn": make_config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}),
        "longer": make_config(rope_scaling=scaling | {"original_max_position_embeddings": 4096}),
        "score": make_config().with_head("score"),
    }
    for name, config in models.items():
        to_megatron(load_any(make_hf(config, name)), tmp_path / f"{name}-m", layout=Layout(tp=2, pp=2))
        (tmp_path / f"{name}-m" / "config.json").unlink()
        rebuilt = MegatronReader(tmp_path / f"{name}-m").config
        for field in ("rope_theta", "rope_scaling", "norm_eps", "head_dim", "tied_embeddings", "head", "vocab_size"):
            assert getattr(rebuilt, field) == getattr(config, field), (name, field)
        assert rebuilt.tensors() == config.tensors()


def test_linear_scaling_is_said_in_megatron_words(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """Also read back from a directory that Megatron itself has saved, which has not our copy of the mapping."""
    source = load_any(make_hf(make_config(rope_scaling={"rope_type": "linear", "factor": 4.0})))
    assert to_megatron(source, tmp_path / "m", layout=Layout()).warnings == ()
    (tmp_path / "m" / "config.json").unlink()
    _edit(tmp_path / "m", lambda state: delattr(state["args"], "hf_rope_scaling"))
    reader = MegatronReader(tmp_path / "m")
    assert (reader.args.rotary_seq_len_interpolation_factor, reader.args.use_rope_scaling) == (4.0, False)
    assert reader.config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "llama3"])
def test_scaling_without_megatron_words_is_warned_of(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, kind: str
) -> None:
    source = load_any(make_hf(make_config(rope_scaling={"rope_type": kind, "factor": 4.0})))
    warnings = plan_to_megatron(source, tmp_path / "m", layout=Layout()).warnings
    assert [kind in warning and "would compute unscaled positions" in warning for warning in warnings] == [True]
    assert plan_to_hf(source, tmp_path / "h").warnings == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hf_rope_scaling": 4}, "'rope_scaling' is 4; it must be an object or null"),
        ({"rotary_seq_len_interpolation_factor": "x"}, "rotary_seq_len_interpolation_factor='x'; it must be a number"),
        ({"vocab_size": None}, "checkpoint args have no 'vocab_size'; put the model's config.json beside it"),
        ({"norm_epsilon": None, "layernorm_epsilon": None}, "have no 'norm_epsilon' or 'layernorm_epsilon'"),
        ({"add_bias_linear": True}, "add_bias_linear=True, which fits no known family; known: llama, mistral"),
        ({"num_experts": 8}, "checkpoint args have no 'moe_router_topk'"),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, "experts must be cut 1 ways too"),
        ({"rotary_base": "x"}, "'rope_theta' is 'x'"),
        ({"padded_vocab_size": 48}, "padded_vocab_size=48; it must be at least 50"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0; it must be a positive integer"),
        ({"pipeline_model_parallel_size": 2}, "is missing"),
    ],
)
def test_args_that_do_not_do_are_refused(converted: Path, changes: dict[str, object], message: str) -> None:
    (converted / "config.json").unlink()
    _edit(converted, lambda state: state["args"].__dict__.update(changes))
    with pytest.raises(ConvertError) as caught:
        MegatronReader(converted)
    assert message in str(caught.value)


def test_config_of_another_model_is_refused(converted: Path) -> None:
    _edit(converted, lambda state: setattr(state["args"], "num_layers", 7))
    with pytest.raises(ConfigError, match="makes num_layers 8, but the checkpoint args say 7"):
        MegatronReader(converted)


def test_transformer_engine_names_and_extra_keys_are_read(converted: Path, tmp_path: Path) -> None:
    """Directories of NVIDIA's converter: TE names, optimizer state, padding of another divisor."""

    def rename(state: dict[str, Any]) -> None:
        for name in [name for name in state["model"] if "layernorm" in name and "final" not in name]:
            new = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            new = new.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            state["model"][new] = state["model"].pop(name)
        state["optimizer"] = {"step": torch.ones(1)}
        state["args"].make_vocab_size_divisible_by = 128

    before = {name: MegatronReader(converted).read_hf(name).clone() for name in MegatronReader(converted).tensors()}
    _edit(converted, rename)
    reader = MegatronReader(converted)
    reader.check()
    assert "decoder.layers.0.input_layernorm.weight" in reader.read(Rank())
    assert all(torch.equal(reader.read_hf(name), value) for name, value in before.items())


def test_iteration_folder_and_release_are_found(converted: Path, tmp_path: Path) -> None:
    assert MegatronReader(converted / "iter_0000001").config == MegatronReader(converted).config
    (converted / "iter_0000001").rename(converted / "release")
    (converted / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert MegatronReader(converted).location.iteration == 0


def test_directory_that_is_incomplete_is_refused(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    root = tmp_path / "m"
    to_megatron(load_any(make_hf(make_config())), root, layout=Layout(tp=2, pp=2))
    tracker = root / "latest_checkpointed_iteration.txt"
    shutil.rmtree(root / "iter_0000001" / "mp_rank_01_001")
    with pytest.raises(FormatError, match=r"mp_rank_01_001' is missing: args say tensor parallel 2 x pipeline"):
        MegatronReader(root)
    tracker.write_text("soon")
    with pytest.raises(FormatError, match="says 'soon'; it must be an iteration number or 'release'"):
        MegatronReader(root)
    tracker.write_text("7")
    with pytest.raises(FormatError, match=r"names '7', but .*iter_0000007' has no mp_rank_\* folders"):
        MegatronReader(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("output_layer.weight"), "tensor 'output_layer.weight' is missing on rank tp=0, pp=0"),
        (lambda m: m.update({"x.weight": torch.ones(1)}), "tensor 'x.weight' on rank tp=0, pp=0 has no rule"),
        (
            lambda m: m.update({"decoder.final_layernorm.weight": torch.ones(3)}),
            "'decoder.final_layernorm.weight' on rank tp=0, pp=0 has shape (3,); the plan says (32,)",
        ),
    ],
)
def test_rank_that_does_not_fit_the_plan_is_refused_before_writing(
    converted: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _edit(converted, lambda state: change(state["model"]))
    with pytest.raises(PlanError) as caught:
        to_hf(load_any(converted), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tied", "folder", "name"),
    [
        (False, "mp_rank_01_000", "decoder.layers.0.input_layernorm.weight"),
        (True, "mp_rank_00_001", "output_layer.weight"),
    ],
    ids=["norm", "tied head"],
)
def test_copies_that_differ_between_ranks_are_refused(
    *, make_config: Make, make_hf: MakeHf, tmp_path: Path, tied: bool, folder: str, name: str
) -> None:
    root = tmp_path / "m"
    to_megatron(load_any(make_hf(make_config(tie_word_embeddings=tied))), root, layout=Layout(tp=2, pp=2))
    _edit(root, lambda state: state["model"][name].add_(1), folder)
    with pytest.raises(PlanError, match=f"'{name}' on rank .* should be a copy of .* but differs from it"):
        to_hf(load_any(root), tmp_path / "out")


def _views_of_one_buffer(source: Source, layout: Layout, rank: Rank) -> dict[str, torch.Tensor]:
    """A rank's tensors as a trainer holds them: slices of one flat buffer."""
    plan = rank_plan(source.config, layout, rank)
    flat = torch.cat([fill_shard(shard, source.read_hf, torch.float32).flatten() for shard in plan])
    stops = list(accumulate(prod(shard.shape) for shard in plan))
    return {shard.name: flat[stop - prod(shard.shape) : stop].view(shard.shape) for shard, stop in zip(plan, stops)}


def test_training_exports_its_own_shards(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """Ranks write in any order, extra states are ignored, the tracker comes last, a file holds only its rank."""
    config, layout, root = make_config(), Layout(tp=2, pp=2, vp=2), tmp_path / "export"
    source = load_any(make_hf(config))

    def finish() -> None:
        finish_megatron(root, config=config, layout=layout, dtype=torch.float32, iteration=12, carry_from=source.root)

    for tp, pp in [(1, 1), (0, 0), (1, 0), (0, 1)]:
        with pytest.raises(FormatError, match="every rank writes its file before finish_megatron"):
            finish()
        rank = Rank(tp=tp, pp=pp)
        chunks = [_views_of_one_buffer(source, layout, replace(rank, vp=vp)) for vp in range(2)]
        weights = sum(value.numel() * 4 for chunk in chunks for value in chunk.values())
        chunks[0]["output_layer._extra_state"] = torch.ones(1)
        file = write_megatron_rank(
            root, config=config, layout=layout, rank=rank, chunks=chunks, dtype=torch.float32, iteration=12
        )
        assert file.stat().st_size < weights + 40_000
    finish()
    reader = load_any(root)
    reader.check()
    assert all(torch.equal(reader.read_hf(name), source.read_hf(name)) for name in config.tensors())
    assert (root / "tokenizer.model").exists()


def test_export_that_is_not_the_plan_is_refused(make_config: Make, tmp_path: Path) -> None:
    config = make_config(num_hidden_layers=1)
    tensors = {shard.name: torch.ones(shard.shape) for shard in rank_plan(config, Layout(), Rank())}
    few = {name: value for name, value in tensors.items() if name != "output_layer.weight"}
    wrong: list[tuple[list[dict[str, torch.Tensor]], str]] = [
        ([], "0 model chunks are given; virtual pipeline size 1 needs 1"),
        ([few], "tensor 'output_layer.weight' is missing for the plan of rank"),
        ([tensors | {"x": torch.ones(1)}], "tensor 'x' has no place in the plan of rank"),
        ([tensors | {"output_layer.weight": torch.ones(2, 2)}], "'output_layer.weight' has shape (2, 2)"),
    ]
    for chunks, message in wrong:
        with pytest.raises(PlanError) as caught:
            write_megatron_rank(
                tmp_path, config=config, layout=Layout(), rank=Rank(), chunks=chunks, dtype=torch.float32
            )
        assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_slices_are_gathered_over_ranks(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = load_any(make_hf(make_config()))
    to_megatron(source, tmp_path / "m", layout=Layout(tp=4, pp=2))
    reader = load_any(tmp_path / "m")
    for name, index in {
        "model.layers.3.self_attn.q_proj.weight": ((5, 29), (1, 31)),
        "model.layers.5.mlp.down_proj.weight": ((0, 32), (11, 25)),
        "lm_head.weight": ((49, 50), (0, 32)),
        "model.norm.weight": ((3, 4),),
    }.items():
        assert torch.equal(reader.read_hf(name, index), source.read_hf(name, index))
    with pytest.raises(PlanError, match="does not fit"):
        reader.read_hf("lm_head.weight", ((49, 51), (0, 32)))
