"""Any format into any other and back: bit-equal, whatever the spelling, layout or head."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from align_convert import Layout, LayoutError, ModelConfig, load_any
from align_convert.copy import to_hf, to_megatron
from align_convert.formats.dist_reader import DistReader
from align_convert.formats.megatron_names import NAMINGS
from align_convert.verify import first_difference

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def _equal(a: Path, b: Path) -> None:
    assert first_difference(load_any(a), load_any(b)) is None


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_comes_back(
    make_family: Make, make_hf: MakeHf, tmp_path: Path, family: str, naming: str
) -> None:
    config = make_family(family, num_hidden_layers=4)
    source = make_hf(config)
    layout = Layout(tp=2, pp=2, vp=2, ep=2 if config.num_experts else 1)
    if naming == "legacy" and config.num_experts:
        with pytest.raises(LayoutError, match="legacy Megatron names have no experts like these; use naming local"):
            to_megatron(load_any(source), tmp_path / "m", layout=layout, naming="legacy")
        return
    to_megatron(load_any(source), tmp_path / "m", layout=layout, naming=naming)  # type: ignore[arg-type]
    _equal(source, tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    if family != "mistral":  # whose args are a Llama's
        _equal(source, tmp_path / "m")


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_dist_comes_back(make_family: Make, make_hf: MakeHf, tmp_path: Path, family: str) -> None:
    source = make_hf(make_family(family, num_hidden_layers=4), dtype=torch.bfloat16)
    to_megatron(load_any(source), tmp_path / "dist", layout=Layout(tp=2), file_format="torch_dist")
    assert isinstance(load_any(tmp_path / "dist"), DistReader)
    assert isinstance(load_any(tmp_path / "dist" / "iter_0000001"), DistReader)
    _equal(source, tmp_path / "dist")
    to_hf(load_any(tmp_path / "dist"), tmp_path / "back")
    _equal(source, tmp_path / "back")
    (tmp_path / "dist" / "config.json").unlink()
    if family != "mistral":
        _equal(source, tmp_path / "dist")


@pytest.mark.parametrize("head", ["score", "pooler"])
@pytest.mark.parametrize("naming", ["local", "legacy", "torch_dist"])
def test_heads_come_back(make_config: Make, make_hf: MakeHf, tmp_path: Path, head: str, naming: str) -> None:
    source = make_hf(make_config(num_hidden_layers=4).with_head(head))  # type: ignore[arg-type]
    if naming == "torch_dist":
        to_megatron(load_any(source), tmp_path / "m", layout=Layout(), file_format="torch_dist")
    else:
        layout = Layout(tp=2, pp=2)
        to_megatron(load_any(source), tmp_path / "m", layout=layout, naming=naming)  # type: ignore[arg-type]
    (tmp_path / "m" / "config.json").unlink()
    _equal(source, tmp_path / "m")
    to_hf(load_any(tmp_path / "m"), tmp_path / "back")
    _equal(source, tmp_path / "back")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_chain_of_formats_and_layouts_ends_where_it_began(
    make_family: Make, make_hf: MakeHf, tmp_path: Path, tied: bool
) -> None:
    """(8,1) -> (1,8) -> (4,2) -> (2,4) -> Hugging Face, through every format, 2 KV groups cut 8 ways."""
    config = make_family("llama", num_attention_heads=8, tie_word_embeddings=tied)
    directories = [make_hf(config)]
    steps: list[tuple[Layout, dict[str, str]]] = [
        (Layout(tp=8), {"naming": "legacy"}),
        (Layout(pp=8), {"naming": "te"}),
        (Layout(tp=4, pp=2, vp=2), {}),
        (Layout(), {"file_format": "torch_dist"}),
        (Layout(tp=2, pp=4), {}),
        (Layout(tp=2, pp=3, chunk_layers=(1, 4, 3)), {"naming": "legacy"}),
        (Layout(pp=2, vp=2, chunk_layers=(0, 3, 4, 1)), {"naming": "te"}),
    ]
    for number, (layout, how) in enumerate(steps):
        directories.append(tmp_path / str(number))
        to_megatron(load_any(directories[-2]), directories[-1], layout=layout, **how)  # type: ignore[arg-type]
    to_hf(load_any(directories[-1]), tmp_path / "back")
    for a, b in pairwise([*directories, tmp_path / "back"]):
        _equal(a, b)


def test_bin_files_are_read(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """What torch.save wrote, one of the tensors as a view into a larger one."""
    source = make_hf(make_config())
    reader = load_any(source)
    state = {name: reader.read_hf(name) for name in reader.config.tensors()}
    wide = torch.zeros(50, 40)
    wide[:, 4:36] = state["lm_head.weight"]
    state["lm_head.weight"] = wide[:, 4:36]
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((source / "config.json").read_bytes())
    _equal(source, tmp_path / "bin")
    to_megatron(load_any(tmp_path / "bin"), tmp_path / "m", layout=Layout(tp=2))
    _equal(source, tmp_path / "m")
