"""Whole copies: bit-equal round trips over layouts and heads, casts, refusals before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align_convert import ConvertError, FormatError, Layout, LayoutError, MegatronReader, ModelConfig, PlanError, Rank
from align_convert import load_any as load
from align_convert.copy import plan_to_megatron, to_hf, to_megatron
from align_convert.verify import first_difference

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]

LAYOUTS = [
    Layout(tp=tp, pp=pp, vp=vp, vocab_divisor=4) for tp in (1, 2, 4) for pp in (1, 2, 4) for vp in (1, 2) if vp <= pp
]
MODELS: dict[str, dict[str, object]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads, no padding": {"head_dim": 12, "vocab_size": 64},
    "score": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp}pp{layout.pp}vp{layout.vp}")
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_bit_equal(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, model: str, layout: Layout
) -> None:
    source = make_hf(make_config(**MODELS[model]))
    to_megatron(load(source), tmp_path / "megatron", layout=layout)
    reader = load(tmp_path / "megatron")
    assert isinstance(reader, MegatronReader)
    assert reader.layout == layout
    to_hf(reader, tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)


@pytest.mark.parametrize(
    ("heads", "groups", "layout"),
    [(32, 32, Layout(tp=4)), (40, 40, Layout(tp=8)), (64, 8, Layout(tp=8, pp=4))],
    ids=["7b", "13b", "70b"],
)
def test_llama_2_ratios_round_trip(
    *, make_config: Make, make_hf: MakeHf, tmp_path: Path, heads: int, groups: int, layout: Layout
) -> None:
    """Head and group counts of Llama-2 7B, 13B and 70B with heads of 2, at the layouts of the tutorial."""
    config = make_config(
        hidden_size=2 * heads, num_attention_heads=heads, num_key_value_heads=groups, num_hidden_layers=4
    )
    source = make_hf(config, dtype=torch.float16)
    to_megatron(load(source), tmp_path / "megatron", layout=layout)
    assert first_difference(load(source), load(tmp_path / "megatron")) is None


def test_chain_of_layouts_ends_where_it_began(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = make_hf(make_config(tie_word_embeddings=True))
    previous = source
    for number, (tp, pp, vp) in enumerate([(4, 1, 1), (1, 4, 2), (2, 2, 2), (1, 8, 1), (4, 2, 1)]):
        to_megatron(load(previous), tmp_path / str(number), layout=Layout(tp=tp, pp=pp, vp=vp))
        previous = tmp_path / str(number)
    assert first_difference(load(source), load(previous)) is None


def test_every_rank_holds_what_megatron_would_hold(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """The rank's tensors against plain torch slicing of the full matrices, written out here a second time."""
    source = make_hf(make_config())
    to_megatron(load(source), tmp_path / "megatron", layout=Layout(tp=2, pp=2, vocab_divisor=4))
    reader = MegatronReader(tmp_path / "megatron")
    hf = load_file(source / "model.safetensors")
    rank = reader.read(Rank(tp=1, pp=1))
    layer = {name.removeprefix("model.layers.4."): value for name, value in hf.items() if "layers.4." in name}
    q, k, v = (layer[f"self_attn.{part}_proj.weight"] for part in "qkv")
    qkv = torch.cat([q.view(2, 16, 32), k.view(2, 8, 32), v.view(2, 8, 32)], dim=1).view(64, 32)
    gate, up = layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
    head = torch.cat([hf["lm_head.weight"], hf["lm_head.weight"][-1:].expand(6, -1)])
    wanted = {
        "self_attention.linear_qkv.weight": qkv[32:],
        "self_attention.linear_proj.weight": layer["self_attn.o_proj.weight"][:, 16:],
        "mlp.linear_fc1.weight": torch.cat([gate[24:], up[24:]]),
        "mlp.linear_fc2.weight": layer["mlp.down_proj.weight"][:, 24:],
        "input_layernorm.weight": layer["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": layer["post_attention_layernorm.weight"],
    }
    assert all(torch.equal(rank[f"decoder.layers.0.{name}"], value) for name, value in wanted.items())
    assert torch.equal(rank["output_layer.weight"], head[28:])
    assert len(rank) == 4 * len(wanted) + 2


def test_cast_is_torchs_rounding_and_is_recorded(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = make_hf(make_config())
    to_megatron(load(source), tmp_path / "megatron", layout=Layout(tp=2), dtype=torch.bfloat16)
    to_hf(load(tmp_path / "megatron"), tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_is_needed_to_know_the_model_comes_along(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    config = make_config(my_note="kept", rope_scaling={"rope_type": "linear", "factor": 2.0})
    source = make_hf(config)
    to_megatron(load(source), tmp_path / "megatron", layout=Layout())
    to_hf(load(tmp_path / "megatron"), tmp_path / "back")
    for name in ("tokenizer.model", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "back" / "notes.txt").exists()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == dict(config.hf)


def test_mixed_types_need_a_choice(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = make_hf(make_config(), extra={"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)})
    with pytest.raises(PlanError, match=r"several types: bfloat16 \(1\), float32 \(74\); choose one with --dtype"):
        to_megatron(load(source), tmp_path / "out", layout=Layout())
    to_megatron(load(source), tmp_path / "out", layout=Layout(), dtype=torch.float32)


def test_plan_says_bytes_files_and_writes_nothing(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """Per layer 32*64 qkv + 32*32 proj + 2*48*32 + 48*32 mlp + 2*32 norms = 7744; vocabulary 2 x 52 x 32 and a norm."""
    source = make_hf(make_config())
    plan = plan_to_megatron(load(source), tmp_path / "out", layout=Layout(tp=1, vocab_divisor=4))
    assert plan.files == (("iter_0000001/mp_rank_00/model_optim_rng.pt", 4 * (8 * 7744 + 2 * 52 * 32 + 32)),)
    assert plan.carried[0] == "config.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("broken", "layout", "error", "message"),
    [
        ({"without": "model.layers.3.mlp.up_proj.weight"}, Layout(), PlanError, "1 tensor is missing in"),
        ({"without": "lm_head.weight"}, Layout(), PlanError, "set tie_word_embeddings to true"),
        (
            {"extra": {"a.bias": torch.ones(1), "b.bias": torch.ones(1)}},
            Layout(),
            PlanError,
            "2 tensors of the checkpoint have no rule: 'a.bias', 'b.bias' (add one in align_convert/families/llama.py)",
        ),
        (
            {"extra": {"model.norm.weight": torch.ones(31)}},
            Layout(),
            PlanError,
            "'model.norm.weight' has shape (31,); config.json makes it (32,)",
        ),
        (
            {"extra": {"model.norm.weight": torch.ones(32, dtype=torch.int8)}},
            Layout(),
            FormatError,
            "has type I8; weights must be one of BF16, F16, F32",
        ),
        ({}, Layout(tp=3), LayoutError, "tensor parallel size 3 does not divide 4 attention heads; use 1, 2 or 4"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    *,
    make_config: Make,
    make_hf: MakeHf,
    tmp_path: Path,
    broken: dict[str, object],
    layout: Layout,
    error: type[ConvertError],
    message: str,
) -> None:
    source = make_hf(make_config(), **broken)
    with pytest.raises(error, match=r".") as caught:
        to_megatron(load(source), tmp_path / "out", layout=layout)
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_tied_copy_of_the_embedding_is_dropped_but_a_different_one_is_refused(
    make_config: Make, make_hf: MakeHf, make_weights: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    config = make_config(tie_word_embeddings=True)
    embedding = make_weights(config)["model.embed_tokens.weight"]
    same = make_hf(config, "same", extra={"lm_head.weight": embedding.clone()})
    to_megatron(load(same), tmp_path / "out", layout=Layout())
    different = make_hf(config, "different", extra={"lm_head.weight": embedding + 1})
    with pytest.raises(PlanError, match="set tie_word_embeddings to false to keep both"):
        to_megatron(load(different), tmp_path / "out2", layout=Layout())


def test_stored_rotary_frequencies_are_not_weights(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = make_hf(make_config(), extra={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    to_megatron(load(source), tmp_path / "out", layout=Layout())


def test_destination_is_replaced_only_when_told_and_only_if_a_checkpoint(
    make_config: Make, make_hf: MakeHf, tmp_path: Path
) -> None:
    source, out = load(make_hf(make_config())), tmp_path / "out"
    to_megatron(source, out, layout=Layout())
    with pytest.raises(FormatError, match="exists and is not empty; pass --overwrite to replace it"):
        to_megatron(source, out, layout=Layout(tp=2))
    to_megatron(source, out, layout=Layout(tp=2), overwrite=True)
    assert sorted(path.name for path in (out / "iter_0000001").iterdir()) == ["mp_rank_00", "mp_rank_01"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FormatError, match="does not look like a checkpoint"):
        to_megatron(source, other, layout=Layout(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "photos"]


def test_destination_may_be_a_link(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source, target, link = load(make_hf(make_config())), tmp_path / "disk" / "out", tmp_path / "link"
    target.mkdir(parents=True)
    link.symlink_to(target)
    to_megatron(source, link, layout=Layout(tp=2))
    to_megatron(source, link, layout=Layout(), overwrite=True)
    assert [path.name for path in (target / "iter_0000001").iterdir()] == ["mp_rank_00"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "hf", "link"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert link.is_symlink()


def test_output_may_not_overlap_the_input(make_config: Make, make_hf: MakeHf) -> None:
    directory = make_hf(make_config())
    for destination in (directory, directory / "below", directory.parent):
        with pytest.raises(FormatError, match="overlap; give a separate output"):
            to_megatron(load(directory), destination, layout=Layout(), overwrite=True)


def test_failure_half_way_leaves_the_old_checkpoint_and_no_rubbish(
    make_config: Make, make_hf: MakeHf, tmp_path: Path
) -> None:
    source, out = load(make_hf(make_config())), tmp_path / "out"
    to_megatron(source, out, layout=Layout())
    before = sorted(path.relative_to(out) for path in out.rglob("*"))

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_megatron(source, out, layout=Layout(tp=2), overwrite=True, progress=stop)
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "hf", "out"]

    def fail(_: int) -> None:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        to_megatron(source, out, layout=Layout(tp=2), overwrite=True, progress=fail)
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_disk_too_small_is_refused(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(FormatError, match="free some space or give another output"):
        to_megatron(load(make_hf(make_config())), tmp_path / "out", layout=Layout())


def test_progress_adds_up_to_the_plan(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    steps: list[int] = []
    totals: list[int] = []
    source = load(make_hf(make_config()))
    plan = to_megatron(source, tmp_path / "a", layout=Layout(tp=2), start=totals.append, progress=steps.append)
    assert totals == [sum(steps)] == [plan.total_bytes]
    back = to_hf(load(tmp_path / "a"), tmp_path / "b", start=totals.append, progress=(again := list[int]()).append)
    assert totals[1:] == [sum(again)] == [back.total_bytes]
