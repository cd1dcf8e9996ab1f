"""Files loaded by megatron-core itself give Hugging Face's logits, for every layout, spelling and format."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align_convert import Layout, ModelConfig, load_any
from align_convert.cli import main
from align_convert.copy import to_megatron
from align_convert.errors import ConfigError
from align_convert.formats.dist_reader import DistReader
from align_convert.logits.compare import TOLERANCE, logits_of
from align_convert.verify import first_difference

pytest.importorskip("transformers", reason="comes with the extra: pip install 'align-convert[verify]'")
pytest.importorskip("megatron.core", reason="comes with the extra: pip install 'align-convert[verify]'")
from align_convert.logits.megatron import megatron_logits

pytestmark = pytest.mark.slow

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
TOKENS = torch.arange(1, 25).reshape(2, 12)


def _source(make_family: Make, make_hf: MakeHf, family: str = "llama", **changes: object) -> Path:
    """Weights of size 0.1, so that activations stay near 1 and a mistake is not drowned in large numbers."""
    config = make_family(family, **{"num_hidden_layers": 4, **changes})
    generator = torch.Generator().manual_seed(1)
    small = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in config.tensors().items()}
    return make_hf(config, extra=small)


def _worst(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert float(a.std()) > 0.05
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("layout", "naming", "tied"),
    [
        (Layout(tp=2), "te", False),
        (Layout(tp=2, pp=2, vp=2), "local", True),
        (Layout(tp=4), "local", False),
        (Layout(pp=2, chunk_layers=(1, 3)), "te", False),
    ],
    ids=["tp2-te", "tp2-pp2-vp2-tied", "tp4-2-kv-groups", "uneven-pp-te"],
)
def test_ranks_in_megatron_core_give_huggingface_logits(
    *, make_family: Make, make_hf: MakeHf, tmp_path: Path, layout: Layout, naming: str, tied: bool
) -> None:
    source = load_any(_source(make_family, make_hf, tie_word_embeddings=tied))
    to_megatron(source, tmp_path / "m", layout=layout, naming=naming)  # type: ignore[arg-type]
    assert _worst(logits_of(source, TOKENS), logits_of(load_any(tmp_path / "m"), TOKENS)) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_families_in_megatron_core_give_huggingface_logits(
    make_family: Make, make_hf: MakeHf, tmp_path: Path, family: str
) -> None:
    source = load_any(_source(make_family, make_hf, family, num_hidden_layers=2))
    to_megatron(source, tmp_path / "m", layout=Layout())
    assert _worst(logits_of(source, TOKENS), logits_of(load_any(tmp_path / "m"), TOKENS)) < TOLERANCE


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=["llama3", "linear"])
def test_scaled_positions_in_megatron_core_give_huggingface_logits(
    make_family: Make, make_hf: MakeHf, tmp_path: Path, scaling: dict[str, object]
) -> None:
    """By the settings in the args; without them positions differ enough to see."""
    changes = {"num_hidden_layers": 1, "rope_theta": 2e5, "max_position_embeddings": 16384}
    directory = _source(make_family, make_hf, rope_scaling=scaling, **changes)
    source = load_any(directory)
    to_megatron(source, tmp_path / "m", layout=Layout())
    tokens = torch.arange(1000).reshape(1, 1000) % 24 + 1
    wanted = logits_of(source, tokens)
    assert _worst(wanted, logits_of(load_any(tmp_path / "m"), tokens)) < TOLERANCE
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "rope_scaling": None}))
    assert _worst(wanted, logits_of(load_any(directory), tokens)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3 | {"original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear"},
    ],
    ids=["longer", "yarn", "no factor"],
)
def test_scaling_that_args_have_no_word_for_is_refused(
    make_family: Make, make_hf: MakeHf, tmp_path: Path, scaling: dict[str, object]
) -> None:
    source = load_any(_source(make_family, make_hf, rope_scaling=scaling, num_hidden_layers=1))
    to_megatron(source, tmp_path / "m", layout=Layout())
    with pytest.raises(ConfigError, match="megatron-core cannot compute rope scaling"):
        logits_of(load_any(tmp_path / "m"), TOKENS)


def test_megatron_core_loads_our_torch_dist_elsewhere_and_we_read_what_it_saves(
    make_family: Make, make_hf: MakeHf, tmp_path: Path
) -> None:
    """One torch_dist directory at TP 2 x PP 2 under default strictness; saved again by megatron-core; read back."""
    source = load_any(_source(make_family, make_hf))
    to_megatron(source, tmp_path / "dist", layout=Layout(), file_format="torch_dist")
    ours = load_any(tmp_path / "dist")
    assert isinstance(ours, DistReader)
    saved = tmp_path / "saved" / "iter_0000001"
    saved.mkdir(parents=True)
    found = megatron_logits(ours, TOKENS, layout=Layout(tp=2, pp=2), save=saved)
    assert _worst(logits_of(source, TOKENS), found) < TOLERANCE
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("1")
    (saved.parent / "config.json").write_bytes((source.root / "config.json").read_bytes())
    assert first_difference(source, load_any(saved.parent)) is None


def test_verify_logits_command(
    make_family: Make, make_hf: MakeHf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(make_family, make_hf, num_hidden_layers=1)
    to_megatron(load_any(source), tmp_path / "m", layout=Layout())
    assert main(["verify", str(source), str(tmp_path / "m"), "--logits"]) == 0
    assert "logits differ by at most" in capsys.readouterr().out
